"""Whether the images are upright and in their own colors, told by a classifier of the real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.checks.classifier import ClassModel, class_model
from ddkit.data.images import denormalize
from ddkit.errors import BadDataError, MissingDataError, UsageError
from ddkit.sets.distilled import class_labels
from ddkit.sets.findings import Finding

_ROWS_COMPARED = 1000
_ROWS_SCREENED = 6  # every so many of them are turned first
_PROMISING = 1.0  # standard errors by which turned ones are better, to turn all
_CLEARLY_BETTER = 6.0  # standard errors by which turned images must show their classes better

_Turn = tuple[str, str, Callable[[Tensor], Tensor]]  # code, words, and what puts such images right
_TURNS: tuple[_Turn, ...] = (
    ("N006", "with red and blue exchanged (BGR for RGB)", lambda images: images.flip(1)),
    ("N008", "upside down", lambda images: images.flip(2)),
    # Which side is up; mirror images are of the same class, so that turning and transposing cannot be told apart.
    ("N008", "on their side (rows and columns exchanged, or turned a quarter)", lambda images: images.transpose(2, 3)),
    ("N008", "on their side (turned a quarter)", lambda images: images.transpose(2, 3).flip(2)),
)


def turned_findings(images: Tensor, spec: DatasetSpec, where: str) -> list[Finding]:
    """Whether the images show the classes of their rows clearly better once turned, or with red and blue exchanged.

    images: (C * ipc, 3, S, S) float32, normalized with `spec`. Codes N006 and N008; none where the real images are
    not prepared. The rows are taken to be in the right order: in another, a turn that makes some classes look like
    others would be believed.
    """
    try:
        model = class_model(spec.name)
    except (MissingDataError, UsageError, BadDataError):
        return []
    labels = class_labels(spec.num_classes, len(images) // spec.num_classes)
    rows = torch.arange(0, len(images), max(1, len(images) // _ROWS_COMPARED))
    # Units in which exchanging channels is exchanging colors.
    sample, labels = denormalize(images[rows], spec), labels[rows]
    few, few_labels = sample[::_ROWS_SCREENED], labels[::_ROWS_SCREENED]
    promising = [
        turn for turn, better in zip(_TURNS, _gains(model, few, few_labels, _TURNS), strict=True) if better > _PROMISING
    ]
    scores = _gains(model, sample, labels, promising) if promising else []
    best = max(range(len(scores)), key=scores.__getitem__, default=0)
    if not scores or scores[best] < _CLEARLY_BETTER:
        return []
    code, words, _ = promising[best]
    message = (
        f"The images seem to stand {words}: put right, a classifier of the real images finds the classes of their "
        f"rows better by {scores[best]:.1f} standard errors."
    )
    return [Finding("error", code, message, where)]


def _gains(model: ClassModel, images: Tensor, labels: Tensor, turns: Sequence[_Turn]) -> list[float]:
    """By how many standard errors the images show their classes better, turned in each of the ways."""
    as_is = _own_class_gain(model, images, labels)
    return [_mean_in_errors(_own_class_gain(model, turn(images), labels) - as_is) for _, _, turn in turns]


def _own_class_gain(model: ClassModel, images: Tensor, labels: Tensor) -> Tensor:
    """(N,): log-probability of each image's own class above the average, without what all images share."""
    logp = model.log_probabilities(images)
    logp = logp - logp.mean(dim=1, keepdim=True)
    logp = logp - logp.mean(dim=0)
    return logp.gather(1, labels[:, None]).flatten()


def _mean_in_errors(values: Tensor) -> float:
    if len(values) < 2:
        return 0.0  # a single image tells nothing of its error
    return float(values.mean() / (values.std() / len(values) ** 0.5).clamp_min(1e-9))
