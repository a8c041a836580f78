from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from ddkit.results import Result

CLASSES = {"cifar100": 100, "tinyimagenet": 200}


def make_result(name: str, dataset: str, *accuracies: float, epochs_setting: int = 1000, ipc: int = 10, **fields: Any):
    """A result as `ddkit evaluate` records it; official with three rounds of E = 1000."""
    classes = CLASSES.get(dataset, 4)
    official = epochs_setting == 1000 and len(accuracies) == 3 and dataset in CLASSES
    reasons = () if official else (f"E = {epochs_setting} instead of 1000",)
    known = {
        "track": 1,
        "sha256": hashlib.sha256(f"{name} {dataset} {accuracies}".encode()).hexdigest(),
        "source": f"{name}/{dataset}.pt",
        "images": classes * ipc,
        "images_per_class": (ipc, ipc),
        "official": official,
        "deviations": reasons,
        "date": "2026-07-12T10:00:00+00:00",
        "loss_curves": ((4.6, 3.0, 2.0, 1.5),) * len(accuracies),
        "per_class": tuple(c / classes for c in range(classes)),
        "confusions": ((0, 1, 20.5), (2, 3, 7.0)),
    }
    return Result(name=name, dataset=dataset, accuracies=accuracies, epochs_setting=epochs_setting, **(known | fields))


@pytest.fixture
def result() -> Callable[..., Result]:
    """Makes results: result(name, dataset, accuracy of each round ..., fields of Result)."""
    return make_result
