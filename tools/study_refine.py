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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.data.store import dataset_spec
from ddkit.distill.experts import ExpertSettings
from ddkit.distill.generate import FromReal, generate
from ddkit.distill.refine import PRESETS, Limits, RefineSettings, refine
from ddkit.distill.state import RefinementState
from ddkit.distill.student import StudentSettings
from ddkit.errors import UsageError
from ddkit.runtime.tensor_files import save_torch
from ddkit.sets.distilled import load_tensor
from kept import Findings, Record, arguments_of, carry_out, markdown, percent

START = "start"
_OF_EXPERTS = ("experts", "expert_steps", "student_images")
# By single changes to what the defaults once were, as the findings in tools/README.md name them.
_PLAIN = {"learning_rate": 3.0, "average": 0.97, "spectrum": 0.0, "real_per_class": 16}
_FROM_PLAIN: dict[str, dict[str, Any]] = {
    "published": {"learning_rate": 1.0, "average": 0.0},
    "rate 3": {"average": 0.0},
    "averaged": {"learning_rate": 1.0},
    "rate 3, averaged": {},
    "rate 10, averaged": {"learning_rate": 10.0},
    "long average": {"average": 0.99},
    "32 real": {"real_per_class": 32},
    "attention": {"attention": 100.0},
    "more attention": {"attention": 1000.0},
    "half trained": {"trained_share": 0.5},
    "half trained, recognized": {"trained_share": 0.5, "recognition": 0.1},
    "regression": {"objective": "regression", "means_first": 0},
    "means, then regression": {"objective": "regression", "means_first": 100},
    "means, then half trained regression": {"objective": "regression", "means_first": 100, "trained_share": 0.5},
    "trajectories": {"objective": "trajectories", "means_first": 0},
    "means, then trajectories": {"objective": "trajectories", "means_first": 100},
}
METHODS: dict[str, dict[str, Any]] = {
    **{name: {**_PLAIN, **changes} for name, changes in _FROM_PLAIN.items()},
    "track1": {"objective": "regression"},
    "track1, no spectrum": {"objective": "regression", "spectrum": 0.0},
    "track1, 16 real": {"objective": "regression", "real_per_class": 16},
    "track1, 64 real": {"objective": "regression", "real_per_class": 64},
    "track1, no means": {"objective": "regression", "means_first": 0},
}


class Study:
    """The methods on one dataset and what is known of each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.findings = Findings(options.out or Path("runs") / f"study-refine-{options.dataset}")
        self.findings.claim(options, rows=("methods", "seconds", "steps", "epochs_setting", "rounds", *_OF_EXPERTS))
        self.spec = dataset_spec(options.dataset)

    def run(self) -> None:
        """Everything that is not done yet."""
        start = self._start()
        what = self._what(Limits(0))
        self.findings.once(START, what, lambda: {"accuracies": self._score(load_tensor(start, self.spec))})
        for method in self.options.methods:
            for limits in _budgets(self.options):
                name = self._row(method)
                work = functools.partial(self._refined, start, method, name, limits)
                self.findings.once(name, self._what(limits), work)

    def table(self) -> str:
        """What is known, as Markdown."""
        rows = []
        for method in (START, *map(self._row, METHODS)):
            for what, record in self.findings.of(method).items():
                work = [f"{record.get(name, 0):.0f}" for name in ("steps", "seconds")]
                rows.append([method, *what.split(" / ")[:2], *work, percent(record["accuracies"])])
        return markdown(["method", "budget", "E", "steps", "seconds", "accuracy, %"], rows)

    def _start(self) -> Path:
        if self.options.start:
            return self.options.start
        path = self.findings.out / f"{self.options.dataset}.pt"
        if not path.is_file():
            generate(self.options.dataset, self.options.ipc, FromReal("random", seed=self.options.seed), path)
        return path

    def _row(self, method: str) -> str:
        """The method, and what else the experts' rows depend on."""
        if not self._settings(method).needs_experts_at(10**9):
            return method
        return f"{method}, " + ", ".join(f"{name} {getattr(self.options, name)}" for name in _OF_EXPERTS)

    def _refined(self, start: Path, method: str, name: str, limits: Limits) -> Record:
        """What a budget comes to. The set it led to is kept, as the refinement goes on from it."""
        settings, folder = self._settings(method), self.findings.folder(name)
        path = folder / f"after {_budget(limits)}.pt"
        if not path.is_file():
            if any(_reached(limits, torch.load(kept, weights_only=True)) for kept in folder.glob("after *.pt")):
                raise UsageError(f"'{name}' has gone further than {_budget(limits)}.", "Choose another --out.")
            refine(start, self.options.dataset, settings, limits, folder, out=folder / start.name)
            state = RefinementState.read(folder)
            save_torch({"images": state.average, "steps": state.step, "seconds": state.seconds}, path)
        kept = torch.load(path, weights_only=True)
        return {"steps": kept["steps"], "seconds": kept["seconds"], "accuracies": self._score(kept["images"])}

    def _settings(self, method: str) -> RefineSettings:
        # Judged by one epoch, and rarely: that is no part of this study.
        options = self.options
        common = {
            "seed": options.seed, "check_every": 10**9, "check_epochs": 0,
            "experts": ExpertSettings(options.experts, options.expert_steps),
            "student": StudentSettings(images_per_class=options.student_images),
        }  # fmt: skip
        return dataclasses.replace(PRESETS["means"], **common, **METHODS[method])

    def _score(self, images: Tensor) -> list[float]:
        return self.findings.score(images, self.spec, rounds=self.options.rounds, epochs_setting=self.options.epochs_setting)

    def _what(self, limits: Limits) -> str:
        return f"{_budget(limits)} / {self.options.epochs_setting} / {self.options.rounds}"


def _reached(limits: Limits, kept: dict[str, Any]) -> bool:
    return limits.reached(kept["steps"], kept["seconds"])


def _budget(limits: Limits) -> str:
    return f"{limits.steps} steps" if limits.seconds is None else f"{limits.seconds:g} s"


def _budgets(options: argparse.Namespace) -> Iterator[Limits]:
    """From the smallest on, as a refinement only goes forward."""
    if options.steps:
        yield from (Limits(steps) for steps in sorted(options.steps))
    else:
        yield from (Limits(seconds=seconds) for seconds in sorted(options.seconds))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments_of(__doc__)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=f"of: {'; '.join(METHODS)}"
    )
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0, 180.0], help="budgets of wall time")
    parser.add_argument("--steps", type=int, nargs="+", help="budgets of steps, in the place of --seconds")
    parser.add_argument("--start", type=Path, metavar="FILE", help="the set to start from, such as one refined before")
    parser.add_argument("--experts", type=int, default=3, help="of trajectories and half trained; not counted")
    parser.add_argument("--expert-steps", type=int, default=1000, help="of each expert's training")
    parser.add_argument("--student-images", type=int, default=1, help="of each class, in a step that follows an expert")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--epochs-setting", type=int, default=100, help="E of the evaluations")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the start set and of every refinement")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    carry_out(Study, options)


if __name__ == "__main__":
    main()
