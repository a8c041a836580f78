"""Search for the settings of a track 2 bundle by successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943).

Fewer sampling steps make more images within the time budget, and worse ones; guidance trades variety for clarity; mode
guidance brings samples nearer to the real images of their class; and a bundle may stop at fewer images, or keep a share
of them. Every candidate runs the very script that would be packed, for the same time budget, and networks are trained
on what it makes and tested on held-out training images. The better half of the candidates is tried again with twice the
epochs, until two are left, which are compared in the full number of rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddkit.data.prepare import open_dataset
from ddkit.data.store import dataset_spec
from ddkit.distill.holdout import TrainHoldout
from ddkit.errors import BadFileError, MissingDataError, UsageError, counted
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, evaluate_generator
from ddkit.evaluation.test_sets import TestSet
from ddkit.evaluation.timed_script import ScriptEntry
from ddkit.generator.config import BUNDLE_KEEP, require_share
from ddkit.generator.model_facts import model_hash, read_facts, require_label_dropout
from ddkit.packing.bundle import SCRIPT, BundleModel, build_folder
from ddkit.results import Scores
from ddkit.runtime.device import describe_device, resolve_device
from ddkit.runtime.files import atomic_write
from ddkit.runtime.hub import source_name
from ddkit.runtime.jsonl import append_line, read_lines
from ddkit.runtime.progress import Listener, ignore, span_text
from ddkit.runtime.records import read_record
from ddkit.statistics import compare

_FINALISTS = 2  # candidates of the last stage
_HELD_OUT = 0.1  # share of each class's training images, as in `ddkit.distill.settings`


@dataclass(frozen=True)
class Candidate:
    """Settings to try.

    images_per_class: number at which the bundle stops; None for as many as the time allows. keep: share of the images that
    are kept, labeled by the bundle's classifier; 1 keeps all as they were sampled. mode_guidance: its scale; 0 for none.
    """

    steps: int
    guidance: float
    images_per_class: int | None = None
    keep: float = 1.0
    mode_guidance: float = 0.0

    def __str__(self) -> str:
        """The settings in words, such as "8 steps, guidance 2, 50 images a class, the most confident 50 %"."""
        steps = f"{counted(self.steps, 'step', 'steps')}, " if self.steps else ""
        count = "" if self.images_per_class is None else f", {counted(self.images_per_class, 'image', 'images')} a class"
        kept = "" if self.keep == 1 else f", the most confident {100 * self.keep:g} %"
        modes = f", mode guidance {self.mode_guidance:g}" if self.mode_guidance else ""
        return f"{steps}guidance {self.guidance:g}{modes}{count}{kept}"


@dataclass(frozen=True)
class Search:
    """The values to try, and the effort.

    evaluation: how the last candidates are evaluated, on track 2; its time budget is the same for every trial.
    Raises UsageError for values that make no sense.
    """

    steps: tuple[int, ...] = (5, 10)
    guidance: tuple[float, ...] = (1.0, 2.0)
    images_per_class: tuple[int | None, ...] = (None,)
    keep: tuple[float, ...] = (1.0, BUNDLE_KEEP)
    mode_guidance: tuple[float, ...] = (0.0,)
    evaluation: EvaluationSettings = field(
        default_factory=lambda: EvaluationSettings(track=2, rounds=2, epochs_setting=20, time_budget=60.0)
    )

    def __post_init__(self) -> None:
        counts = [count for count in self.images_per_class if count is not None]
        if not self.candidates or min((*self.steps, *counts)) < 1 or min((*self.guidance, *self.mode_guidance)) < 0:
            raise UsageError("A search needs steps and images per class of 1 or more, and guidance of 0 or more.")
        for share in self.keep:
            require_share("keep", share)
        if self.evaluation.track != 2:
            raise UsageError("Only track 2 has a time budget to search within.")

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every combination of the values, each once."""
        combined = itertools.product(self.steps, self.guidance, self.images_per_class, self.keep, self.mode_guidance)
        return tuple(dict.fromkeys(Candidate(*values) for values in combined))

    @property
    def stages(self) -> tuple[tuple[int, EvaluationSettings], ...]:
        """The number of candidates of each stage, and the settings of their evaluation. All but the last train one round."""
        counts = [len(self.candidates)]
        while counts[-1] > _FINALISTS:
            counts.append(max(_FINALISTS, -(-counts[-1] // 2)))
        epochs = self.evaluation.training.epochs_setting
        earlier = (
            replace(self.evaluation, rounds=1, epochs_setting=epochs >> (len(counts) - 1 - stage))
            for stage in range(len(counts) - 1)
        )
        return tuple(zip(counts, (*earlier, self.evaluation), strict=True))

    @property
    def longest_generation(self) -> float:
        """Seconds that the generator runs in all trials together, at most."""
        return sum(count * settings.number_of_rounds * (settings.budget or 0.0) for count, settings in self.stages)


@dataclass(frozen=True)
class Trial(Scores):
    """A candidate that was tried. images, seconds, accuracies: of each round; the seconds are the generator's.

    trials_left: how many its search still had to make, by which an unfinished one is known.
    """

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
    images_per_class: int | None
    precision: str
    keep: float
    mode_guidance: float
    trials_left: int = field(default=0, compare=False)

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.steps, self.guidance, self.images_per_class, self.keep, self.mode_guidance)

    @property
    def conditions(self) -> tuple[Any, ...]:
        """The values that trials must share for their accuracies to be comparable."""
        return (self.dataset, self.model_sha256, self.sampler, self.precision, self.budget, self.epochs_setting, self.seed,
                self.device, len(self.accuracies))  # fmt: skip


def run_search(
    model: BundleModel,
    test_set: TestSet,
    search: Search,
    records: Path,
    *,
    state: StateFolder | None = None,
    progress: Listener = ignore,
    on_trial: Callable[[Trial], object] | None = None,
) -> tuple[Trial, ...]:
    """Try the candidates by successive halving; returns the trials of the last stage, in the candidates' order.

    records: a file of JSON lines to which each trial is appended as it ends; a trial that is there is not repeated.
    state: where an interrupted trial is saved. on_trial: called with each trial as it is known.
    Raises what `build_folder` and `evaluate_generator` raise.
    """
    known = {(trial.conditions, trial.candidate): trial for trial in read_trials(records)}
    candidates = list(search.candidates)
    left = sum(count for count, _ in search.stages)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="ddkit-tune-") as temporary:
        sampling = replace(model.settings.sampling, mode_guidance=max(search.mode_guidance))  # so that it has the modes
        packed = replace(model.settings, sampling=sampling, keep=1.0, classifier=min(search.keep) < 1)
        bundled = replace(model, settings=packed)
        script = build_folder([bundled], Path(temporary) / "bundle", progress=progress) / SCRIPT
        for count, settings in search.stages:
            if trials:
                best = sorted(trials, key=_rank)[:count]
                candidates = [trial.candidate for trial in trials if trial in best]
            trials = []
            for candidate in candidates:
                left -= 1
                wanted = replace(_planned(model, candidate, settings), trials_left=left)
                trial = known.get((wanted.conditions, candidate))
                if trial is None:
                    trial = _try(wanted, script, test_set, settings, state, progress)
                    _append(trial, records)
                trials.append(trial)
                if on_trial:
                    on_trial(trial)
    last = read_trials(records)[-1]
    if last.conditions != trials[-1].conditions or last.trials_left:
        for trial in trials:  # appended again, because `with_best_settings` goes by the last one
            _append(replace(trial, trials_left=0), records)
    return tuple(trials)


def tune(
    model: BundleModel,
    search: Search,
    folder: Path,
    *,
    state: StateFolder | None = None,
    progress: Listener = ignore,
    on_event: Callable[[str], object] = lambda text: None,
) -> tuple[Trial, ...]:
    """Search as `run_search` does on held-out training images, and draw a chart; returns the last stage's trials.

    The test images are never used, so that the score of the bundle on them tells the truth. The generator, and the bundle's
    classifier where a share is kept, were trained on the held-out images as well, and with mode guidance samples are steered
    to them: the accuracies are not those on images that nothing has seen, serve to compare the candidates only, and flatter
    those that stay near the real images.
    folder: gets <dataset>.jsonl with the trials, and <dataset>.png. on_event: called with a sentence at the beginning and
    on each trial. Raises UsageError for an unknown dataset, a class of a single training image or guidance of a model that
    was trained without label dropout, MissingModelError if there is no model, and what `open_dataset` and `run_search` raise.
    """
    spec = dataset_spec(model.dataset)
    facts = read_facts(model.folder, dataset=model.dataset)  # a missing model is reported before anything is downloaded
    for guidance in search.guidance:
        require_label_dropout(facts, guidance)
    stages = counted(len(search.stages), "stage", "stages")
    on_event(
        f"Trying {counted(len(search.candidates), 'candidate', 'candidates')} for {source_name(model.folder)} in {stages}: "
        f"generating takes {span_text(search.longest_generation)} at most, and training takes additional time."
    )
    real = open_dataset(model.dataset, "train", progress=progress)
    test_set = TrainHoldout(real, spec, held_out=_HELD_OUT, seed=0).held_out()
    tried: list[Trial] = []

    def on_trial(trial: Trial) -> None:
        tried.append(trial)
        on_event(f"{trial.candidate}: {100 * trial.mean:.2f} % at E = {trial.epochs_setting}.")

    records = folder / f"{model.dataset}.jsonl"
    trials = run_search(model, test_set, search, records, state=state, progress=progress, on_trial=on_trial)
    first_stage = [trial for trial in tried if trial.conditions == tried[0].conditions]  # it has all candidates
    draw_chart(first_stage, folder / f"{model.dataset}.png")
    return trials


def _rank(trial: Trial) -> tuple[float, int]:
    return -trial.mean, trial.steps


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest mean accuracy; of equal ones, the one with the fewest steps."""
    return min(trials, key=_rank)


def evidence(trials: Sequence[Trial]) -> str:
    """A sentence on whether the best of the last stage is clearly better than the next."""
    best = best_of(trials)
    others = [trial for trial in trials if trial is not best]
    if not others:
        return "Nothing else was tried."
    if best.rounds < 2:
        return "A single round does not show how much of a difference is noise."
    comparison = compare(best.accuracies, best_of(others).accuracies, paired=True)
    points, half = 100 * comparison.difference, comparison.half_width
    if half is None:
        better = f"It is {points:.2f} points better than the next" if points >= 0.005 else "It is as good as the next"
        found = f"{better} in every round: the difference does not vary, so no interval can be given."
    else:
        verdict = "exceeds the noise" if comparison.exceeds_noise else "does not exceed the noise; try more --rounds"
        found = f"It is {points:.2f} ± {100 * half:.2f} points (95 %) better than the next, which {verdict}."
    return f"{found} E = {trials[0].epochs_setting}, not official."


def with_best_settings(
    model: BundleModel, records: Path, *, on_event: Callable[[str], object] = lambda text: None
) -> BundleModel:
    """The model with the best settings of the last search with it.

    on_event: called with a sentence if that search is unfinished, so that they are only the best so far.
    Raises MissingDataError if there was none.
    """
    sha256 = model_hash(model.folder)
    ours = [trial for trial in read_trials(records) if trial.model_sha256 == sha256]
    if not ours:
        raise MissingDataError(
            f"{records} has no trials of the model in {model.folder}.", f"Make them: ddkit tune {model.dataset}"
        )
    if left := ours[-1].trials_left:
        on_event(
            f"The search for {model.dataset} is unfinished, with {counted(left, 'trial', 'trials')} left: the best settings so "
            "far are taken. Run the same ddkit tune again to finish it."
        )
    best = best_of([trial for trial in ours if trial.conditions == ours[-1].conditions])
    sampling = replace(
        model.settings.sampling,
        sampler=best.sampler,
        steps=best.steps,
        guidance=best.guidance,
        mode_guidance=best.mode_guidance,
        precision=best.precision,
    )
    settings = replace(model.settings, sampling=sampling, images_per_class=best.images_per_class, keep=best.keep)
    return replace(model, settings=settings)


def read_trials(records: Path) -> list[Trial]:
    """The trials in a file, oldest first; none if there is no file.

    Lines that a kill cut short are left out, and trials of other versions, which other bundles made or which were judged on
    test images.
    """
    trials = []
    for _, values in read_lines(records):
        with contextlib.suppress(BadFileError):
            trials.append(read_record(Trial, values))
    return trials


def draw_chart(trials: Sequence[Trial], path: Path) -> None:
    """Write a PNG of accuracy and number of images over the steps, a line for each choice of the rest. Raises BadFileError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    accuracy, images = figure.subplots(1, 2)
    kinds = sorted({replace(trial.candidate, steps=0) for trial in trials}, key=str)
    for kind in kinds:
        line = sorted((t for t in trials if replace(t.candidate, steps=0) == kind), key=lambda trial: trial.steps)
        steps = [trial.steps for trial in line]
        accuracy.errorbar(
            steps, [100 * trial.mean for trial in line], yerr=[100 * (trial.std or 0.0) for trial in line],
            marker="o", markersize=3, capsize=2, label=str(kind),
        )  # fmt: skip
        images.plot(steps, [sum(trial.images) / len(trial.images) for trial in line], marker="o", markersize=3)
    first = trials[0]
    accuracy.set_title(f"{first.dataset}: held-out accuracy %, E = {first.epochs_setting} (not official)", fontsize=9)
    images.set_title(f"images made in {first.budget:g} s", fontsize=9)
    for axes in (accuracy, images):
        axes.set_xlabel("sampling steps")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({trial.steps for trial in trials}), sorted({trial.steps for trial in trials}))
    images.set_ylim(bottom=0)
    accuracy.legend(fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _planned(model: BundleModel, candidate: Candidate, settings: EvaluationSettings) -> Trial:
    """A trial that has not run; it has as many accuracies as there will be."""
    sampling = model.settings.sampling
    return Trial(
        model.dataset,
        model_hash(model.folder),
        sampling.sampler,
        candidate.steps,
        candidate.guidance,
        float(settings.budget or 0.0),
        settings.training.epochs_setting,
        settings.seed,
        describe_device(resolve_device(settings.device)),
        images=(),
        seconds=(),
        accuracies=(0.0,) * settings.number_of_rounds,
        images_per_class=candidate.images_per_class,
        keep=candidate.keep,
        precision=sampling.precision,
        mode_guidance=candidate.mode_guidance,
    )


def _try(
    trial: Trial,
    script: Path,
    test_set: TestSet,
    settings: EvaluationSettings,
    state: StateFolder | None,
    progress: Listener,
) -> Trial:
    values = {"--guidance": trial.guidance, "--mode-guidance": trial.mode_guidance, "--keep": trial.keep}
    arguments = ["--steps", str(trial.steps), "--pixels"]
    for name, value in values.items():
        arguments += [name, f"{value:g}"]
    if trial.images_per_class is not None:
        arguments += ["--most", str(trial.images_per_class * test_set.spec.num_classes)]
    if settings.device != "auto":
        arguments += ["--device", settings.device]
    early = trial.images_per_class is not None
    generator = ScriptEntry(script, trial.dataset, tuple(arguments), may_end_early=early, progress=progress)
    candidate = "/".join(f"{name}={value:g}" for name, value in vars(trial.candidate).items() if value is not None)
    name = f"tune/{trial.model_sha256}/{trial.sampler}/{trial.precision}/{candidate}"
    outcome = evaluate_generator(generator, test_set, settings, name=name, state=state, progress=progress)
    return replace(
        trial,
        images=outcome.generated,
        seconds=outcome.generation_seconds,
        accuracies=outcome.accuracies,
    )


def _append(trial: Trial, records: Path) -> None:
    append_line(records, dataclasses.asdict(trial))
