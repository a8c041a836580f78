"""Evaluates files: reads and checks sets, opens test sets, evaluates, records, ranks and compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddkit.challenge import CHALLENGE_DATASETS
from ddkit.checks.check import require_acceptable
from ddkit.data.prepare import open_dataset
from ddkit.data.store import dataset_spec
from ddkit.errors import InvalidSubmissionError, MissingDataError, UsageError, counted
from ddkit.evaluation.estimate import EvaluationEstimate, estimate_evaluation
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, evaluate_generator, evaluate_source
from ddkit.evaluation.published import Conversion, PublishedSet, open_published
from ddkit.evaluation.ranking_runs import evaluate_missing, settings_for
from ddkit.evaluation.sources import FixedSet, hash_of
from ddkit.evaluation.test_sets import TestSet, as_test_set, load_reference
from ddkit.evaluation.timed_script import ScriptEntry
from ddkit.evaluation.tracks import hash_of_folder
from ddkit.metrics.ddranking import MissingEvaluation, Ranking, of_result
from ddkit.results import IN_MEMORY, RESULTS_FILE, Records, Result
from ddkit.runtime.device import resolve_device
from ddkit.runtime.distributed import ProcessGroup
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.distilled import BASELINE_KINDS, KIND_FULL_REAL, KIND_SUBMISSION, DistilledSet, generate_command, read_set
from ddkit.sets.published import holds_containers, is_published_folder, labels_next_to
from ddkit.statistics import Comparison, compare


@dataclass(frozen=True)
class JobSettings:
    """Settings of `evaluate_files` for all its files.

    evaluation: how each is evaluated. dataset: of all files; None finds it for each file (see `ddkit.sets.distilled`).
    name: under which results are recorded; None takes the name of the file's folder, which joins an entry's two sets,
        and "in-memory" for a set that is not a file's.
    reference: the challenge's `{dataset}_test.pt`; None takes the prepared test set.
    conversion: how sets in other layouts than the challenge's are converted; any but the default converts all sets.
    ranking: also compute DD-Ranking's scores, after the evaluations that they need.
    full_epochs_setting: E for all real images when ranking; None takes the evaluation's own, 40 at most.
    ignore_codes: findings that do not prevent an evaluation.
    results: the file of results. state: where interrupted evaluations are saved.
    Raises UsageError for settings that exclude each other.
    """

    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    dataset: str | None = None
    name: str | None = None
    reference: Path | None = None
    conversion: Conversion = field(default_factory=Conversion)
    ranking: bool = False
    full_epochs_setting: int | None = None
    ignore_codes: tuple[str, ...] = ()
    results: Path = RESULTS_FILE
    state: StateFolder = field(default_factory=StateFolder)

    def __post_init__(self) -> None:
        evaluation = self.evaluation
        if (self.ignore_codes or self.conversion != Conversion()) and evaluation.track != 1:
            raise UsageError("--zca, --argmax, --normalization and --ignore need --track 1.")
        if self.ranking and (not evaluation.augment or evaluation.track != 1):
            raise UsageError("--ranking needs --track 1 and augmentation.")
        if self.full_epochs_setting is not None and not self.ranking:
            raise UsageError("--full-epochs-setting needs --ranking.")


@dataclass(frozen=True)
class GeneratorFiles:
    """A track 2 entry on the disk, to be evaluated on one dataset.

    path: what the user named: a zip, a folder or the script. folder: all of the entry's files, unpacked.
    script: generate.py. provenance: how the entry samples; {} if unknown.
    """

    path: Path
    folder: Path
    script: Path
    dataset: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobOutcome:
    """The results of `evaluate_files`.

    comparisons: (first set of a dataset, another set of it, how they differ), round by round on track 1.
    rankings: DD-Ranking's scores of the submissions, where asked for.
    """

    results: tuple[Result, ...]
    rankings: tuple[Ranking, ...] = ()

    @property
    def comparisons(self) -> tuple[tuple[Result, Result, Comparison], ...]:
        firsts: dict[str, Result] = {}
        pairs = [(firsts.setdefault(result.dataset, result), result) for result in self.results]
        return tuple(
            (first, other, compare(first.accuracies, other.accuracies, paired=other.track == 1))
            for first, other in pairs
            if first is not other and other.rounds > 1
        )

    @property
    def scores(self) -> dict[str, float]:
        """The challenge's score, the mean over both datasets, of each name with official results on both.

        Of several files for a dataset the one that is packed counts, `<dataset>.pt`; without it there is no score.
        """
        found: dict[str, dict[str, list[Result]]] = {}
        for result in self.results:
            if result.official and result.kind == KIND_SUBMISSION:
                found.setdefault(result.name, {}).setdefault(result.dataset, []).append(result)
        scores = {}
        for name, of in found.items():
            chosen = [each for results in of.values() if (each := _packed_one(results)) is not None]
            if len(chosen) == len(CHALLENGE_DATASETS):
                scores[name] = sum(each.mean for each in chosen) / len(chosen)
        return scores


def evaluate_files(
    files: Sequence[Path | DistilledSet | GeneratorFiles],
    settings: JobSettings | None = None,
    *,
    folder: Path = Path("submission"),
    progress: Listener = ignore,
    on_event: Callable[[str], None] = lambda text: None,
) -> JobOutcome:
    """Evaluate distilled sets or track 2 entries as `ddkit evaluate` does, and record each result at once.

    files: sets for track 1, in the challenge's layout or one that others publish, or in memory; GeneratorFiles for track 2.
    If there are none, every set in `folder` is evaluated, or that of the dataset in the settings.
    All files are read and checked before the first evaluation, which can take hours.
    on_event: called with a sentence on each warning, and at the beginning and end of each evaluation.
    Processes that were launched together share the rounds; the main one records.
    Raises what `read_set`, `open_dataset` and `evaluate` raise, InvalidSubmissionError for an error that
    `ddkit check` would find, BadDataError for a bad reference, UsageError for settings that do not go with the files.
    """
    return _Job(settings or JobSettings(), progress, on_event).run(files, folder)


def estimate_files(
    files: Sequence[Path],
    settings: JobSettings | None = None,
    *,
    folder: Path = Path("submission"),
    progress: Listener = ignore,
    on_event: Callable[[str], None] = lambda text: None,
) -> tuple[EvaluationEstimate, ...]:
    """The time that `evaluate_files` would take for these sets, and which results would be official; nothing is recorded.

    Raises what `evaluate_files` raises before its first evaluation, and UsageError with ranking, whose evaluations are not
    measured, and for track 2, where the time depends on the images that a generator makes.
    """
    return _Job(settings or JobSettings(), progress, on_event).estimate(files, folder)


class _Job:
    """One call of `evaluate_files`."""

    def __init__(self, settings: JobSettings, progress: Listener, on_event: Callable[[str], None]) -> None:
        self._settings, self._progress, self._on_event = settings, progress, on_event
        self._tests: dict[str, TestSet] = {}
        group = ProcessGroup(resolve_device(settings.evaluation.device))
        if settings.evaluation.track == 2 and group.size > 1:
            raise UsageError("A track 2 generator needs the machine to itself.", "Run without accelerate launch.")
        # Unusable results files are reported before anything is computed.
        self._records = Records(settings.results, writes=group.is_main)
        for problem in self._records.problems:
            on_event(f"ignored: {problem}")

    def run(self, files: Sequence[Path | DistilledSet | GeneratorFiles], folder: Path) -> JobOutcome:
        generators = [file for file in files if isinstance(file, GeneratorFiles)]
        if self._settings.evaluation.track == 2:
            if len(generators) < max(1, len(files)):
                raise UsageError("Track 2 evaluates generators, not tensors.", "Name a bundle's zip, folder or generate.py.")
            self._open_tests([file.dataset for file in generators])
            return JobOutcome(tuple(self._evaluate_generator(file) for file in generators))
        if generators:
            raise UsageError("Track 1 evaluates tensors, not generators.", "Add --track 2.")
        sets = self._checked_sets([file for file in files if not isinstance(file, GeneratorFiles)], folder)
        results = [self._evaluate_set(each) for each in sets]
        pairs = [(each, result) for each, result in zip(sets, results, strict=True) if isinstance(each, DistilledSet)]
        ranked = [pair for pair in pairs if pair[1].kind == KIND_SUBMISSION]
        rankings = [self._rank(*pair) for pair in ranked] if self._settings.ranking else []
        return JobOutcome(tuple(results), tuple(rankings))

    def estimate(self, files: Sequence[Path], folder: Path) -> tuple[EvaluationEstimate, ...]:
        if self._settings.evaluation.track == 2:
            raise UsageError("--dry-run needs --track 1.", "On track 2 the time depends on how many images are generated.")
        if self._settings.ranking:
            raise UsageError("--dry-run does not measure the evaluations that --ranking adds.", "Leave --ranking out.")
        return tuple(
            estimate_evaluation(
                _source_of(each),
                str(each.path),
                self._tests[each.spec.name],
                self._settings.evaluation,
                state=self._settings.state,
                progress=self._progress,
            )
            for each in self._checked_sets(files, folder)
        )

    def _checked_sets(self, files: Sequence[Path | DistilledSet], folder: Path) -> list[DistilledSet | PublishedSet]:
        sets = [file if isinstance(file, DistilledSet) else self._read(file) for file in files] or self._sets_in(folder)
        self._open_tests([each.spec.name for each in sets])
        if self._settings.ranking and all(each.kind in BASELINE_KINDS for each in sets):
            raise UsageError("--ranking compares sets with real images, and these are real images themselves.")
        if self._settings.ranking and any(isinstance(each, PublishedSet) for each in sets):
            raise UsageError("--ranking needs sets in the challenge's layout, without a conversion.")
        for each in sets:
            self._check(each)
        return sets

    def _read(self, path: Path) -> DistilledSet | PublishedSet:
        """The challenge's tensor, or else what others publish."""
        conversion, dataset = self._settings.conversion, self._settings.dataset
        if conversion == Conversion() and not is_published_folder(path) and labels_next_to(path) is None:
            try:
                return read_set(path, dataset)
            except InvalidSubmissionError:
                if not holds_containers(path):
                    raise
        return open_published(path, dataset, conversion, progress=self._progress)

    def _sets_in(self, folder: Path) -> list[DistilledSet | PublishedSet]:
        """The set of the dataset that was named, else all of a folder. Unknown names are reported, if there are others."""
        name = dataset_spec(self._settings.dataset).name if self._settings.dataset else ""
        paths = sorted(path for path in folder.glob(f"{name or '*'}.pt") if path.is_file())
        if not paths:
            command = generate_command(name or CHALLENGE_DATASETS[0].name)
            raise MissingDataError(f"There is no {f'{name}.pt' if name else '.pt file'} in {folder}/.", f"Make one: {command}")
        sets: list[DistilledSet | PublishedSet] = []
        unknown = []
        for path in paths:
            try:
                sets.append(self._read(path))
            except UsageError as error:
                unknown.append(error)
        if not sets:
            raise unknown[0]
        for problem in unknown:
            self._on_event(f"ignored: {problem.message}")
        return sets

    def _open_tests(self, datasets: Sequence[str]) -> None:
        names = sorted(set(datasets))
        if self._settings.reference is not None and len(names) > 1:
            raise UsageError(
                f"--reference holds the test set of one dataset, but the sets are for {' and '.join(names)}.",
                "Evaluate one dataset at a time.",
            )
        for name in names:
            spec = dataset_spec(name)
            if self._settings.reference is not None:
                self._tests[name] = load_reference(self._settings.reference, spec)
            else:
                self._tests[name] = as_test_set(open_dataset(name, "test", progress=self._progress), spec)

    def _check(self, distilled: DistilledSet | PublishedSet) -> None:
        """Refuse a set that `ddkit check` refuses, with any number of images per class; report warnings."""
        if isinstance(distilled, PublishedSet):
            for note in distilled.notes:
                self._on_event(note)
            distilled.check(self._settings.ignore_codes, self._progress)
            return
        report = require_acceptable(distilled, ignore_codes=self._settings.ignore_codes, progress=self._progress)
        for finding in report.findings:
            if finding.level == "warning":
                self._on_event(f"warning {finding.code}: {finding.message}")

    def _evaluate_set(self, distilled: DistilledSet | PublishedSet) -> Result:
        settings, path = self._settings.evaluation, distilled.path or Path(IN_MEMORY)
        sha256 = distilled.sha256 or hash_of(distilled.images, distilled.labels)
        self._note_used_name(distilled.spec.name, sha256)
        self._on_event(f"Evaluating {path} on {distilled.spec.name}: {_length(settings)}.")
        evaluation = evaluate_source(
            _source_of(distilled),
            self._tests[distilled.spec.name],
            settings,
            state=self._settings.state,
            progress=self._progress,
        )
        published = isinstance(distilled, PublishedSet)
        # Trajectory matching calls the two files of every set images_best.pt and labels_best.pt.
        by_file = published and labels_next_to(path) is None
        place = path.resolve()
        own_name = _name_of(place) if by_file else place.parent.name if distilled.path else "in-memory"
        name = self._settings.name or own_name
        kind = distilled.kind if distilled.kind in BASELINE_KINDS else KIND_SUBMISSION
        return self._record(evaluation.result(name, sha256, str(path), kind=kind, made_by=distilled.provenance))

    def _note_used_name(self, dataset: str, sha256: str) -> None:
        """Say so if the name that the user gave is recorded for another set of the dataset."""
        name = self._settings.name
        others = [each for each in self._records.results if (each.name, each.dataset) == (name, dataset)]
        if name is not None and others and all(each.sha256 != sha256 for each in others):
            self._on_event(
                f"The name '{name}' was used on {others[-1].date[:10] or 'an earlier day'} for another set of {dataset}. The "
                "leaderboard tells the two apart by how they were made or by their hashes."
            )

    def _evaluate_generator(self, files: GeneratorFiles) -> Result:
        settings, sha256 = self._settings.evaluation, hash_of_folder(files.folder)
        early = files.provenance.get("images_per_class") is not None
        within = f"in {'at most ' * early}{settings.budget:g} s"
        self._on_event(
            f"Evaluating {files.path} on {files.dataset}: {_length(settings)}, each on the images that it makes {within}."
        )
        arguments: tuple[str, ...] = () if settings.device == "auto" else ("--device", settings.device)
        if files.provenance.get("pixels"):  # bundles of earlier versions do not know the option
            arguments += ("--pixels",)
        evaluation = evaluate_generator(
            ScriptEntry(files.script, files.dataset, arguments, may_end_early=early, progress=self._progress),
            self._tests[files.dataset],
            settings,
            name=f"{files.dataset}/{sha256}",
            state=self._settings.state,
            progress=self._progress,
        )
        path = files.path.resolve()
        name = self._settings.name or (path.parent.name if path.suffix == ".py" else _name_of(path))
        return self._record(evaluation.result(name, sha256, str(files.path), made_by=files.provenance))

    def _record(self, result: Result) -> Result:
        """Record a result and report it at once, since the next evaluation may take hours, or fail."""
        kept = "recorded" if self._records.add(result) else f"which {self._settings.results} holds already"
        self._on_event(f"{result.source} on {result.dataset}: {100 * result.mean:.2f} %, {kept}.")
        return result

    def _rank(self, distilled: DistilledSet, result: Result) -> Ranking:
        """DD-Ranking's scores of an evaluated set, after the evaluations that they need."""
        settings, name = self._settings, distilled.spec.name
        real = open_dataset(name, "train", progress=self._progress)

        def settings_of(need: MissingEvaluation) -> EvaluationSettings:
            return settings_for(need, settings.evaluation, settings.full_epochs_setting)

        full_epochs = settings_of(MissingEvaluation(KIND_FULL_REAL, True)).training.epochs_setting
        known = [each for each in self._records.results if each.kind != KIND_FULL_REAL or each.epochs_setting >= full_epochs]
        for need in of_result(result, known).missing:
            changed = settings_of(need)
            self._on_event(f"For DD-Ranking, evaluating {need}: {_length(changed)}.")
            known.append(
                evaluate_missing(
                    need, changed, result, distilled, real, self._tests[name],
                    state=settings.state, progress=self._progress,
                )
            )  # fmt: skip
            self._records.add(known[-1])
        return of_result(result, known)


def _packed_one(results: Sequence[Result]) -> Result | None:
    """Of the results for one dataset that of `<dataset>.pt`, else of the only file; None where several files claim it."""
    named = [each for each in results if Path(each.source).stem == each.dataset] or results
    return named[-1] if len({each.sha256 for each in named}) == 1 else None


def _source_of(each: DistilledSet | PublishedSet) -> FixedSet:
    # A tensor in memory may be a view.
    return FixedSet(each.images.contiguous(), each.labels, each.converted if isinstance(each, PublishedSet) else "")


def _name_of(path: Path) -> str:
    """The name of a folder, which may have a dot in it, or that of a file without its ending."""
    return path.name if path.is_dir() else path.stem


def _length(settings: EvaluationSettings) -> str:
    rounds, epochs = settings.number_of_rounds, settings.training.epochs
    return f"{counted(rounds, 'round', 'rounds')} of {counted(epochs, 'epoch', 'epochs')} in {settings.precision}"
