"""Expert trajectories are kept, belong to what they were trained on, and lead somewhere."""

import dataclasses
import os
import signal

import pytest
import torch

from ddkit.data.store import dataset_spec, load_dataset
from ddkit.distill.experts import Experts
from ddkit.distill.holdout import TrainHoldout
from ddkit.distill.settings import ExpertSettings
from ddkit.errors import InterruptedRunError, UsageError
from ddkit.evaluation.rounds import predict
from ddkit.network.autotune import choose_plan
from ddkit.network.engine import build_engine
from ddkit.network.networks import build_network
from ddkit.network.parameters import load_flat_parameters
from ddkit.runtime.interrupt import stop_requests

QUICK = ExpertSettings(count=2, steps=4, batch_size=4, keep_every=1, span=2)
CPU = torch.device("cpu")


@pytest.fixture
def holdout(colors):
    return TrainHoldout(load_dataset(colors, "train"), dataset_spec(colors), held_out=0.2, seed=0)


def experts(holdout, settings=QUICK, *, sha256="of-these", seed=0, told=None):
    progress = {} if told is None else {"progress": told.append}
    ours = Experts(holdout, sha256, settings, seed=seed, precision="float32", device=CPU, **progress)
    ours.prepare()
    assert ours.ready
    return ours


def files(own_cache):
    return sorted((own_cache / "_experts").rglob("*.safetensors"))


def test_experts_are_trained_once_and_found_in_the_cache(holdout, own_cache):
    first, told = experts(holdout), []
    written = {path: path.stat().st_mtime_ns for path in files(own_cache)}
    assert len(written) == 2
    again = experts(holdout, told=told)
    assert told == [] and {path: path.stat().st_mtime_ns for path in files(own_cache)} == written
    for seed in range(3):
        ours, theirs = (kept.sample_segment(torch.Generator().manual_seed(seed)) for kept in (first, again))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"sha256": "of-others"}, {"seed": 1}, {"settings": dataclasses.replace(QUICK, batch_size=5)}]
)
def test_experts_of_other_images_settings_or_seeds_are_trained_again(holdout, own_cache, changed):
    experts(holdout)
    experts(holdout, **changed)
    assert len(files(own_cache)) == 4


def test_experts_with_another_holdout_are_trained_again(holdout, colors, own_cache):
    experts(holdout)
    experts(TrainHoldout(load_dataset(colors, "train"), dataset_spec(colors), held_out=0.4, seed=0))
    assert len(files(own_cache)) == 4


def test_more_experts_or_longer_spans_reuse_those_in_the_cache(holdout, own_cache):
    experts(holdout)
    told = []
    experts(holdout, dataclasses.replace(QUICK, count=3, span=4), told=told)
    assert len(files(own_cache)) == 3
    assert [report.done for report in told] == [9, 10, 11, 12], "the third alone"


def test_experts_asked_to_stop_keep_the_finished_ones(holdout, own_cache):
    with pytest.raises(InterruptedRunError), stop_requests() as stop:

        def listen(report):
            if report.done == 5 and not stop:
                os.kill(os.getpid(), signal.SIGTERM)

        ours = Experts(holdout, "of-these", QUICK, seed=0, precision="float32", device=CPU, progress=listen)
        ours.prepare(stop)
        assert stop
        raise InterruptedRunError("as whoever asked for them does")
    assert not ours.ready and len(files(own_cache)) == 1
    ours.prepare()
    assert ours.ready and len(files(own_cache)) == 2


def test_only_a_damaged_expert_is_trained_again(holdout, own_cache):
    experts(holdout)
    whole, damaged = files(own_cache)
    before, kept = damaged.read_bytes(), whole.stat().st_mtime_ns
    damaged.write_bytes(before[:100])
    experts(holdout)
    assert damaged.read_bytes() == before and whole.stat().st_mtime_ns == kept


def test_segments_come_from_one_trajectory_and_have_the_length_of_the_span(holdout, own_cache):
    from safetensors.torch import load_file

    kept = experts(holdout)
    trajectories = [load_file(path)["parameters"] for path in files(own_cache)]
    assert all(
        trajectory.shape == (5, sum(p.numel() for p in build_network("convnet", 2, 16, seed=0).parameters()))
        for trajectory in trajectories
    )
    found = set()
    for seed in range(40):
        start, end = kept.sample_segment(torch.Generator().manual_seed(seed))
        (place,) = [
            (number, k) for number, trajectory in enumerate(trajectories) for k in range(3)
            if torch.equal(trajectory[k], start) and torch.equal(trajectory[k + 2], end)
        ]  # fmt: skip
        found.add(place)
    assert found == {(number, k) for number in range(2) for k in range(3)}


@pytest.mark.slow
def test_experts_learn_to_classify_held_out_images(letters):
    spec = dataset_spec(letters)
    real = TrainHoldout(load_dataset(letters, "train"), spec, held_out=0.1, seed=0)
    settings = ExpertSettings(count=1, steps=30, batch_size=32, keep_every=30, span=30)
    start, end = experts(real, settings).sample_segment(torch.Generator().manual_seed(0))
    accuracies = []
    for place in (start, end):
        network = build_network("convnet", 10, 32, seed=5).eval()
        load_flat_parameters(network, place)
        held_out = real.held_out()
        told = predict(build_engine(network, choose_plan(network, "float32", 64)), held_out, CPU)
        accuracies.append((told == held_out.labels).float().mean().item())
    assert accuracies[0] < 0.3 < 0.5 < accuracies[1]


@pytest.mark.parametrize("wrong", [{"count": 0}, {"learning_rate": 0.0}, {"span": 25}, {"steps": 995}, {"steps": 10}])
def test_wrong_settings_raise_usage_error(wrong):
    with pytest.raises(UsageError, match=r"ExpertSettings|longer than the experts"):
        ExpertSettings(**wrong)
