"""Which settings of refinement help most, and which validation shows it? One start set, refined with several settings.

    python tools/study_refine.py cifar100 [--methods NAME ...] [--seconds S ... | --steps N ...] [--start FILE]

Every method starts from the same random training images, or from the set FILE, and draws the same real images and
augmentations; every budget continues the one before. What each has reached, not its best by held-out images, is scored
on the test split at each E of --epochs-setting, round by round with the same networks, so that rows can be compared pair
by pair. With several E the table ends with the rank correlation of each with the largest. All that is finished is kept
in the folder: stopped, the study resumes when run again. --table shows what there is so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.store import dataset_spec, load_dataset, train_sha256
from ddkit.distill.generate import FromReal, generate
from ddkit.distill.refine import refine
from ddkit.distill.settings import PRESETS, RefineLimits, RefineSettings
from ddkit.distill.state import RefinementState
from ddkit.errors import DDKitError, UsageError
from ddkit.evaluation.evaluate import StateFolder, evaluate
from ddkit.runtime.files import read_json, sha256_of, write_json
from ddkit.runtime.tensor_files import save_torch
from ddkit.sets.distilled import class_labels, read_set

Record = dict[str, Any]
START = "start"
# By single changes to the preset track1. Those with a pool begin it at --pool-step.
METHODS: dict[str, dict[str, Any]] = {
    "random networks": {"pool.size": 0},
    "pool": {},
    "pool, float32": {"precision": "float32"},
    "pool, bfloat16": {"precision": "bfloat16"},
    "pool, ridge 0.02": {"krr_lambda": 0.02},
    "pool, age 1000, 5 updates": {"pool.max_age": 1000, "pool.updates": 5},
    "pool of 30": {"pool.size": 30},
    "pool, rate decays": {"final_rate": 0.1},
    "pool, rate 12": {"learning_rate": 12.0},
    "pool, rate 3": {"learning_rate": 3.0},
    "pool, 16 real": {"batch_real": 16},
    "pool, 64 real": {"batch_real": 64},
    "no spectrum": {"spectrum": 0.0},
    "no dm": {"dm_steps": 0},
    "dm": {"objective": "dm"},
    "mtt": {"objective": "mtt"},
}


@dataclass(frozen=True)
class Findings:
    """The findings of a study by the name of a row, in one JSON file for each row."""

    out: Path

    def claim(self, options: argparse.Namespace, rows: Sequence[str]) -> None:
        """Record the options that the findings depend on. Raises UsageError if the study was begun with other ones.

        rows: names of the options that select rows, which may differ from call to call.
        """
        free = {"out", "table", *rows}
        deciding = {name: value for name, value in vars(options).items() if name not in free}
        deciding["training images"] = train_sha256(options.dataset)[:12]
        # Through JSON, as those on disk went.
        asked = json.loads(json.dumps(deciding, default=_with_hash))
        path = self.out / "options.json"
        begun = read_json(path) if path.is_file() else asked
        changed = [f"{name} {begun.get(name)} (now {value})" for name, value in asked.items() if begun.get(name) != value]
        if changed:
            raise UsageError(
                f"The study in {self.out} was begun with other options: {', '.join(changed)}.", "Choose another --out."
            )
        if not options.table:
            write_json(path, asked)

    def folder(self, name: str) -> Path:
        """The folder for files of a row."""
        return self.out / name.replace(", ", "-").replace(" ", "-")

    def of(self, name: str) -> Record:
        """The findings of a row so far."""
        path = self.folder(name) / "found.json"
        return read_json(path) if path.is_file() else {}

    def once(self, name: str, what: str, work: Callable[[], Any]) -> None:
        """Compute and save the finding `what` of a row, unless it is there."""
        if what not in self.of(name):
            found = work()
            # Read again, because another process may have written a finding meanwhile.
            write_json(self.folder(name) / "found.json", {**self.of(name), what: found})
            print(f"{name}: {what}", file=sys.stderr, flush=True)

    def score(self, images: Tensor, spec: DatasetSpec, *, rounds: int, epochs_setting: int) -> list[float]:
        """The protocol's accuracy in each round of (N, 3, S, S) normalized images, class by class; fractions.

        Round r starts from the same weights for all sets. An interrupted round continues at the next call.
        """
        done = evaluate(
            images, class_labels(spec.num_classes, len(images) // spec.num_classes), load_dataset(spec.name, "test"),
            rounds=rounds, epochs_setting=epochs_setting, spec=spec, state=StateFolder(self.out / "evaluations"),
        )  # fmt: skip
        return list(done.accuracies)


class Study:
    """The methods on one dataset and their findings."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.findings = Findings(options.out or Path("runs") / f"study-refine-{options.dataset}")
        self.findings.claim(options, rows=("methods", "seconds", "steps", "epochs_setting", "rounds"))
        self.spec = dataset_spec(options.dataset)

    def run(self) -> None:
        """Compute everything that is missing."""
        start = self._start()
        images = read_set(start, self.spec.name).images
        for epochs in self.options.epochs_setting:
            what = self._what(RefineLimits(0), epochs)
            self.findings.once(START, what, lambda epochs=epochs: {"accuracies": self._score(images, epochs)})
        for method in self.options.methods:
            for limits in _budgets(self.options):
                for epochs in self.options.epochs_setting:
                    work = functools.partial(self._refined, start, method, limits, epochs)
                    self.findings.once(method, self._what(limits, epochs), work)

    def table(self) -> str:
        """The findings so far, as Markdown."""
        rows = []
        by_epochs: dict[str, dict[tuple[str, str], float]] = {}
        for method in (START, *METHODS):
            for what, record in self.findings.of(method).items():
                budget, epochs, _ = what.split(" / ")
                work = [f"{record.get(name, 0):.0f}" for name in ("steps", "seconds")]
                rows.append([method, budget, epochs, *work, percent(record["accuracies"])])
                by_epochs.setdefault(epochs, {})[method, budget] = mean(record["accuracies"])
        text = markdown(["method", "budget", "E", "steps", "seconds", "accuracy, %"], rows)
        return text + _rank_correlations(by_epochs)

    def _start(self) -> Path:
        if self.options.start:
            return self.options.start
        path = self.findings.out / f"{self.options.dataset}.pt"
        if not path.is_file():
            generate(self.options.dataset, self.options.ipc, FromReal("random", seed=self.options.seed), path)
        return path

    def _refined(self, start: Path, method: str, limits: RefineLimits, epochs: int) -> Record:
        """The result of a budget. Its set is saved, because the refinement continues from it."""
        folder = self.findings.folder(method)
        path = folder / f"after {_budget(limits)}.pt"
        if not path.is_file():
            earlier = [torch.load(kept, weights_only=True) for kept in folder.glob("after *.pt")]
            if any(limits.progress(kept["steps"], kept["seconds"]) >= 1 for kept in earlier):
                raise UsageError(f"'{method}' has gone further than {_budget(limits)}.", "Choose another --out.")
            refine(start, self.options.dataset, self._settings(method), limits, folder, out=folder / start.name)
            state = RefinementState.read(folder)
            save_torch({"images": state.average, "steps": state.step, "seconds": state.seconds}, path)
        kept = torch.load(path, weights_only=True)
        return {"steps": kept["steps"], "seconds": kept["seconds"], "accuracies": self._score(kept["images"], epochs)}

    def _settings(self, method: str) -> RefineSettings:
        # Validated in one epoch, and rarely: validation is not part of this study.
        base = dataclasses.replace(PRESETS["track1"], seed=self.options.seed, val_every=10**9, val_epochs=0)
        pool = {} if METHODS[method].get("objective") else {"pool.from_step": self.options.pool_step}
        return base.with_changes(pool | METHODS[method])

    def _score(self, images: Tensor, epochs: int) -> list[float]:
        return self.findings.score(images, self.spec, rounds=self.options.rounds, epochs_setting=epochs)

    def _what(self, limits: RefineLimits, epochs: int) -> str:
        return f"{_budget(limits)} / {epochs} / {self.options.rounds}"


def _with_hash(path: Path) -> str:
    """The path of a file with its hash, because another one may lie there the next time."""
    return f"{path} ({sha256_of(path)[:12]})"


def percent(accuracies: Sequence[float]) -> str:
    """The mean in percent, with the standard deviation if there are several rounds."""
    if not accuracies:
        return "-"
    values = [100 * accuracy for accuracy in accuracies]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _rank_correlations(by_epochs: dict[str, dict[tuple[str, str], float]]) -> str:
    """The ranks of the sets by each E, compared with the largest E, as a Markdown table; empty with one E or two sets."""
    rows = []
    largest = max(by_epochs, key=int, default="")
    for epochs in sorted(by_epochs, key=int):
        common = [row for row in by_epochs[epochs] if row in by_epochs[largest]]
        if epochs != largest and len(common) > 2:
            values = [[by_epochs[each][row] for row in common] for each in (epochs, largest)]
            rows.append([epochs, str(len(common)), f"{spearmanr(*values).statistic:.2f}"])
    return "\n\n" + markdown(["E", "sets", f"rank correlation with E = {largest}"], rows) if rows else ""


def _budget(limits: RefineLimits) -> str:
    return f"{limits.steps} steps" if limits.seconds is None else f"{limits.seconds:g} s"


def _budgets(options: argparse.Namespace) -> Iterator[RefineLimits]:
    """From the smallest, as a refinement only goes forward."""
    if options.steps:
        yield from (RefineLimits(steps) for steps in sorted(options.steps))
    else:
        yield from (RefineLimits(seconds=seconds) for seconds in sorted(options.seconds))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, help="the study's folder; default: runs/study-refine-<dataset>")
    parser.add_argument("--table", action="store_true", help="only show the findings so far")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=f"of: {'; '.join(METHODS)}"
    )
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0, 180.0], help="budgets of wall time")
    parser.add_argument("--steps", type=int, nargs="+", help="budgets of steps, in the place of --seconds")
    parser.add_argument("--start", type=Path, metavar="FILE", help="the set to start from, such as one refined before")
    parser.add_argument("--pool-step", type=int, default=800, help="step from which methods with a pool use it")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--epochs-setting", type=int, nargs="+", default=[100], help="E of the evaluations")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the start set and of every refinement")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    try:
        study = Study(options)
        if not options.table:
            study.run()
        print(study.table())
    except DDKitError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
