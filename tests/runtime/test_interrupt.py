import os
import signal
import threading
import time

import pytest

from ddkit.errors import InterruptedRunError
from ddkit.runtime.interrupt import stop_requests, time_is_up, time_limit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_marks_the_request(number):
    with pytest.raises(InterruptedRunError), stop_requests() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        raise InterruptedRunError("as the loop does")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_nobody_heeded_is_passed_on(number):
    reached = []
    with pytest.raises(InterruptedRunError), stop_requests() as outer:
        with stop_requests() as inner:
            os.kill(os.getpid(), number)
            assert inner and not outer
        reached.append(bool(outer))
        raise InterruptedRunError("as the loop does")
    assert reached == [True]


def test_the_second_signal_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_requests():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_other_threads_can_use_it_too():
    seen = []

    def work():
        with stop_requests() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_request_becomes_true_when_the_time_limit_around_it_is_over():
    with time_limit(0.05), stop_requests() as stop:
        assert not stop and not time_is_up()
        time.sleep(0.06)
        assert stop and time_is_up()
    with stop_requests() as stop:
        assert not stop


def test_a_time_limit_passes_no_signal_on():
    with time_limit(0.0), stop_requests() as stop:
        assert stop
