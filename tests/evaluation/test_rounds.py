"""Rounds that run side by side, as a GPU's do: each computes what it computes alone."""

import itertools
import os
import signal
import threading
import time

import pytest
import torch

from ddkit.challenge import DatasetSpec
from ddkit.data.images import normalize
from ddkit.data.store import ImageSet
from ddkit.errors import InterruptedRunError
from ddkit.evaluation.rounds import RoundJob, RoundSettings, predict, read_result, run_rounds
from ddkit.evaluation.test_sets import as_test_set
from ddkit.evaluation.tracks import Generated
from ddkit.network.engine import build_engine
from ddkit.network.networks import build_network
from ddkit.network.plan import EnginePlan
from ddkit.network.training import TrainingSettings
from ddkit.runtime.interrupt import StopRequest, stop_requests

SPEC = DatasetSpec("blobs", 4, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SETTINGS = RoundSettings("convnet", TrainingSettings(4, batch_size=8), seed=7)


def pixels(n, seed):
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def real_images():
    return as_test_set(ImageSet(pixels(20, 1), torch.arange(20) % 4, ("a", "b", "c", "d")), SPEC)


def job(index, folder=None, images=12):
    made = Generated(normalize(pixels(images, 2), SPEC), torch.arange(images) % 4, 0.0)
    return RoundJob(index, made, folder and folder / f"round-{index}.pt", seconds_between_saves=0)


def run(jobs, stop=None, listener=lambda *report: None):
    return run_rounds(jobs, real_images(), SETTINGS, stop=StopRequest() if stop is None else stop, listener=listener)


def stopping_after(reports):
    """A listener that asks to stop at so many reports."""
    numbers = itertools.count(1)
    return lambda *report: signal.raise_signal(signal.SIGTERM) if next(numbers) == reports else None


def same(first, second):
    return torch.equal(first.predictions, second.predictions) and first.losses == second.losses


@pytest.mark.slow
def test_rounds_side_by_side_give_the_results_of_rounds_alone():
    together = run([job(0), job(1), job(2)])
    alone = [run([job(index)])[0] for index in range(3)]
    assert all(map(same, together, alone))
    assert len({result.losses for result in together}) == 3  # each from weights of its own


def test_rounds_of_different_lengths_of_data_run_side_by_side():
    """A track 2 generator makes more images for one round than for another."""
    began = time.monotonic()
    together = run([job(0, images=4), job(1, images=20)])
    assert sum(result.seconds for result in together) <= time.monotonic() - began  # each counts its share
    assert all(map(same, together, [run([job(0, images=4)])[0], run([job(1, images=20)])[0]]))
    assert [result.images for result in together] == [4, 20]


@pytest.mark.slow
def test_a_signal_does_not_wait_for_the_end_of_an_epoch(tmp_path):
    """The state is kept between batches, here after each of 30 of the only epoch."""
    settings = RoundSettings("convnet", TrainingSettings(0, batch_size=8), seed=7)

    def run_one(stop, folder=None):
        one = job(0, folder, images=240)
        return run_rounds([one], real_images(), settings, stop=stop, listener=lambda *report: None)[0]

    def ask_when_there_is_a_state():
        for _ in range(20_000):
            if job(0, tmp_path).path.exists():
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)

    earlier = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # come too late, it would end the tests
    try:
        with pytest.raises(InterruptedRunError, match="after 0 epochs"), stop_requests() as stop:
            threading.Thread(target=ask_when_there_is_a_state, daemon=True).start()
            run_one(stop, tmp_path)
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert same(run_one(StopRequest(), tmp_path), run_one(StopRequest()))


@pytest.mark.slow
def test_interrupted_rounds_are_all_saved_and_each_continues_from_its_epoch(tmp_path):
    wanted = run([job(0), job(1)])
    # Round 0 is ahead when both go on together.
    for indices, epochs in (([0], 1), ([0, 1], 3)):
        with pytest.raises(InterruptedRunError, match="Run the same command again"), stop_requests() as stop:
            run([job(index, tmp_path) for index in indices], stop, stopping_after(epochs * len(indices)))
    seen = []
    results = run([job(0, tmp_path), job(1, tmp_path)], listener=lambda index, done, loss: seen.append((index, done)))
    assert seen == [(0, 5), (1, 4), (1, 5)]
    assert all(map(same, results, wanted))
    assert all(same(read_result(job(index, tmp_path).path), wanted[index]) for index in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "cuda_graph"])
def test_testing_on_a_gpu_waits_no_longer_for_more_batches(gpu, kind):
    network = build_network("convnet", 4, 16, seed=0).to("cuda").eval()
    engine = build_engine(network, EnginePlan(kind))

    def waits(images):
        gpu.reset()
        predict(
            engine,
            as_test_set(ImageSet(pixels(images, 1), torch.arange(images) % 4, tuple("abcd")), SPEC),
            torch.device("cuda"),
        )
        return gpu.waits_in_all

    waits(8)  # the constants stay on the GPU from now on
    assert waits(1000) == waits(300) <= 1  # for the predictions
