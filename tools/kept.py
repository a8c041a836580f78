"""What the studies share: findings kept on disk as they are made, scores by the protocol, and how both are shown.

Imported by the scripts beside it, which Python finds as they are run from their own folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
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
from ddkit.generator.training.latents import LATENTS_FILE
from ddkit.generator.training.run_folder import CHECKPOINTS
from ddkit.runtime.files import read_json, sha256_of, write_json
from ddkit.sets.distilled import class_labels

Record = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What a study knows of each of its rows, by name; one JSON file for each in a folder of the row's own."""

    out: Path

    def claim(self, options: argparse.Namespace, rows: Sequence[str]) -> None:
        """Note what the findings were made with, and refuse to go on with anything else.

        rows: the options that say which rows there are, and may differ from call to call.
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
        """The row's own, for whatever belongs to it."""
        return self.out / name.replace(", ", "-").replace(" ", "-")

    def of(self, name: str) -> Record:
        """All that is known of a row."""
        path = self.folder(name) / "found.json"
        return read_json(path) if path.is_file() else {}

    def once(self, name: str, what: str, work: Callable[[], Any]) -> None:
        """Find out something of a row, unless it is known."""
        if what not in self.of(name):
            found = work()
            # Read again: another process may have found out something meanwhile.
            write_json(self.folder(name) / "found.json", {**self.of(name), what: found})
            print(f"{name}: {what}", file=sys.stderr, flush=True)

    def score(self, images: Tensor, spec: DatasetSpec, *, rounds: int, epochs_setting: int) -> list[float]:
        """The protocol's accuracy in each round of (N, 3, S, S) normalized images, class by class; fractions.

        Round r starts from the same weights for all sets. Stopped within a round, it goes on there.
        """
        done = evaluate(
            images, class_labels(spec.num_classes, len(images) // spec.num_classes), load_dataset(spec.name, "test"),
            rounds=rounds, epochs_setting=epochs_setting, spec=spec, state=StateFolder(self.out / "evaluations"),
        )  # fmt: skip
        return list(done.accuracies)


def _with_hash(path: Path) -> str:
    """The path of a file or a model's folder, and what lies there, which may be another one the next time."""
    digest = sha256_of(path) if path.is_file() else model_hash(path)
    return f"{path} ({digest[:12]})"


def share_latents(models: Iterable[Path], folder: Path) -> None:
    """Copy the encoded training set of another model, which is looked at before it is used, and so not made again."""
    target = folder / CHECKPOINTS / LATENTS_FILE
    found = [path for model in models if (path := model / CHECKPOINTS / LATENTS_FILE).is_file()]
    if found and not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found[0], target)


def percent(accuracies: Sequence[float]) -> str:
    """Mean and, of several rounds, standard deviation."""
    if not accuracies:
        return "-"
    values = [100 * accuracy for accuracy in accuracies]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


class Study(Protocol):
    """Does what is not done yet, and shows what is."""

    def run(self) -> None: ...

    def table(self) -> str: ...


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every study takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, help="the study's folder; default: runs/<study>-<dataset>")
    parser.add_argument("--table", action="store_true", help="only show what is known")
    return parser


def carry_out(begin: Callable[[argparse.Namespace], Study], options: argparse.Namespace) -> None:
    """Run the study of these options unless only its table is asked for, and print that."""
    try:
        study = begin(options)
        if not options.table:
            study.run()
        print(study.table())
    except DDKitError as error:
        raise SystemExit(str(error)) from error
