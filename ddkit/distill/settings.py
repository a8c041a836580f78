"""How a distilled set is refined, and when refinement stops."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ddkit.distill.experts import ExpertSettings
from ddkit.distill.pool import PoolSettings
from ddkit.distill.student import StudentSettings
from ddkit.errors import UsageError, did_you_mean, require_positive
from ddkit.network.plan import PRECISIONS

OBJECTIVES = {
    "dm": "distribution matching",
    "frepo": "neural feature regression with pooling",
    "mtt": "trajectory matching",
}


@dataclass(frozen=True)
class RefineSettings:
    """How a set is refined. All of it has to stay the same from one call to the next.

    objective: "dm", the squared distance between the mean features of a class's distilled and real images
        (arXiv 2110.04181); "frepo", the error on real images of kernel ridge regression fitted to the distilled images'
        features (arXiv 2206.00719); or "mtt", experimental, the distance between the parameters of a network trained
        on the set and those of one trained on real images (arXiv 2203.11932).
    dm_steps: steps of "dm" before another objective, which is slower at first.
    krr_lambda: ridge of the kernel regression, as a share of the kernel's mean diagonal.
    batch_real: real images of each class in a step.
    pool: the networks through which "frepo" computes features.
    learning_rate, momentum: of SGD on the pixels, in normalized space.
    final_rate: learning rate at the end of the limit, as a share of `learning_rate`; on the way it falls as a half
        cosine. 1 keeps it.
    spectrum: power of the real images' spectrum by which gradients are weighted, see `Spectrum`; 0 leaves them.
    ema: decay of the exponential moving average of the images, which is what is validated and written. 0 takes the
        images themselves.
    displayable: keep pixels within [0, 255], which the challenge does not ask for.
    precision: "float32", "bfloat16" or "auto", which takes bfloat16 where it measures faster.
    val_every: steps between two validations on held-out training images; the set that validates best is written.
    val_epochs: E of the training in a validation.
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
    val_epochs: int = 200
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
        for name in ("dm_steps", "val_epochs"):
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
        """Whether step number `step` may begin the pool. time_used: share of a limit of time, 0 without one."""
        late = step >= self.pool.from_step or time_used >= self.pool.from_share
        return self.objective_at(step) == "frepo" and self.pool.size > 0 and late

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> RefineSettings:
        """Settings from what `dataclasses.asdict` made of them."""
        parts = {"pool": PoolSettings, "experts": ExpertSettings, "student": StudentSettings}
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in recorded.items()})

    def with_changes(self, changes: Mapping[str, Any]) -> RefineSettings:
        """These settings with others by name, those of pool, experts and student as in "pool.size".

        Raises UsageError for an unknown name, a value of another type, and settings that do not fit together.
        """
        flat = flatten(dataclasses.asdict(self))
        for name, value in changes.items():
            if name not in flat:
                raise UsageError(f"Unknown setting '{name}'.", f"Known: {', '.join(flat)}.")
            kind = type(flat[name])
            if not isinstance(value, kind if kind is not float else (int, float)) or isinstance(value, bool) != (kind is bool):
                raise UsageError(f"The setting {name} is of type {kind.__name__}, and {value!r} is not.")
        nested: dict[str, Any] = {}
        for name, value in (flat | dict(changes)).items():
            outer, _, inner = name.rpartition(".")
            (nested.setdefault(outer, {}) if outer else nested)[inner] = value
        changed = RefineSettings.from_json(nested)
        changed._refuse_unused(changes)
        return changed

    def _refuse_unused(self, names: Collection[str]) -> None:
        """Raise UsageError where a setting was changed that has no effect with the others."""
        for name in names:
            part = name.partition(".")[0]
            wanted = "mtt" if part in ("experts", "student") else "frepo" if part in ("pool", "krr_lambda") else None
            if wanted not in (None, self.objective):
                raise UsageError(f"{name} applies to the objective {wanted}, not to {self.objective}.")
        if self.objective == "dm" and "dm_steps" in names:
            raise UsageError("dm_steps has no effect, as dm is the objective of every step.")
        if self.objective == "mtt" and self.dm_steps == 0 and "batch_real" in names:
            raise UsageError("batch_real applies to dm and frepo, and every step is of mtt.")


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names, such as "pool.size"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{inner}": kept for inner, kept in value.items()} if isinstance(value, dict) else {name: value}
    return flat


# What measured best for ten images a class at E = 1000, and distribution matching alone.
PRESETS = {"track1": RefineSettings(), "dm": RefineSettings(objective="dm")}


@dataclass(frozen=True)
class RefineLimits:
    """When refinement stops: after `steps` in all, or, where given, after `seconds` of work in all."""

    steps: int = 1200
    seconds: float | None = None

    def time_used(self, seconds: float) -> float:
        """The share of a limit of time that is used; 0 where the steps are limited."""
        return seconds / self.seconds if self.seconds is not None else 0.0

    def progress(self, step: int, seconds: float) -> float:
        """The share of the limit that is used, 1 or more where it is reached."""
        return seconds / self.seconds if self.seconds is not None else step / self.steps if self.steps else 1.0
