"""The settings of refinement, and its limits. Nothing here needs torch, so that help can show defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddkit.challenge import LEARNING_RATE
from ddkit.errors import UsageError, did_you_mean, require_positive
from ddkit.network.plan import PRECISIONS
from ddkit.runtime.records import flatten, override

OBJECTIVES = {
    "dm": "distribution matching",
    "frepo": "neural feature regression with pooling",
    "mtt": "trajectory matching",
}


@dataclass(frozen=True)
class ExpertSettings:
    """The training of experts: gradient descent without momentum at one learning rate.

    count: number of experts, each from another random network; a set that follows only a few does not lead towards others.
    steps, batch_size, learning_rate: of each training. A set teaches little more than the experts know at their end, so
        that they have to come far; with larger rates, smaller batches or shorter segments more of a segment is noise.
    keep_every: steps between two saved checkpoints.
    span: steps of a segment, which a student has to match.
    """

    count: int = 8
    steps: int = 2100
    batch_size: int = 256
    learning_rate: float = 0.03
    keep_every: int = 50
    span: int = 150

    def __post_init__(self) -> None:
        require_positive(self, "count", "steps", "batch_size", "learning_rate", "keep_every", "span")
        if self.span % self.keep_every or self.steps % self.keep_every:
            raise UsageError(f"ExpertSettings.steps and span must be multiples of keep_every, {self.keep_every}.")
        if self.span > self.steps:
            raise UsageError(f"ExpertSettings.span, {self.span} steps, is longer than the experts' {self.steps} steps.")


@dataclass(frozen=True)
class PoolSettings:
    """The online pool.

    size: number of networks; 0 for none, so that every step uses a random network.
    updates: training steps of a network each time it is used.
    max_age: training steps after which a network is replaced by a random one. The first ages are staggered.
    from_step: step from which the pool is used; random networks are used before.
    from_share: where the time is limited, not the steps, share of the time after which the pool is used, if that is
        before from_step.
    learning_rate: of the networks; the challenge's.
    """

    size: int = 10
    updates: int = 2
    max_age: int = 200
    from_step: int = 800
    from_share: float = 0.4
    learning_rate: float = LEARNING_RATE

    def __post_init__(self) -> None:
        require_positive(self, "updates", "max_age", "learning_rate")
        if self.size < 0 or self.from_step < 0:
            raise UsageError("PoolSettings.size and from_step must not be negative.")
        if not 0 < self.from_share <= 1:
            raise UsageError(f"PoolSettings.from_share must be above 0 and at most 1, got {self.from_share}.")


@dataclass(frozen=True)
class StudentSettings:
    """The training of a student on the set.

    steps: in which it has to match a segment of an expert's trajectory. images_per_class: in each step.
    lr_momentum: share by which its learning rate moves, after each match, towards the one that would have matched best.
    """

    steps: int = 20
    images_per_class: int = 1
    lr_momentum: float = 0.05

    def __post_init__(self) -> None:
        require_positive(self, "steps", "images_per_class")
        if not 0 < self.lr_momentum <= 1:
            raise UsageError(f"StudentSettings.lr_momentum must be above 0 and at most 1, got {self.lr_momentum}.")


@dataclass(frozen=True)
class RefineSettings:
    """The settings of a refinement, which must be the same in every call that resumes it.

    objective: "dm", the squared distance between the mean features of a class's distilled and real images
        (arXiv 2110.04181); "frepo", the error on real images of kernel ridge regression fitted to the distilled images'
        features (arXiv 2206.00719); or "mtt", experimental, the distance between the parameters of a network trained
        on the set and those of one trained on real images (arXiv 2203.11932).
    dm_steps: steps of "dm" before another objective, which is slower at first.
    krr_lambda: ridge of the kernel regression, as a share of the kernel's mean diagonal.
    batch_real: real images of each class in a step.
    pool: the networks through which "frepo" computes features.
    learning_rate, momentum: of SGD on the pixels, in normalized space.
    final_rate: learning rate at the end of the limit, as a share of `learning_rate`; it falls as a half
        cosine. 1 keeps it constant.
    spectrum: power of the real images' spectrum by which gradients are weighted, see `Spectrum`; 0 leaves them.
    ema: decay of the exponential moving average of the images, which is validated and written. 0 takes the
        images themselves.
    displayable: keep pixels within [0, 255], which the challenge does not ask for.
    precision: of steps and validations: "float32", "bfloat16" or "auto", which takes the faster of the two on a CPU and
        float32 on other devices.
    val_every: steps between two validations on held-out training images.
    val_epochs: E of the training in a validation; 100 and less rank sets otherwise than the official E does.
    val_margin: the latest set is written that validates no worse than the original, and worse than the best by at most
        this, a fraction. A small E does not show all that later steps bring at the official one.
    held_out: share of each class's training images that is held out.
    experts, student: of "mtt".
    """

    objective: str = "frepo"
    dm_steps: int = 100
    krr_lambda: float = 0.2
    batch_real: int = 32
    pool: PoolSettings = field(default_factory=PoolSettings)
    learning_rate: float = 6.0
    momentum: float = 0.5
    final_rate: float = 1.0
    spectrum: float = 0.25
    ema: float = 0.99
    displayable: bool = False
    precision: str = "auto"
    val_every: int = 500
    val_epochs: int = 300
    val_margin: float = 0.01
    held_out: float = 0.1
    seed: int = 0
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    student: StudentSettings = field(default_factory=StudentSettings)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            hint = did_you_mean(self.objective, tuple(OBJECTIVES))
            raise UsageError(f"Unknown objective '{self.objective}'.", hint)
        if self.precision not in ("auto", *PRECISIONS):
            raise UsageError(f"Unknown precision '{self.precision}'.", f"Known: auto, {', '.join(PRECISIONS)}.")
        require_positive(self, "krr_lambda", "batch_real", "learning_rate", "val_every")
        for name in ("dm_steps", "val_epochs", "val_margin"):
            if getattr(self, name) < 0:
                raise UsageError(f"RefineSettings.{name} must not be negative, got {getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise UsageError(f"RefineSettings.held_out must lie between 0 and 1, got {self.held_out}.")
        if not 0 < self.final_rate <= 1:
            raise UsageError(f"RefineSettings.final_rate must be above 0 and at most 1, got {self.final_rate}.")
        if not 0 <= self.spectrum <= 1:
            raise UsageError(f"RefineSettings.spectrum must be from 0 to 1, got {self.spectrum}.")
        for name in ("ema", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"RefineSettings.{name} must be at least 0 and below 1, got {getattr(self, name)}.")

    def objective_at(self, step: int) -> str:
        """The objective of step number `step`, counted from 0."""
        return "dm" if step < self.dm_steps else self.objective

    def uses_pool_at(self, step: int, time_used: float) -> bool:
        """True if step number `step` may begin the pool. time_used: share of a limit of time, 0 without one."""
        late = step >= self.pool.from_step or time_used >= self.pool.from_share
        return self.objective_at(step) == "frepo" and self.pool.size > 0 and late

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Names of the settings that change nothing with the others as they are."""
        if self.objective == "dm":
            return ("dm_steps", "krr_lambda", "pool", "experts", "student")
        if self.objective == "frepo":
            return ("experts", "student")
        return ("krr_lambda", "pool") if self.dm_steps else ("krr_lambda", "pool", "batch_real")

    def with_changes(self, changes: Mapping[str, Any]) -> RefineSettings:
        """These settings with others by name, those of pool, experts and student as in "pool.size".

        Raises UsageError for an unknown name, a value of another type, a change without effect, and settings that do not fit
        together.
        """
        flat = flatten(dataclasses.asdict(self))
        for name, value in changes.items():
            if name not in flat:
                raise UsageError(f"Unknown setting '{name}'.", f"Known: {', '.join(flat)}.")
            kind = type(flat[name])
            if not isinstance(value, kind if kind is not float else (int, float)) or isinstance(value, bool) != (kind is bool):
                raise UsageError(f"The setting {name} must be of type {kind.__name__}, got {value!r}.")
        changed = override(self, changes)
        if idle := [name for name in changes if name.partition(".")[0] in changed.without_effect]:
            raise UsageError(f"{idle[0]} has no effect on the objective {changed.objective}.", "Leave it out.")
        return changed


# What measured best for ten images a class at E = 1000, and distribution matching alone.
PRESETS = {"track1": RefineSettings(), "dm": RefineSettings(objective="dm")}


@dataclass(frozen=True)
class RefineLimits:
    """When refinement stops: after `steps` in all, or, where given, after `seconds` of work in all.

    Raises UsageError for negative numbers.
    """

    steps: int = 1200
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "seconds"):
            if not (getattr(self, name) or 0) >= 0:
                raise UsageError(f"RefineLimits.{name} must not be negative, got {getattr(self, name)}.")

    def time_used(self, seconds: float) -> float:
        """The share of a limit of time that is used; 0 where the steps are limited."""
        return self.progress(0, seconds) if self.seconds is not None else 0.0

    def progress(self, step: int, seconds: float) -> float:
        """The share of the limit that is used, 1 or more where it is reached."""
        used, limit = (step, self.steps) if self.seconds is None else (seconds, self.seconds)
        return used / limit if limit else 1.0
