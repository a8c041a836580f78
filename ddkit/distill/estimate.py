"""The time, memory and accuracy to expect of a refinement, before it begins."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.prepare import open_dataset
from ddkit.data.store import ImageSet, train_sha256
from ddkit.distill.experts import Experts
from ddkit.distill.holdout import TrainHoldout
from ddkit.distill.refine import Refinement, memory_needed
from ddkit.distill.settings import PRESETS, RefineLimits, RefineSettings
from ddkit.distill.state import RefinementState
from ddkit.runtime.device import free_memory, resolve_device
from ddkit.runtime.interrupt import StopRequest
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.distilled import KIND_REFINED, read_provenance, read_set

_TRIALS = 2  # steps of each kind; the first also allocates memory and measures engines
_LONG_STEP = 10.0  # seconds; on a CPU the first step that is so long differs from the second by a few percent

# Settings and official accuracies (E = 1000), as (steps, fraction), by dataset and images per class;
# tools/results/refine.md, 2026-11-28. Step 0 is the first ten real images of each class. The refinement had a limit of time,
# so that its pool began at step 440; a limit of steps lets it begin at 800, of which no score is recorded.
_RECORDED = {("cifar100", 10): (PRESETS["track1"], ((0, 0.1689), (1792, 0.3453)))}
_MAY_DIFFER = ("seed", "precision", "val_every", "val_epochs", "val_margin")


@dataclass(frozen=True)
class RefineSpeed:
    """Seconds that parts of a refinement take on this machine.

    per_step: by kind of step, "dm", "random networks", "pool" and "mtt". per_epoch: of training a network on the set, as a
    validation and an evaluation do. per_test: of testing it on the held-out images. experts: of training all experts of
    "mtt" that the cache does not hold.
    """

    per_step: Mapping[str, float]
    per_epoch: float
    per_test: float
    experts: float = 0.0

    def validations(self, settings: RefineSettings, steps: int) -> float:
        """Seconds of all validations of a refinement of so many steps."""
        return (1 + math.ceil(steps / settings.val_every)) * ((settings.val_epochs + 1) * self.per_epoch + self.per_test)

    def within(self, limits: RefineLimits, settings: RefineSettings) -> tuple[int, float]:
        """Steps and seconds until the limit is reached, without validation."""
        step, seconds = 0, 0.0
        while limits.progress(step, seconds) < 1:
            kind = settings.objective_at(step)
            if kind == "frepo":
                kind = "pool" if settings.uses_pool_at(step, limits.time_used(seconds)) else "random networks"
            seconds += self.per_step[kind]
            step += 1
        return step, seconds


@dataclass(frozen=True)
class RefineEstimate:
    """The time and memory that a refinement will take.

    speed: the measured one. steps, seconds: in all, without validation and the training of experts.
    validation_seconds: of all validations. memory, free_memory: bytes. accuracy: expected at the official E, a fraction;
    None where no comparable refinement has been recorded.
    """

    speed: RefineSpeed
    steps: int
    seconds: float
    validation_seconds: float
    memory: int
    free_memory: int
    accuracy: float | None


def expected_accuracy(
    dataset: str, ipc: int, settings: RefineSettings, steps: int, *, start: Path | None = None
) -> float | None:
    """Official accuracy after `steps`, interpolated in the course of a recorded refinement; never more than its last one.

    start: the set that the refinement starts from; None for one that has not been refined.
    Returns None unless a refinement of that dataset, with as many images per class and the same settings, has been recorded;
    seed, precision and validation may differ. Returns None for a refined start as well: the recorded ones started from real
    images.
    """
    if (dataset, ipc) not in _RECORDED:
        return None
    recorded, curve = _RECORDED[dataset, ipc]
    if settings != dataclasses.replace(recorded, **{name: getattr(settings, name) for name in _MAY_DIFFER}):
        return None
    if start is not None and read_provenance(start).get("kind") == KIND_REFINED:
        return None
    for (begin, low), (end, high) in zip(curve, curve[1:], strict=False):
        if steps < end:
            # Accuracies rise with the logarithm of the steps.
            return low + (high - low) * math.log1p((steps - begin) / 100) / math.log1p((end - begin) / 100)
    return curve[-1][1]


def estimate_refinement(
    path: Path,
    dataset: str | None,
    settings: RefineSettings,
    limits: RefineLimits,
    *,
    device: str = "cpu",
    progress: Listener = ignore,
) -> RefineEstimate:
    """Try each kind of step and an epoch of validation for the set at `path`, of which nothing is kept.

    path: of the set that the refinement starts from, or has started from, as `original_set` finds it.
    Raises all that `refine` raises for the set and the device.
    """
    chosen, distilled = resolve_device(device), read_set(path, dataset)
    spec = distilled.spec
    real = open_dataset(spec.name, "train", progress=progress)
    needed, free = memory_needed(spec, distilled.ipc, settings, chosen), free_memory(chosen)
    needed += 0 if chosen.type == "cpu" else real.images.nbytes  # which move to the device first
    speed = measure_refinement(distilled.images, spec, real, settings, device=chosen, dataset_sha256=train_sha256(spec.name))
    steps, seconds = speed.within(limits, settings)
    accuracy = expected_accuracy(spec.name, distilled.ipc, settings, steps, start=path)
    return RefineEstimate(speed, steps, seconds, speed.validations(settings, steps), needed, free, accuracy)


def measure_refinement(
    images: Tensor,
    spec: DatasetSpec,
    real: ImageSet,
    settings: RefineSettings,
    *,
    device: torch.device,
    dataset_sha256: str = "",
) -> RefineSpeed:
    """Try each kind of step, an epoch of validation and a step of an expert, of which nothing is kept.

    images: (C * ipc, 3, S, S) float32, normalized. real: training images; made-up ones of the right shape take as long.
    dataset_sha256: hash of the real images, by which trained experts are found in the cache.
    """
    holdout = TrainHoldout(real, spec, held_out=settings.held_out, seed=settings.seed, device=device)
    kinds = {"dm": 0} if settings.dm_steps or settings.objective == "dm" else {}
    if settings.objective == "frepo":
        pool_begin = max(settings.dm_steps, settings.pool.from_step)
        if settings.pool.size == 0 or pool_begin > settings.dm_steps:
            kinds["random networks"] = settings.dm_steps
        if settings.pool.size:
            kinds["pool"] = pool_begin
    if settings.objective == "mtt":
        kinds["mtt"] = settings.dm_steps
    few = dataclasses.replace(settings.experts, count=1, steps=_TRIALS, keep_every=1, span=1)
    tried = dataclasses.replace(settings, val_epochs=_TRIALS, experts=few)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        state = RefinementState(
            Path(folder), dataclasses.asdict(tried), "", "", images, torch.zeros_like(images), images, images
        )
        with Refinement(state, images, tried, holdout, device, lambda report: times.append(time.monotonic())) as refinement:
            refinement.validate(StopRequest())
            epoch = times[-2] - times[-3]
            test = max(0.0, times[-1] - times[-2] - epoch)
            per_step, experts = {}, 0.0
            if settings.objective == "mtt":
                state.student_lr = settings.experts.learning_rate  # any will do
                refinement.prepare_mtt(StopRequest())
                real_experts = Experts(
                    holdout, dataset_sha256, settings.experts, seed=settings.seed, precision=state.precision, device=device
                )
                experts = (times[-1] - times[-2]) * real_experts.missing_steps
            for kind, step in kinds.items():
                for trial in range(_TRIALS):
                    state.step, state.seconds = step + trial, 0.0
                    refinement.take_step(RefineLimits(10**9))
                    if device.type == "cpu" and state.seconds > _LONG_STEP:
                        break
                per_step[kind] = state.seconds
    return RefineSpeed(per_step, epoch, test, experts)
