"""What a refinement will take and reach: nothing is kept, limits are counted as refinement counts them."""

import dataclasses

import pytest

from ddkit.distill.estimate import estimate_refinement, expected_accuracy
from ddkit.distill.generate import FromReal, generate
from ddkit.distill.refine import refine
from ddkit.distill.settings import ExpertSettings, PoolSettings, RefineLimits, RefineSettings, StudentSettings
from ddkit.errors import ComputeError
from ddkit.runtime import device

QUICK = RefineSettings(
    batch_real=4, val_every=3, val_epochs=1, held_out=0.2, dm_steps=2, pool=PoolSettings(size=2, from_step=5, from_share=0.5)
)


@pytest.fixture
def start(colors, tmp_path):
    return generate(colors, 2, FromReal("first"), tmp_path / "colors.pt").tensor


@pytest.mark.slow
def test_estimate_measures_every_kind_of_step_and_keeps_nothing(start):
    before = {path: path.read_bytes() for path in start.parent.glob("colors.*")}
    found = estimate_refinement(start, "colors", QUICK, RefineLimits(9))
    assert list(found.speed.per_step) == ["dm", "random networks", "pool"]
    dm, random, pool = found.speed.per_step.values()
    assert found.steps == 9 and found.seconds == pytest.approx(2 * dm + 3 * random + 4 * pool)
    assert found.accuracy is None and 0 < found.memory < found.free_memory
    assert {path: path.read_bytes() for path in start.parent.glob("colors.*")} == before


@pytest.mark.slow
def test_estimate_of_a_time_counts_the_steps_that_fit(start):
    found = estimate_refinement(start, "colors", QUICK, RefineLimits(seconds=20.0))
    assert 20 <= found.seconds < 20 + max(found.speed.per_step.values())
    assert found.steps > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"objective": "dm"}, ["dm"]),
        ({"dm_steps": 0, "pool": PoolSettings(size=0)}, ["random networks"]),
        ({"dm_steps": 0, "pool": PoolSettings(size=1, from_step=0)}, ["pool"]),
    ],
)
def test_estimate_measures_only_kinds_of_steps_that_occur(start, changes, kinds):
    found = estimate_refinement(start, "colors", dataclasses.replace(QUICK, **changes), RefineLimits(3))
    assert list(found.speed.per_step) == kinds and found.steps == 3


@pytest.mark.slow
def test_estimate_of_mtt_counts_the_experts_that_the_cache_lacks(start, own_cache, tmp_path):
    few = ExpertSettings(count=2, steps=4, batch_size=4, keep_every=1, span=2)
    settings = dataclasses.replace(QUICK, objective="mtt", experts=few, student=StudentSettings(steps=2))
    found = estimate_refinement(start, "colors", settings, RefineLimits(5))
    assert list(found.speed.per_step) == ["dm", "mtt"] and found.speed.experts > 0
    assert found.seconds == pytest.approx(2 * found.speed.per_step["dm"] + 3 * found.speed.per_step["mtt"])
    assert not (own_cache / "_experts").exists(), "a dry run keeps nothing"
    refine(start, "colors", settings, RefineLimits(3), tmp_path / "run")
    assert estimate_refinement(start, "colors", settings, RefineLimits(5)).speed.experts == 0


def test_expected_accuracy_rises_to_the_recorded_one_and_stays_there():
    found = [expected_accuracy("cifar100", 10, RefineSettings(), steps) for steps in (0, 100, 1000, 1792, 10**6)]
    assert found == sorted(found) and found[0] == 0.1689 and found[3] == found[4] == 0.3453
    assert 0.28 < found[2] < 0.34
    assert expected_accuracy("cifar100", 50, RefineSettings(), 100) is None


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"objective": "dm"}, False),
        ({"pool": PoolSettings(size=0)}, False),
        ({"learning_rate": 0.001}, False),
        ({"seed": 1, "precision": "float32", "val_every": 10, "val_epochs": 1, "val_margin": 0.0}, True),
    ],
)
def test_accuracy_is_expected_of_the_recorded_settings_only(changes, known):
    found = expected_accuracy("cifar100", 10, RefineSettings(**changes), 1792)
    assert found == (0.3453 if known else None)


def test_a_refinement_that_does_not_fit_into_memory_is_refused_before_anything_is_computed(start, tmp_path, monkeypatch):
    class Memory:
        available = 10_000

    monkeypatch.setattr(device.psutil, "virtual_memory", Memory)
    settings = dataclasses.replace(QUICK, objective="dm")
    with pytest.raises(ComputeError, match="Refining 4 images of colors needs about"):
        refine(start, "colors", settings, RefineLimits(1), tmp_path / "run")
    assert not (tmp_path / "run").exists()
