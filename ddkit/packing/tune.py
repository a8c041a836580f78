"""Fewer sampling steps buy more images within a time budget: which of both counts more, found out by trying.

Each point of a small grid of steps x guidance runs the very entry that would be packed for the same budget, and
networks are trained on what it made, in fewer epochs than the protocol's.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddkit.errors import BadFileError, MissingDataError, UsageError
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, evaluate_generator
from ddkit.evaluation.reference import TestSet
from ddkit.evaluation.timed_script import ScriptEntry
from ddkit.generator.model_folder import model_hash
from ddkit.packing.bundle import SCRIPT, EntryModel, build_folder
from ddkit.results import Scores
from ddkit.runtime.device import describe_device, resolve_device
from ddkit.runtime.files import atomic_write
from ddkit.runtime.jsonl import append_line, read_lines
from ddkit.runtime.progress import Listener, ignore
from ddkit.statistics import Comparison, compare


@dataclass(frozen=True)
class Grid:
    """What to try, and how hard: `evaluation` is of track 2, and its time budget the same for every point."""

    steps: tuple[int, ...] = (4, 8, 16)
    guidance: tuple[float, ...] = (1.0, 2.0)
    evaluation: EvaluationSettings = field(
        default_factory=lambda: EvaluationSettings(track=2, rounds=2, epochs_setting=20, time_budget=60.0)
    )

    def __post_init__(self) -> None:
        if not self.steps or not self.guidance or min(self.steps) < 1 or min(self.guidance) < 0:
            raise UsageError("A grid needs at least one number of steps, from 1 on, and one guidance, from 0 on.")
        if self.evaluation.track != 2:
            raise UsageError("Only track 2 has a time budget to trade in.")

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(steps, guidance) of each trial."""
        return tuple((steps, guidance) for steps in self.steps for guidance in self.guidance)


@dataclass(frozen=True)
class Trial(Scores):
    """A point that was tried. images, seconds, accuracies: of each round; seconds are the generator's."""

    dataset: str
    model_sha256: str
    sampler: str
    steps: int
    guidance: float
    budget: float
    epochs_setting: int
    seed: int
    device: str
    images: tuple[int, ...]
    seconds: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What trials must share for their accuracies to be comparable."""
        return (self.dataset, self.model_sha256, self.sampler, self.budget, self.epochs_setting, self.seed, self.device,
                len(self.accuracies))  # fmt: skip


def explore(
    model: EntryModel,
    test_set: TestSet,
    grid: Grid,
    records: Path,
    *,
    state: StateFolder | None = None,
    progress: Listener = ignore,
) -> tuple[Trial, ...]:
    """Try every point of the grid with a model; returns their trials in the grid's order.

    records: a file of JSON lines to which each trial is appended as it ends; those that are there are not repeated.
    state: where an interrupted trial is kept. Raises what `build_folder` and `evaluate_generator` raise.
    """
    found = {(*trial.conditions, trial.steps, trial.guidance): trial for trial in read_trials(records)}
    trials = []
    with tempfile.TemporaryDirectory(prefix="ddkit-tune-") as temporary:
        script = build_folder([model], Path(temporary) / "bundle") / SCRIPT
        for steps, guidance in grid.points:
            wanted = _trial(model, steps, guidance, grid.evaluation)
            key = (*wanted.conditions, steps, guidance)
            if key not in found:
                found[key] = _try(wanted, script, test_set, grid.evaluation, state, progress)
                _append(found[key], records)
            trials.append(found[key])
    if (last := read_trials(records)[-1:]) and last[0].conditions != trials[-1].conditions:
        for trial in trials:  # said again, as those that were asked for last are what `tuned` goes by
            _append(trial, records)
    return tuple(trials)


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest mean accuracy; of several, the one that needs the fewest steps."""
    return max(trials, key=lambda trial: (trial.mean, -trial.steps))


def lead(trials: Sequence[Trial]) -> Comparison | None:
    """How the best compares with the second best, round by round; None where there is no second or one round only."""
    best = best_of(trials)
    others = [trial for trial in trials if trial is not best]
    if not others or len(best.accuracies) < 2:
        return None
    return compare(best.accuracies, best_of(others).accuracies, paired=True)


def tuned(model: EntryModel, records: Path) -> EntryModel:
    """The model with the best settings of the trials that were made last with it. Raises MissingDataError without any."""
    sha256 = model_hash(model.folder)
    ours = [trial for trial in read_trials(records) if trial.model_sha256 == sha256]
    if not ours:
        raise MissingDataError(
            f"{records} holds no trials with the model in {model.folder}.", f"Make them: ddkit tune {model.dataset}"
        )
    best = best_of([trial for trial in ours if trial.conditions == ours[-1].conditions])
    settings = model.settings
    sampling = replace(settings.sampling, sampler=best.sampler, steps=best.steps, guidance=best.guidance)
    return replace(model, settings=replace(settings, sampling=sampling))


def read_trials(records: Path) -> list[Trial]:
    """The trials in a file, oldest first; empty where there is none. A line cut short by a kill is left out."""
    trials = []
    for number, values in read_lines(records):
        try:
            trials.append(_trial_from_json(values))
        except (TypeError, AttributeError, ValueError) as error:
            raise BadFileError(f"{records}, line {number}, is no trial of ddkit tune.", "Give another file.") from error
    return trials


def _trial_from_json(values: Any) -> Trial:
    """Raises TypeError, AttributeError or ValueError for what is no trial."""
    trial = Trial(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    numbers = (trial.steps, trial.guidance, trial.budget, trial.epochs_setting, *trial.accuracies, *trial.images)
    if not trial.accuracies or not all(type(number) in (int, float) for number in numbers):
        raise ValueError("no numbers where there should be some")
    return trial


def draw_chart(trials: Sequence[Trial], path: Path) -> None:
    """Write a PNG: accuracy and images made over the steps, a line for each guidance. Raises BadFileError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    accuracy, images = figure.subplots(1, 2)
    for guidance in sorted({trial.guidance for trial in trials}):
        line = sorted((trial for trial in trials if trial.guidance == guidance), key=lambda trial: trial.steps)
        steps = [trial.steps for trial in line]
        accuracy.errorbar(
            steps, [100 * trial.mean for trial in line], yerr=[100 * (trial.std or 0.0) for trial in line],
            marker="o", markersize=3, capsize=2, label=f"guidance {guidance:g}",
        )  # fmt: skip
        images.plot(steps, [sum(trial.images) / len(trial.images) for trial in line], marker="o", markersize=3)
    first = trials[0]
    accuracy.set_title(f"{first.dataset}: accuracy %, E = {first.epochs_setting} (not official)", fontsize=9)
    images.set_title(f"images made in {first.budget:g} s", fontsize=9)
    for axes in (accuracy, images):
        axes.set_xlabel("sampling steps")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({trial.steps for trial in trials}), sorted({trial.steps for trial in trials}))
    images.set_ylim(bottom=0)
    accuracy.legend(fontsize=8)
    with atomic_write(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def _trial(model: EntryModel, steps: int, guidance: float, evaluation: EvaluationSettings) -> Trial:
    """A trial that has not run; its accuracies are as many as there will be."""
    rounds = evaluation.number_of_rounds
    return Trial(
        model.dataset,
        model_hash(model.folder),
        model.settings.sampling.sampler,
        steps,
        guidance,
        float(evaluation.budget or 0.0),
        evaluation.training.epochs_setting,
        evaluation.seed,
        describe_device(resolve_device(evaluation.device)),
        images=(),
        seconds=(),
        accuracies=(0.0,) * rounds,
    )


def _try(
    trial: Trial,
    script: Path,
    test_set: TestSet,
    settings: EvaluationSettings,
    state: StateFolder | None,
    progress: Listener,
) -> Trial:
    arguments = ["--steps", str(trial.steps), "--guidance", f"{trial.guidance:g}"]
    if settings.device != "auto":
        arguments += ["--device", settings.device]
    entry = ScriptEntry(script, trial.dataset, tuple(arguments), progress=progress)
    name = f"tune/{trial.model_sha256}/{trial.sampler}/{trial.steps}/{trial.guidance:g}"
    outcome = evaluate_generator(entry, test_set, settings, name=name, state=state, progress=progress)
    return replace(
        trial,
        images=outcome.generated,
        seconds=outcome.generation_seconds,
        accuracies=outcome.accuracies,
    )


def _append(trial: Trial, records: Path) -> None:
    append_line(records, dataclasses.asdict(trial))
