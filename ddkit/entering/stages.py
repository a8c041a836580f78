"""The stages of an entry: how each runs, and how its files show that it is done.

baseline/  generated/  submission/  runs/  recipe.toml  submission.zip or track2.zip  report.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ddkit.challenge import CHALLENGE_DATASETS
from ddkit.data.prepare import prepare
from ddkit.data.store import dataset_spec, is_prepared, load_dataset, train_sha256
from ddkit.distill.generate import FromModel, FromReal, generate
from ddkit.distill.refine import refine
from ddkit.distill.settings import RefineLimits
from ddkit.distill.state import STATE_FILE, RefinementState
from ddkit.entering.plan import evaluation_settings
from ddkit.entering.recipe import IPC, Recipe, SetRecipe
from ddkit.evaluation.evaluate import StateFolder, deviations_of
from ddkit.evaluation.job import GeneratorFiles, JobSettings, evaluate_files
from ddkit.evaluation.test_sets import TestSet, as_test_set
from ddkit.generator.config import SECONDS_WORTH_COMPILING
from ddkit.generator.model_facts import FACTS_FILE, has_model, model_hash, read_facts
from ddkit.generator.training.records import read_records
from ddkit.generator.training.run_folder import METRICS_FILE
from ddkit.history import RECIPE_FILE, PackedRecords, packed_file
from ddkit.packing.pack import pack, packed_files
from ddkit.packing.proof import ProofSettings
from ddkit.reporting.report import Leaderboard, report
from ddkit.results import Result, read
from ddkit.runtime.device import resolve_device
from ddkit.runtime.files import sha256_of, sha256_of_files
from ddkit.runtime.progress import Listener
from ddkit.sets.distilled import KIND_GENERATED, KIND_RANDOM_REAL, read_provenance
from ddkit.sets.findings import Report

# Names of the stages that run even if the time is up. On track 2 the first makes the classifier and the modes, and
# proves the bundle.
PACK, REPORT = "check and pack", "report"
_MISSING_TENSOR = "F003"


@dataclass(frozen=True)
class Stage:
    """A stage of an entry.

    name: unique, such as "refine cifar100". seconds: that it will take, about. after: names of the earlier stages whose
    files it uses. is_done: looks at its files. run: does it, or what is left of it. stoppable: True if the end of
    the time stops it, with its state kept, or leaves it out.
    """

    name: str
    seconds: float
    after: tuple[str, ...]
    is_done: Callable[[], bool]
    run: Callable[[Listener], None]
    stoppable: bool = True


class Workplace:
    """An entry's folder, and the functions that its stages run there.

    recipe: a stage whose length the time decides writes that length in when it is done. limit: such a stage calls it at its
    beginning with its name and the seconds that earlier calls worked; returns the seconds that all calls may work.
    on_event: called with a sentence on each warning and result.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, device: str, limit: Callable[[str, float], float], on_event: Callable[[str], None]
    ) -> None:
        self.folder, self.recipe = folder, recipe
        self._device, self._limit, self._on_event = device, limit, on_event
        self.results_file, self.page = folder / "runs" / "results.jsonl", folder / "report.html"
        self.zip_file = folder / ("submission.zip" if recipe.track == 1 else "track2.zip")
        self._test_sets: dict[str, TestSet] = {}
        self.leaderboard: Leaderboard | None = None

    def submission(self, name: str) -> Path:
        """The tensor of a dataset's set."""
        return self._tensor("submission", name)

    def sets_are_there(self) -> bool:
        """True if everything that is packed has been made."""
        if self.recipe.track == 2:
            return all(has_model(self._model_folder(name)) for name in self.recipe.datasets)
        return all(self.submission(name).exists() for name in self.recipe.datasets)

    def stages(self, expected: Mapping[str, float]) -> tuple[Stage, ...]:
        """The stages that are expected, in order. expected: seconds of each by its name."""
        stages: list[Stage] = []

        def add(name: str, after: Iterable[str], is_done: Callable[[], bool], run: Callable[[Listener], None]) -> None:
            if name in expected:
                stages.append(Stage(name, expected[name], tuple(after), is_done, run, stoppable=name not in (PACK, REPORT)))

        def add_each(
            verb: str, after: Sequence[str], is_done: Callable[[str], bool], run: Callable[[str, Listener], None]
        ) -> None:
            for name in self.recipe.datasets:
                add(f"{verb} {name}", (each.format(name) for each in after), partial(is_done, name), partial(run, name))

        add_each("prepare", (), is_prepared, self._prepare)
        add_each("random real images", ("prepare {}",), self._has_baseline, self._draw_baseline)
        add_each("train", ("prepare {}",), self._is_trained, self._train)
        add_each("generate", ("train {}",), self._is_generated, self._generate)
        add_each("refine", ("random real images {}", "generate {}"), self._is_refined, self._refine)
        everything = [each.name for each in stages]
        if self.recipe.track == 2:
            add(PACK, everything, self._is_bundled, self._bundle)
            add_each("evaluate", (PACK,), self._is_generator_evaluated, self._evaluate_generator)
        else:
            makers = {
                "submission": ("generate {}", "refine {}"),
                "generated": ("generate {}",),
                "baseline": ("random real images {}",),
            }
            for what, after in makers.items():
                add_each(f"evaluate {what}", after, partial(self._is_evaluated, what), partial(self._evaluate_set, what))
            add(PACK, everything, lambda: False, self._pack)
        add(REPORT, everything, lambda: False, self._report)
        return tuple(stages)

    def exact_recipe(self) -> Recipe:
        """The recipe that makes the sets that are there again, without those that are not there yet."""
        recipe = self.recipe
        for each in recipe.sets:
            recipe = recipe.with_set(self._exact(each))
        found = {each.dataset: self._evaluations(each.dataset, each.sha256) for each in recipe.sets}
        return dataclasses.replace(recipe, accuracies={name: results[-1].mean for name, results in found.items() if results})

    def _exact(self, each: SetRecipe) -> SetRecipe:
        changes: dict[str, Any] = {"dataset_sha256": train_sha256(each.dataset)} if is_prepared(each.dataset) else {}
        run = self._refine_folder(each.dataset)
        if sha256 := self._sha256(each.dataset):
            changes["sha256"] = sha256
        if self.recipe.track == 2:
            changes["bundle"] = each.bundle_settings
        elif each.preset:
            changes["sampling"] = each.sampling_settings
        if each.refine is not None and (run / STATE_FILE).exists():
            state = RefinementState.read(run)
            pool = each.refine.pool
            if state.pool_start is not None:
                pool = dataclasses.replace(pool, from_step=state.pool_start)
            # Which engine is faster is measured; the step at which the pool begins may depend on the time.
            changes["refine"] = dataclasses.replace(each.refine, precision=state.precision, pool=pool)
            changes["refine_steps"] = state.best_step
        return dataclasses.replace(each, **changes)

    def _sha256(self, name: str) -> str:
        """The hash of what is submitted for a dataset; "" where that has not been made."""
        if self.recipe.track == 1:
            return sha256_of(path) if (path := self.submission(name)).exists() else ""
        if not self._is_bundled():
            return ""
        return sha256_of_files({file.name: file.sha256 for file in packed_files(self.zip_file)})

    def _tensor(self, folder: str, name: str) -> Path:
        return self.folder / folder / f"{name}.pt"

    def _model_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def _refine_folder(self, name: str) -> Path:
        return self.folder / "runs" / f"{name}-refine"

    def _prepare(self, name: str, progress: Listener) -> None:
        prepare(name, progress=progress)
        self.recipe.require_datasets()

    def _has(self, path: Path, **facts: Any) -> bool:
        provenance = read_provenance(path)
        return all(provenance.get(key) == value for key, value in facts.items())

    def _has_baseline(self, name: str) -> bool:
        sha256 = train_sha256(name) if is_prepared(name) else None
        return self._has(self._tensor("baseline", name), kind=KIND_RANDOM_REAL, seed=self.recipe.seed, dataset_sha256=sha256)

    def _draw_baseline(self, name: str, progress: Listener) -> None:
        source = FromReal("random", self.recipe.seed, self._device)
        generate(name, IPC, source, self._tensor("baseline", name), replace=True, progress=progress)

    def _is_trained(self, name: str) -> bool:
        folder, steps = self._model_folder(name), self.recipe.set_of(name).train_steps
        return steps is not None and has_model(folder) and read_facts(folder).steps >= steps

    def _train(self, name: str, progress: Listener) -> None:
        each, folder = self.recipe.set_of(name), self._model_folder(name)
        seconds = None
        if each.train_steps is None:
            records = read_records(folder / METRICS_FILE)
            stages = {record["stage"]: record.get("seconds", 0.0) for record in records if "seconds" in record}
            seconds = self._limit(f"train {name}", sum(stages.values()))
            each = dataclasses.replace(each, compile=seconds >= SECONDS_WORTH_COMPILING and each.compile is not False)
        from ddkit.entering.training import train_generator

        changed = train_generator(each, self.recipe.seed, folder, seconds, self._device, progress)
        self.recipe = self.recipe.with_set(changed)

    def _started_from(self, name: str) -> Path:
        """The set that is refined."""
        return self._tensor("generated" if self.recipe.set_of(name).preset else "baseline", name)

    def _generated(self, name: str) -> Path:
        return self._started_from(name) if self.recipe.set_of(name).refine is not None else self.submission(name)

    def _is_generated(self, name: str) -> bool:
        if not self._is_trained(name):
            return False
        facts = {"model_sha256": model_hash(self._model_folder(name)), "seed": self.recipe.seed}
        return self._has(self._generated(name), kind=KIND_GENERATED, **facts)

    def _generate(self, name: str, progress: Listener) -> None:
        sampling = dataclasses.replace(self.recipe.set_of(name).sampling_settings, seed=self.recipe.seed)
        source = FromModel(self._model_folder(name), sampling, self._device)
        generate(name, IPC, source, self._generated(name), replace=True, progress=progress)

    def _is_refined(self, name: str) -> bool:
        steps, folder, out = self.recipe.set_of(name).refine_steps, self._refine_folder(name), self.submission(name)
        if steps is None or not out.exists() or not (folder / STATE_FILE).exists():
            return False
        state = RefinementState.read(folder)
        return state.step >= steps and state.validated and (state.made(out) or state.gained_nothing())

    def _refine(self, name: str, progress: Listener) -> None:
        each, folder = self.recipe.set_of(name), self._refine_folder(name)
        if each.refine is None:
            return
        if each.refine_steps is None:
            earlier = RefinementState.read(folder).seconds if (folder / STATE_FILE).exists() else 0.0
            limits = RefineLimits(seconds=self._limit(f"refine {name}", earlier))
        else:
            limits = RefineLimits(each.refine_steps)
        refined = refine(
            self._started_from(name), name, each.refine, limits, folder,
            out=self.submission(name), device=self._device, save_every_seconds=60, progress=progress,
        )  # fmt: skip
        self.recipe = self.recipe.with_set(dataclasses.replace(each, refine_steps=refined.steps))
        self._on_event(f"Accuracy on held-out training images of {name}: {refined.gain}.")

    def _evaluations(self, name: str, sha256: str) -> list[Result]:
        """The recorded evaluations of a set or a bundle on the prepared test images that count as the recipe's own."""
        settings, tests = evaluation_settings(self.recipe), self._test_set(name)
        wanted = (name, sha256, settings.track, settings.seed)
        recorded = read(self.results_file).results
        ours = [one for one in recorded if (one.dataset, one.sha256, one.track, one.seed) == wanted]
        if not ours or tests is None:
            return []
        device = resolve_device(self._device)
        differences = deviations_of(settings, tests, (IPC, IPC), device, budget=settings.budget)
        return [one for one in ours if (one.deviations, one.test_sha256) == (differences, tests.sha256)]

    def _test_set(self, name: str) -> TestSet | None:
        """The prepared test images of a dataset; None if it is not prepared."""
        if name not in self._test_sets and is_prepared(name):
            self._test_sets[name] = as_test_set(load_dataset(name, "test"), dataset_spec(name))
        return self._test_sets.get(name)

    def lacks_official(self) -> bool:
        """True if a set or bundle was not evaluated officially and can be: with the challenge's test images."""
        recorded = read(self.results_file).results
        official = {(one.dataset, one.sha256) for one in recorded if one.official}
        names = [name for name in self.recipe.datasets if dataset_spec(name).in_challenge]
        open_ones = [name for name in names if (name, self._sha256(name)) not in official]
        return any((tests := self._test_set(name)) is not None and tests.is_official for name in open_ones)

    def _is_evaluated(self, what: str, name: str) -> bool:
        path = self._tensor(what, name)
        return path.exists() and bool(self._evaluations(name, sha256_of(path)))

    def _evaluate_set(self, what: str, name: str, progress: Listener) -> None:
        self._evaluate([self._tensor(what, name)], name, progress)

    def _evaluate(self, files: list[Path | GeneratorFiles], name: str, progress: Listener) -> None:
        settings = JobSettings(
            evaluation_settings(self.recipe, self._device), dataset=name, results=self.results_file,
            state=StateFolder(self.folder / "runs" / "evaluations"),
        )  # fmt: skip
        evaluate_files(files, settings, progress=progress, on_event=self._on_event)

    def _is_generator_evaluated(self, name: str) -> bool:
        return bool(self._evaluations(name, self._sha256(name)))

    def _evaluate_generator(self, name: str, progress: Listener) -> None:
        from ddkit.packing.bundle import open_generators  # imports diffusers, which takes seconds

        with open_generators([self.zip_file], name) as generators:
            self._evaluate(list(generators), name, progress)

    def _is_bundled(self) -> bool:
        models = [self._model_folder(name) / FACTS_FILE for name in self.recipe.datasets]
        if not self.zip_file.exists() or not all(path.exists() for path in models):
            return False
        return all(self.zip_file.stat().st_mtime > path.stat().st_mtime for path in models)

    def _bundle(self, progress: Listener) -> None:
        from ddkit.packing.bundle import BundleModel, pack_bundle  # imports diffusers, which takes seconds

        # The whole budget, as on a slow or busy machine the first images take long; a few prove as much as many.
        most = max(dataset_spec(name).num_classes for name in self.recipe.datasets)
        settings = ProofSettings(evaluation_settings(self.recipe).budget or 0.0, most=most)
        models = [
            BundleModel(each.dataset, self._model_folder(each.dataset), each.bundle_settings) for each in self.recipe.sets
        ]
        packed = pack_bundle(
            models, self.zip_file, proof=settings, records=PackedRecords(packed_file(self.results_file)),
            recipe=str(self.folder / RECIPE_FILE), on_event=self._on_event, progress=progress,
        )  # fmt: skip
        for proof in packed.proofs:
            self._on_event(
                f"Without ddkit, the bundle made {proof.images:,} images of {proof.dataset} in {proof.seconds:.0f} s of its "
                f"{proof.budget:g} s."
            )
        self._say_what_is_missing("generator")

    def _pack(self, progress: Listener) -> None:
        """Check and pack; a set that the entry is not about may be missing."""
        pack(
            self.folder / "submission", self.zip_file,
            ignore_codes=(_MISSING_TENSOR,) if self._missing() else (), on_report=self._warn, on_event=self._on_event,
            records=PackedRecords(packed_file(self.results_file)), progress=progress,
        )  # fmt: skip
        self._say_what_is_missing("set")

    def _missing(self) -> list[str]:
        """The challenge's datasets that an entry with one of them leaves out."""
        missing = [spec.name for spec in CHALLENGE_DATASETS if spec.name not in self.recipe.datasets]
        return missing if len(missing) < len(CHALLENGE_DATASETS) else []

    def _say_what_is_missing(self, what: str) -> None:
        if missing := self._missing():
            self._on_event(f"The challenge also wants a {what} for {' and '.join(missing)}; {self.zip_file.name} has none.")

    def _warn(self, found: Report) -> None:
        for finding in found.findings:
            if finding.level == "warning":
                self._on_event(f"warning {finding.code}: {finding.message}")

    def _report(self, progress: Listener) -> None:
        self.results_file.parent.mkdir(parents=True, exist_ok=True)
        self.results_file.touch()  # the time may have been up before the first evaluation
        self.leaderboard = report(self.results_file, html=self.page, runs_folder=self.folder / "runs", progress=progress)
