"""`ddkit evaluate`: score sets as the challenge does."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ddkit.cli._options import (
    ENTRY_FILE,
    RUNS_FOLDER,
    SUBMISSION_FOLDER,
    Duration,
    FindingCode,
    device_option,
    example,
    output_options,
    results_option,
    seed_option,
)
from ddkit.cli._output import Output
from ddkit.cli._rankings import rankings_table
from ddkit.errors import BadFileError, MissingDataError, UsageError
from ddkit.network.plan import PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor

    from ddkit.challenge import DatasetSpec
    from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
    from ddkit.evaluation.reference import TestSet
    from ddkit.metrics.ddranking import MissingEvaluation, Ranking
    from ddkit.results import Records, Result
    from ddkit.statistics import Comparison

_REFERENCE_KINDS = ("random-real", "first-real", "full-real")  # what results are held against, as the JSON beside a set says
_MOST_ROUNDS_SHOWN = 5


@click.command(epilog=example("ddkit evaluate submission/cifar100.pt --rounds 5 --epochs-setting 50"))
@click.argument("sets", nargs=-1, type=click.Path(path_type=Path))
@click.option("--dataset", help="Of the sets; else found from the file's name or the JSON beside it.")
@click.option(
    "--track",
    type=click.Choice(["1", "2"]),
    default="1",
    show_default=True,
    help="Track 2 evaluates a generator instead of a .pt file: a bundle's zip or folder.",
)
@click.option("--rounds", type=click.IntRange(1), help="Fresh networks to train; the protocol says 3.")
@click.option(
    "--epochs-setting",
    type=click.IntRange(0),
    metavar="E",
    help="E + 1 epochs run; the protocol says 1000 on track 1, 100 on track 2.",
)
@click.option(
    "--network",
    default="convnet",
    show_default=True,
    help="The protocol's convnet, or another: resnet18, resnet_ap10, resnet18_ap, alexnet, vgg11.",
)
@click.option("--no-augment", is_flag=True, help="Train without augmentation.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="float32",
    show_default=True,
    help="bfloat16 rounds more, and is not official.",
)
@click.option("--reference", type=click.Path(path_type=Path), help="The challenge's <dataset>_test.pt to test on.")
@click.option("--time-budget", type=Duration(), help="Track 2: what the generator may take each round; 600s.")
@click.option(
    "--ranking",
    is_flag=True,
    help="DD-Ranking's scores as well; evaluates what they want besides: without augmentation, random real "
    "images, and all real images.",
)
@click.option(
    "--full-epochs-setting",
    type=click.IntRange(0),
    metavar="E",
    help="With --ranking: of all real images, which need fewer.  [default: the sets' own, 40 at most]",
)
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=RUNS_FOLDER / "evaluations",
    show_default=True,
    help="Where interrupted evaluations are kept.",
)
@click.option(
    "--ignore",
    "ignored",
    multiple=True,
    type=FindingCode(),
    metavar="CODE",
    help="Evaluate in spite of findings of this code; repeatable.",
)
@click.option("--save-every", type=Duration(), default="30s", show_default=True, help="How much work a kill may cost.")
@device_option
@seed_option
@results_option
@output_options
def evaluate(
    output: Output,
    sets: tuple[Path, ...],
    dataset: str | None,
    reference: Path | None,
    state: Path,
    save_every: float,
    results: Path,
    no_augment: bool,
    track: str,
    ranking: bool,
    full_epochs_setting: int | None,
    ignored: tuple[str, ...],
    **options: Any,
) -> None:
    """Train fresh networks on distilled SETS, test them on real images: the challenge's score.

    Without SETS, whatever is in submission/, on track 2 track2.zip. Several sets of one dataset are compared: do they
    differ by more than the noise? Interrupted, it goes on where it was when run again. Several GPUs share the rounds of
    track 1: accelerate launch -m ddkit evaluate.
    """
    from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
    from ddkit.results import Records
    from ddkit.runtime.device import resolve_device
    from ddkit.runtime.distributed import ProcessGroup

    settings = EvaluationSettings(track=int(track), augment=not no_augment, **options)
    group = ProcessGroup(resolve_device(settings.device))
    if settings.track == 2 and group.size > 1:
        raise UsageError("Track 2's generators want the machine to themselves.", "Leave accelerate launch away.")
    output.quiet = output.quiet or not group.is_main
    if ranking and (no_augment or settings.track != 1):
        raise UsageError("--ranking is of sets on track 1, evaluated with augmentation.")
    if settings.time_budget is not None and settings.track == 1:
        raise UsageError("--time-budget is of track 2, where a generator makes the images.")
    if full_epochs_setting is not None and not ranking:
        raise UsageError("--full-epochs-setting goes with --ranking.")
    records = Records(results, writes=group.is_main)
    for problem in records.problems:
        output.say(f"[yellow]left as it is[/yellow] {escape(problem)}")
    job = _Job(output, settings, reference, StateFolder(state, save_every), records, ranking, ignored)
    evaluate_each = _evaluate_entries if settings.track == 2 else _evaluate_sets
    evaluated = evaluate_each(job, sets, dataset)
    ranked = [result for result in evaluated if ranking and result.kind == "submission"]
    rankings = [job.rank(result, full_epochs_setting) for result in ranked]
    if group.is_main:
        _report(output, evaluated, rankings, results)


def _evaluate_sets(job: _Job, sets: Sequence[Path], dataset: str | None) -> list[Result]:
    from ddkit.sets.distilled import dataset_of

    named = [(path, dataset_of(path, dataset)) for path in sets] or _in_submission_folder(job.output, dataset)
    job.require_tests({name for _, name in named})
    # All are read and checked before the first is trained on, which can take hours.
    read = [job.read(path, name) for path, name in named]
    if job.ranking and all(one.kind in _REFERENCE_KINDS for one in read):
        raise UsageError("--ranking is of sets that are held against real images, and these are real images themselves.")
    return [job.run(one) for one in read]


def _evaluate_entries(job: _Job, entries: Sequence[Path], dataset: str | None) -> list[Result]:
    """Of each track 2 entry, on one dataset or on all that it has models for."""
    from ddkit.packing.bundle import datasets_of, opened

    with contextlib.ExitStack() as stack:
        runs = []
        for path in entries or [ENTRY_FILE]:
            folder = stack.enter_context(opened(path))
            names = [dataset] if dataset else datasets_of(folder)
            if not names:
                raise UsageError(f"{path} does not say which datasets it is for.", "Say --dataset.")
            runs += [(path, folder, name) for name in names]
        # All is there before the first generator runs, for ten minutes a round.
        job.require_tests({name for _, _, name in runs})
        return [job.run_entry(*run) for run in runs]


def _in_submission_folder(output: Output, wanted: str | None) -> list[tuple[Path, str]]:
    """Its tensors, each with its dataset, but for those that nobody can tell the dataset of, if there are others."""
    from ddkit.sets.distilled import dataset_of

    found = sorted(path for path in SUBMISSION_FOLDER.glob("*.pt") if path.is_file())
    if not found:
        raise MissingDataError(
            f"There is no .pt file in {SUBMISSION_FOLDER}/.", "Make one: ddkit generate --ipc 10 --dataset cifar100"
        )
    named, left_aside = [], []
    for path in found:
        try:
            named.append((path, dataset_of(path, wanted)))
        except UsageError as error:
            left_aside.append(error)
    if not named:
        raise left_aside[0]
    for error in left_aside:
        output.say(f"Left aside: {escape(error.message)}")
    return named


@dataclass(frozen=True)
class _ReadSet:
    """A set as it was when the command began: the file may be another one by the time it is trained on.

    facts: the JSON beside it. kind: as in `Result`.
    """

    path: Path
    spec: DatasetSpec
    images: Tensor
    sha256: str
    facts: dict[str, Any]

    @property
    def kind(self) -> str:
        kind = self.facts.get("kind")
        return kind if kind in _REFERENCE_KINDS else "submission"


@dataclass(frozen=True)
class _Job:
    """What the evaluations of one command have in common."""

    output: Output
    settings: EvaluationSettings
    reference: Path | None
    state: StateFolder
    records: Records
    ranking: bool
    ignored: tuple[str, ...]

    def require_tests(self, names: set[str]) -> None:
        """Raise where one of these datasets has nothing to be tested on."""
        from ddkit.data.store import dataset_spec

        if self.reference is not None and len(names) > 1:
            of = " and ".join(sorted(names))
            raise UsageError(f"--reference is of one dataset, and there are {of}.", "Evaluate one at a time.")
        for name in sorted(names):
            self._test_set(dataset_spec(name))

    def read(self, path: Path, name: str) -> _ReadSet:
        """One set, checked."""
        from ddkit.data.store import dataset_spec
        from ddkit.runtime.files import sha256_of
        from ddkit.sets.distilled import load_tensor, read_provenance

        spec = dataset_spec(name)
        self._check(path, spec)
        return _ReadSet(path, spec, load_tensor(path, spec), sha256_of(path), read_provenance(path))

    def run(self, one: _ReadSet) -> Result:
        """Evaluate one set."""
        from ddkit.evaluation.evaluate import evaluate_source
        from ddkit.evaluation.sources import FixedSet
        from ddkit.sets.distilled import class_labels

        spec, images = one.spec, one.images
        self.output.say(f"Evaluating {escape(str(one.path))} on {escape(spec.name)}: {_length(self.settings)}.")
        source = FixedSet(images, class_labels(spec.num_classes, len(images) // spec.num_classes))
        evaluation = evaluate_source(source, self._test_set(spec), self.settings, state=self.state, progress=self.output.listen)
        # Sets in one folder are one entry: the report joins them by this name.
        name = one.path.resolve().parent.name
        return self._record(evaluation.result(name, one.sha256, str(one.path), kind=one.kind, made_by=one.facts))

    def run_entry(self, path: Path, folder: Path, name: str) -> Result:
        """Evaluate one track 2 entry, whose files are in `folder`, on one dataset."""
        from ddkit.data.store import dataset_spec
        from ddkit.evaluation.evaluate import evaluate_generator
        from ddkit.evaluation.timed_script import ScriptEntry
        from ddkit.evaluation.tracks import hash_of_folder
        from ddkit.packing.bundle import SCRIPT, entry_facts

        spec, sha256 = dataset_spec(name), hash_of_folder(folder)
        self.output.say(f"Evaluating {escape(str(path))} on {escape(name)}: {_length(self.settings)}, "
                         f"each on what it makes in {self.settings.budget:g} s.")  # fmt: skip
        device = () if self.settings.device == "auto" else ("--device", self.settings.device)
        entry = ScriptEntry(folder / SCRIPT, name, device, progress=self.output.listen)
        evaluation = evaluate_generator(
            entry,
            self._test_set(spec),
            self.settings,
            name=f"{name}/{sha256}",
            state=self.state,
            progress=self.output.listen,
        )
        title = path.resolve().parent.name if path.suffix == ".py" else path.resolve().stem
        return self._record(evaluation.result(title, sha256, str(path), made_by=entry_facts(folder, name)))

    def rank(self, result: Result, full_epochs_setting: int | None) -> Ranking:
        """DD-Ranking's scores of an evaluated set, after evaluating what they lack."""
        from ddkit.data.prepare import open_dataset
        from ddkit.data.store import dataset_spec
        from ddkit.evaluation.ranking_runs import RankingJob, complete
        from ddkit.runtime.files import sha256_of
        from ddkit.sets.distilled import class_labels, load_tensor

        if sha256_of(result.source) != result.sha256:
            raise BadFileError(f"{result.source} has changed while it was evaluated.", "Run the same again.")
        spec = dataset_spec(result.dataset)
        images = load_tensor(result.source, spec)
        labels = class_labels(spec.num_classes, len(images) // spec.num_classes)
        real = open_dataset(spec.name, "train", progress=self.output.listen)
        return complete(
            RankingJob(result, images, labels, real, self._test_set(spec), self.settings, full_epochs_setting),
            self.records.results,
            record=self.records.add,
            announce=self._announce,
            state=self.state,
            progress=self.output.listen,
        )

    def _record(self, result: Result) -> Result:
        """Told at once, too: what comes after it may take hours, or fail."""
        self.records.add(result)
        self.output.say(f"{escape(result.source)} on {escape(result.dataset)}: {_percent(result.mean)}, recorded.")
        return result

    def _announce(self, need: MissingEvaluation, settings: EvaluationSettings) -> None:
        self.output.say(f"For DD-Ranking, evaluating {need}: {_length(settings)}.")

    def _check(self, path: Path, spec: DatasetSpec) -> None:
        """Refuse what `ddkit check` refuses; say what it warns of. Any number of images a class can be evaluated."""
        from ddkit.checks.check import require_acceptable

        report = require_acceptable(path, spec.name, ignore_codes=self.ignored, progress=self.output.listen)
        for finding in report.findings:
            if finding.level == "warning":
                self.output.say(f"[yellow]warning[/yellow] {escape(f'{finding.code}: {finding.message}')}")

    def _test_set(self, spec: DatasetSpec) -> TestSet:
        from ddkit.data.prepare import open_dataset
        from ddkit.evaluation.reference import as_test_set, load_reference

        if self.reference is not None:
            return load_reference(self.reference, spec)
        return as_test_set(open_dataset(spec.name, "test", progress=self.output.listen), spec)


def _length(settings: EvaluationSettings) -> str:
    rounds, epochs = settings.number_of_rounds, settings.training.epochs
    return f"{rounds} round{'s' * (rounds > 1)} of {epochs:,} epochs in {settings.precision}"


def _report(output: Output, evaluated: Sequence[Result], rankings: Sequence[Ranking], results: Path) -> None:
    """Show everything, and compare what can be compared."""
    comparisons = _comparisons(evaluated)
    data = {
        "results": [_as_data(result) for result in evaluated],
        "comparisons": [_as_data(c) for _, _, c in comparisons],
        "rankings": [ranking.as_data() for ranking in rankings],
    }
    shown = _shown(evaluated, comparisons)
    output.result(data, Group(shown, rankings_table(rankings)) if rankings else shown)
    output.done([results], "ddkit report")


def _comparisons(evaluated: Sequence[Result]) -> list[tuple[Result, Result, Comparison]]:
    """Of the first set of each dataset with the others of it; rounds are paired, as the seeds are the same."""
    from ddkit.statistics import compare

    firsts: dict[str, Result] = {}
    pairs = [
        (first, result)
        for result in evaluated
        if (first := firsts.setdefault(result.dataset, result)) is not result and result.rounds > 1
    ]
    return [(first, other, compare(first.accuracies, other.accuracies, paired=True)) for first, other in pairs]


def _as_data(record: Result | Comparison) -> dict[str, Any]:
    derived = ("mean", "std", "interval", "exceeds_noise")
    return {**asdict(record), **{name: getattr(record, name) for name in derived if hasattr(record, name)}}


def _shown(evaluated: Sequence[Result], comparisons: Sequence[tuple[Result, Result, Comparison]]) -> Group:
    lines = [_table(evaluated), *_made(evaluated), *(_verdict(*comparison) for comparison in comparisons)]
    entries: dict[str, dict[str, float]] = {}
    for result in evaluated:
        if result.official and result.kind == "submission":
            entries.setdefault(result.name, {})[result.dataset] = result.mean
    for name, means in entries.items():
        if len(means) == 2:
            score = _percent(sum(means.values()) / 2)
            lines.append(f"The challenge's score of {escape(name)}, the mean of both datasets: [bold]{score}[/]")
    return Group(*lines)


def _table(evaluated: Sequence[Result]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("set", "dataset", "accuracy", "95 % interval", "rounds", "official"):
        table.add_column(heading, overflow="fold")
    for result in evaluated:
        accuracy = _percent(result.mean) + (f" ± {100 * result.std:.2f}" if result.std is not None else "")
        interval = " to ".join(map(_percent, result.interval)) if result.interval else "the rounds say none"
        official = "yes" if result.official else f"no: {'; '.join(result.deviations)}"
        rounds = " ".join(map(_percent, result.accuracies[:_MOST_ROUNDS_SHOWN]))
        rounds += " ..." * (result.rounds > _MOST_ROUNDS_SHOWN)
        table.add_row(*map(escape, (result.source, result.dataset, accuracy, interval, rounds, official)))
    return table


def _made(evaluated: Sequence[Result]) -> list[str]:
    """What track 2's generators made, a line each."""
    lines = []
    for result in (result for result in evaluated if result.generated):
        counts = [f"{count:,}" for count in result.generated]
        speed = sum(result.generated) / sum(result.generation_seconds)
        least, most = result.images_per_class
        seconds = ", ".join(f"{seconds:.1f}" for seconds in result.generation_seconds)
        lines.append(
            f"{escape(result.source)} on {escape(result.dataset)} made {', '.join(counts)} images in {seconds} s: "
            f"{speed:,.1f} images/s, {least:,} to {most:,} of each class."
        )
    return lines


def _verdict(first: Result, second: Result, comparison: Comparison) -> str:
    better, worse = (first, second) if comparison.difference >= 0 else (second, first)
    points = abs(100 * comparison.difference)
    half = 50 * (comparison.interval[1] - comparison.interval[0])
    facts = f"by {points:.2f} ± {half:.2f} points (95 %, {first.rounds} paired rounds, p = {comparison.p_value:.2g})"
    if comparison.exceeds_noise:
        return f"[bold]{escape(better.source)}[/] is better than {escape(worse.source)} {facts}."
    return (
        f"{escape(better.source)} and {escape(worse.source)} differ {facts}: no more than the noise. "
        "More --rounds would tell smaller differences."
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
