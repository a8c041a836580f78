"""Parts computed side by side: in order, each by one thread of PyTorch's, and nothing of it left behind."""

import threading

import pytest
import torch

from ddkit.runtime.threads import cores_for, parallel_map


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_that_compute_alone(three_threads):
    meeting = threading.Barrier(2)

    def work(number):
        meeting.wait(timeout=60)  # nobody would come where parts followed one another
        return number, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    assert list(parallel_map(work, range(4), 2)) == [(number, 1, False) for number in range(4)]
    assert torch.get_num_threads() == 3


def test_the_first_part_is_done_before_the_others_begin(three_threads):
    done = []

    def work(number):
        before = tuple(done)
        done.append(number)
        return before

    first, *others = parallel_map(work, range(4), 2, first_alone=True)
    assert first == () and all(before[0] == 0 for before in others)


def test_one_worker_is_the_caller():
    assert list(parallel_map(lambda part: threading.current_thread(), [0], 1)) == [threading.current_thread()]


def test_error_in_a_part_reaches_the_caller():
    def work(number):
        raise torch.OutOfMemoryError(f"no room for part {number}")

    with pytest.raises(torch.OutOfMemoryError, match="part 0"):
        list(parallel_map(work, range(3), 2))


def test_a_cpu_has_as_many_workers_as_threads_and_a_gpu_one(three_threads):
    assert cores_for(torch.device("cpu")) == 3
    assert cores_for(torch.device("cuda", 0)) == 1
