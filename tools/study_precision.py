#!/usr/bin/env python3
"""Compare evaluations in float32 and in bfloat16, round by round: does bfloat16 change the accuracy?

    python tools/study_precision.py submission/cifar100.pt [--rounds N] [--epochs-setting E] [--state FOLDER]

Round r starts in both precisions from the same weights and draws the same shuffles and augmentations, so that the two can
be compared round by round. Finished rounds are saved in --state: an interrupted study continues there, and so does one with
more --rounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ddkit.data.store import load_dataset
from ddkit.errors import DDKitError
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, evaluate_source
from ddkit.evaluation.reference import TestSet, as_test_set
from ddkit.evaluation.sources import FixedSet
from ddkit.network.plan import PRECISIONS
from ddkit.runtime.device import describe_device, resolve_device
from ddkit.sets.distilled import read_set
from ddkit.statistics import Comparison, compare, sample_std

Accuracies = dict[str, tuple[float, ...]]  # of each precision, round by round


def main() -> None:
    arguments = _arguments()
    try:
        distilled = read_set(arguments.set, arguments.dataset)
        source = FixedSet(distilled.images, distilled.labels)
        test_set = as_test_set(load_dataset(distilled.spec.name, "test"), distilled.spec)
        # One more round at a time, which costs only that round: those before it are kept.
        for rounds in range(1, arguments.rounds + 1):
            accuracies = _accuracies(source, test_set, rounds, arguments)
            print(f"after {rounds} rounds: {_in_words(accuracies)}", flush=True)
    except DDKitError as error:
        raise SystemExit(str(error)) from error
    _print_table(accuracies)
    print(f"\n{arguments.set}, E = {arguments.epochs_setting}, {describe_device(resolve_device(arguments.device))}")
    if arguments.json:
        arguments.json.write_text(json.dumps(accuracies, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", type=Path, help="a distilled set for a prepared dataset")
    parser.add_argument("--dataset", help="name of the dataset  [default: from the JSON next to the set, or its file name]")
    parser.add_argument("--rounds", type=int, default=10, help="rounds in each precision, at least 2")
    parser.add_argument("--epochs-setting", type=int, default=30, help="E; E + 1 epochs run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--state", type=Path, default=Path("runs/study_precision"), help="save rounds in this folder")
    parser.add_argument("--json", type=Path, help="also write every round's accuracy to this file")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("one round says nothing about the noise: --rounds 2 or more")
    return arguments


def _accuracies(source: FixedSet, test_set: TestSet, rounds: int, arguments: argparse.Namespace) -> Accuracies:
    """The accuracies in both precisions; finished rounds are read back."""
    found = {}
    for precision in PRECISIONS:
        settings = EvaluationSettings(
            rounds=rounds,
            epochs_setting=arguments.epochs_setting,
            seed=arguments.seed,
            precision=precision,
            device=arguments.device,
        )
        found[precision] = evaluate_source(source, test_set, settings, state=StateFolder(arguments.state)).accuracies
    return found


def _in_words(accuracies: Accuracies) -> str:
    return ", ".join(f"{precision} {100 * sum(each) / len(each):.2f} %" for precision, each in accuracies.items())


def _print_table(accuracies: Accuracies) -> None:
    """One row for each precision, and one for the difference: means, deviations, standard errors, in points."""
    print("\n| | rounds | mean % | sd | standard error | 95 % interval of the difference | p |")
    print("|---|---|---|---|---|---|---|")
    for precision, each in accuracies.items():
        print(f"| {precision} | {_figures(each)} | | |")
    exact, rounded = (accuracies[precision] for precision in PRECISIONS)
    for paired in (True, False):
        print(_difference_row(compare(rounded, exact, paired=paired), rounded, exact))


def _figures(values: tuple[float, ...]) -> str:
    n, std = len(values), 100 * sample_std(values)
    return f"{n} | {100 * sum(values) / n:.2f} | {std:.2f} | {std / n**0.5:.2f}"


def _difference_row(comparison: Comparison, rounded: tuple[float, ...], exact: tuple[float, ...]) -> str:
    name = "bfloat16 - float32, " + ("paired" if comparison.paired else "unpaired")
    if comparison.paired:
        figures = _figures(comparison.differences)
    else:
        error = 100 * (sum(sample_std(each) ** 2 / len(each) for each in (rounded, exact))) ** 0.5
        figures = f"{len(rounded)} | {100 * comparison.difference:+.2f} | | {error:.2f}"
    low, high = comparison.interval
    return f"| {name} | {figures} | {100 * low:+.2f} to {100 * high:+.2f} | {comparison.p_value:.2f} |"


if __name__ == "__main__":
    main()
