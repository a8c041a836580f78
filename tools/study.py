"""A study: findings that are kept on disk as they are made, scores by the protocol, and tables of both.

The study_* scripts import this module, which Python finds because it lies in the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.store import load_dataset, store_hash
from ddkit.errors import DDKitError, UsageError
from ddkit.evaluation.evaluate import StateFolder, evaluate
from ddkit.generator.model_folder import model_hash
from ddkit.runtime.files import read_json, sha256_of, write_json
from ddkit.sets.distilled import class_labels

Record = dict[str, Any]


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
        deciding["training images"] = store_hash(options.dataset, "train")[:12]
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


def _with_hash(path: Path) -> str:
    """The path of a file or a model's folder with its hash, because another one may lie there the next time."""
    digest = sha256_of(path) if path.is_file() else model_hash(path)
    return f"{path} ({digest[:12]})"


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


class Study(Protocol):
    """`run` computes what is missing; `table` shows what there is."""

    def run(self) -> None: ...

    def table(self) -> str: ...


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that every study takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, help="the study's folder; default: runs/<study>-<dataset>")
    parser.add_argument("--table", action="store_true", help="only show the findings so far")
    return parser


def run_study(begin: Callable[[argparse.Namespace], Study], options: argparse.Namespace) -> None:
    """Run the study of these options, unless --table was given, and print its table."""
    try:
        study = begin(options)
        if not options.table:
            study.run()
        print(study.table())
    except DDKitError as error:
        raise SystemExit(str(error)) from error
