"""Test sets: pixels that are normalized a batch at a time, or the normalized floats of a reference file."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddkit.challenge import BATCH_SIZE, DATASETS, DatasetSpec
from ddkit.data.images import denormalize, normalize_
from ddkit.data.store import ImageSet
from ddkit.errors import BadDataError, UsageError
from ddkit.evaluation.official_tests import is_official
from ddkit.evaluation.sources import hash_of
from ddkit.runtime.device import upload
from ddkit.runtime.files import explain_os_error, why_not_a_file
from ddkit.runtime.torch_file import TorchFileError, load_tensors

_IMAGES_KEY, _LABELS_KEY = "images_val", "labels_val"
# Real test pixels lie within 3.1 deviations of either dataset's mean; pixels that are not normalized are never negative.
_LARGEST_NORMALIZED = 10.0
_FURTHEST_FROM_WHOLE = 0.05  # pixels of [0, 255], normalized and back


@dataclass(frozen=True)
class TestSet:
    """A test set of one dataset.

    images: (N, 3, S, S), uint8 pixels or float32 already normalized with the spec's constants.
    labels: (N,) int64 in [0, spec.num_classes).
    """

    __test__ = False  # pytest would collect the class by its name

    images: Tensor
    labels: Tensor
    spec: DatasetSpec

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def sha256(self) -> str:
        return hash_of(self.images, self.labels)

    @functools.cached_property
    def is_official(self) -> bool:
        """True if these are the challenge's test images with their labels: see `ddkit.evaluation.official_tests`."""
        pixels = self.images if self.images.dtype == torch.uint8 else self._pixels()
        return self.spec.in_challenge and pixels is not None and is_official(self.spec.name, pixels, self.labels)

    def _pixels(self) -> Tensor | None:
        """(N, 3, S, S) uint8 from normalized floats; None if they are further from whole numbers than rounding explains."""
        pixels = torch.empty(self.images.shape, dtype=torch.uint8)
        for part, into in zip(self.images.split(BATCH_SIZE), pixels.split(BATCH_SIZE), strict=True):
            raw = denormalize(part, self.spec) * 255
            whole = raw.round().clamp_(0, 255)
            if (raw - whole).abs().max() > _FURTHEST_FROM_WHOLE:
                return None
            into.copy_(whole)
        return pixels

    def batches(self, device: torch.device) -> Iterator[Tensor]:
        """Normalized float32 batches in file order. Pixels stay uint8 until their batch is due."""
        for pixels in self.images.split(BATCH_SIZE):
            images = upload(pixels, device).float()
            # In place: copies of this size leave the allocator with gaps that the next one does not fit into, which
            # add up to half a gigabyte over 10,000 images.
            yield normalize_(images, self.spec) if pixels.dtype == torch.uint8 else images


def as_test_set(
    data: ImageSet | Mapping[str, Tensor] | tuple[Tensor, Tensor] | TestSet, spec: DatasetSpec | None = None
) -> TestSet:
    """A checked TestSet from an ImageSet, a reference dict as in `*_test.pt`, or normalized (images, labels).

    spec: the dataset; None finds it among the built-in ones by number of classes and image size. A TestSet keeps its own.
    Raises BadDataError for other sizes, values that are not normalized, labels out of range.
    """
    if isinstance(data, TestSet):
        return _checked(data, "The test set")
    if isinstance(data, ImageSet):
        spec = spec or _spec_like(len(data.class_names), data.images.shape[-1])
        return _checked(TestSet(data.images, data.labels, spec), "The test set")
    pair: Any = (data.get(_IMAGES_KEY), data.get(_LABELS_KEY)) if isinstance(data, Mapping) else data
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(item, Tensor) for item in pair):
        raise BadDataError(
            f"The reference does not hold the tensors '{_IMAGES_KEY}' and '{_LABELS_KEY}'.",
            "The challenge's reference files are dicts of these two.",
        )
    images, labels = pair
    if spec is None:
        # A reference file names no classes; the challenge's test sets hold images of every one.
        spec = _spec_like(int(labels.max()) + 1 if labels.numel() else 0, images.shape[-1])
    return _checked(TestSet(images, labels.long().cpu(), spec), "The reference")


def load_reference(path: str | os.PathLike[str], spec: DatasetSpec) -> TestSet:
    """Read the challenge's `{dataset}_test.pt`. Raises BadDataError that names the file if it is not such a file."""
    try:
        if problem := why_not_a_file(path):
            raise BadDataError(f"{path} {problem}.")
        images, labels = load_tensors(path, _IMAGES_KEY, _LABELS_KEY)
    except OSError as error:
        raise explain_os_error(error, path) from error
    except (TorchFileError, MemoryError) as error:
        raise BadDataError(f"{path} cannot be read as a reference file: {error}.") from error
    return _checked(TestSet(images, labels.long(), spec), str(path))


def _checked(test_set: TestSet, name: str) -> TestSet:
    images, labels, spec = test_set.images, test_set.labels, test_set.spec
    if images.ndim != 4 or tuple(images.shape[1:]) != spec.image_shape:
        raise BadDataError(f"{name} holds images of shape {tuple(images.shape[1:])}, {spec.name} has {spec.image_shape}.")
    if labels.shape != (len(images),) or len(images) == 0:
        raise BadDataError(f"{name} holds {len(images)} images and labels of shape {tuple(labels.shape)}.")
    if int(labels.min()) < 0 or int(labels.max()) >= spec.num_classes:
        raise BadDataError(
            f"{name} has labels from {int(labels.min())} to {int(labels.max())}, "
            f"{spec.name} has classes 0 to {spec.num_classes - 1}."
        )
    if images.dtype == torch.uint8:
        return test_set
    if not images.is_floating_point():
        raise BadDataError(f"{name} holds {images.dtype} images, expected uint8 pixels or normalized float32.")
    low, high = (float(bound) for bound in images.aminmax())
    # A comparison with nan is false, so this refuses nan too.
    if not (-_LARGEST_NORMALIZED < low < 0.0 < high < _LARGEST_NORMALIZED):
        raise BadDataError(
            f"{name} has values from {low:.4g} to {high:.4g}, which are not normalized images.",
            f"Normalize pixels in [0, 1] with mean {spec.mean} and std {spec.std}.",
        )
    return test_set


def _spec_like(num_classes: int, image_size: int) -> DatasetSpec:
    for spec in DATASETS.values():
        if (spec.num_classes, spec.image_size) == (num_classes, image_size):
            return spec
    raise UsageError(
        f"No built-in dataset has {num_classes} classes of {image_size}-pixel images.",
        "Name the dataset: evaluate(..., spec=ddkit.data.store.dataset_spec(name)).",
    )
