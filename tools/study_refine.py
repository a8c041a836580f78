"""Which way of refining brings most in the same time? One start set, refined in several ways, scored by the protocol.

    python tools/study_refine.py cifar100 [--methods NAME ...] [--seconds S ... | --steps N ...] [--start FILE]

Every method starts from the same random training images, or the set FILE, and draws the same real images and
augmentations; every budget goes on from the one before. What each has reached, not its best by held-out images, is
scored on the test split, round by round with the same networks, so that rows can be compared pair by pair. All that is
finished is kept in the folder: stopped, it goes on when run again. --table shows what there is so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from ddkit.data.store import dataset_spec, load_dataset, store_hash
from ddkit.distill.generate import FromReal, generate
from ddkit.distill.observers import ObserverSettings
from ddkit.distill.refine import Limits, RefineSettings, refine
from ddkit.distill.state import RefinementState
from ddkit.files import read_json, write_json
from ddkit.protocol.evaluate import StateFolder, evaluate
from ddkit.submission.layout import load_tensor, row_labels

Record = dict[str, Any]
START = "start"
_TRAINED = ObserverSettings(trained_share=0.5)
METHODS: dict[str, dict[str, Any]] = {
    "published": {"learning_rate": 1.0, "average": 0.0},
    "rate 3": {"learning_rate": 3.0, "average": 0.0},
    "averaged": {"learning_rate": 1.0},
    "rate 3, averaged": {"learning_rate": 3.0},
    "rate 10, averaged": {"learning_rate": 10.0},
    "long average": {"learning_rate": 3.0, "average": 0.99},
    "32 real": {"learning_rate": 3.0, "real_per_class": 32},
    "half trained": {"learning_rate": 3.0, "observers": _TRAINED},
    "half trained, recognised": {"learning_rate": 3.0, "observers": _TRAINED, "recognition": 0.1},
    "regression": {"objective": "regression"},
}


class Study:
    """The methods on one dataset and what is known of each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out or Path("runs") / f"study-refine-{options.dataset}"
        self.spec = dataset_spec(options.dataset)
        self.found = self.out / "found.json"

    def run(self) -> None:
        """Everything that is not done yet."""
        start = self._start()
        self._once(self._row(START, Limits(0)), lambda: self._score(load_tensor(start, self.spec)))
        for method in self.options.methods:
            for limits in _budgets(self.options):
                work = functools.partial(self._refined, start, method, limits)
                self._once(self._row(method, limits), work)

    def table(self) -> str:
        """What is known, as Markdown."""
        lines = ["| method | budget | E | steps | seconds | accuracy, % |", "|---|---|---|---|---|---|"]
        for row, record in self._known().items():
            work = [f"{record.get(name, 0):.0f}" for name in ("steps", "seconds")]
            lines.append("| " + " | ".join([*row.split(" / "), *work, _percent(record["accuracies"])]) + " |")
        return "\n".join(lines)

    def _start(self) -> Path:
        if self.options.start:
            return self.options.start
        path = self.out / f"{self.options.dataset}.pt"
        if not path.is_file():
            generate(self.options.dataset, self.options.ipc, FromReal("random", seed=self.options.seed), path)
        return path

    def _refined(self, start: Path, method: str, limits: Limits) -> Record:
        settings = self._settings(method)
        folder = self.out / method.replace(", ", "-").replace(" ", "-")
        refine(start, self.options.dataset, settings, limits, folder, out=folder / start.name)
        state = RefinementState.read(folder, dataclasses.asdict(settings), store_hash(self.options.dataset, "train"))
        return {"steps": state.step, "seconds": state.seconds, **self._score(state.average)}

    def _settings(self, method: str) -> RefineSettings:
        # Judged by one epoch, and rarely: that is no part of this study.
        common = {"seed": self.options.seed, "check_every": 10**9, "check_epochs": 0}
        return RefineSettings(**common, **METHODS[method])

    def _score(self, images: Tensor) -> Record:
        labels = row_labels(self.spec.num_classes, len(images) // self.spec.num_classes)
        done = evaluate(
            images, labels, load_dataset(self.options.dataset, "test"), rounds=self.options.rounds,
            epochs_setting=self.options.epochs_setting, spec=self.spec, state=StateFolder(self.out / "evaluations"),
        )  # fmt: skip
        return {"accuracies": list(done.accuracies)}

    def _row(self, method: str, limits: Limits) -> str:
        budget = f"{limits.steps} steps" if limits.seconds is None else f"{limits.seconds:g} s"
        return f"{method} / {budget} / {self.options.epochs_setting}"

    def _once(self, row: str, work: Callable[[], Record]) -> None:
        if row not in self._known():
            record = work()
            write_json(self.found, {**self._known(), row: record})
            print(f"{row}: {_percent(record['accuracies'])} %", file=sys.stderr, flush=True)

    def _known(self) -> dict[str, Record]:
        return read_json(self.found) if self.found.is_file() else {}


def _budgets(options: argparse.Namespace) -> Iterator[Limits]:
    """From the smallest on, as a refinement only goes forward."""
    if options.steps:
        yield from (Limits(steps) for steps in sorted(options.steps))
    else:
        yield from (Limits(seconds=seconds) for seconds in sorted(options.seconds))


def _percent(accuracies: Sequence[float]) -> str:
    values = [100 * accuracy for accuracy in accuracies]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
                        help=f"of: {'; '.join(METHODS)}")
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0, 180.0], help="budgets of wall time")
    parser.add_argument("--steps", type=int, nargs="+", help="budgets of steps, in the place of --seconds")
    parser.add_argument("--start", type=Path, metavar="FILE", help="the set to start from, such as one refined before")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--epochs-setting", type=int, default=100, help="E of the evaluations")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the start set and of every refinement")
    parser.add_argument("--out", type=Path, help="default: runs/study-refine-<dataset>")
    parser.add_argument("--table", action="store_true", help="only show what is known")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    study = Study(options)
    if not options.table:
        study.run()
    print(study.table())


if __name__ == "__main__":
    main()
