"""The classes, splits and labels that a reader of a layout finds. `ddkit.data.prepare` turns them into a store.

Image files are only listed, and decoded later; layouts that hold pixels give them in blocks.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddkit.data.archives import Tree
from ddkit.data.class_names import SPLIT_NAMES, official_names
from ddkit.errors import BadDataError, UsageError

LAYOUTS = (
    "Known layouts: <split>/<class>/<image> with the splits train and test (or val); tiny-imagenet-200; cifar-100-python; "
    "Hugging Face parquet files; .npz arrays; each as a folder, a zip or a tar. Also the challenge's *_test.pt."
)
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class FileSplit:
    """A split of image files: their paths in the tree, ordered by class and then by name, and their labels."""

    tree: Tree
    names: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class PixelSplit:
    """A split of pixels. labels: ordered. blocks: gives the images in that order, (n, 3, S, S) uint8 at a time."""

    labels: tuple[int, ...]
    image_size: int
    blocks: Callable[[], Iterator[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Source:
    """The dataset that was found at a path.

    kind: the layout, in words. path: what the user calls it; None if the images are drawn. class_names: in label order.
    splits: "train" and "test", or "test" alone.
    class_titles, listed_order: see `ddkit.data.store.StoreFacts`.
    notes: sentences about choices that the user may want to make differently.
    numbered: whether the classes have no names, only numbers.
    """

    kind: str
    path: Path | None
    class_names: tuple[str, ...]
    splits: Mapping[str, FileSplit | PixelSplit]
    class_titles: tuple[str, ...] = ()
    listed_order: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    numbered: bool = False


class IncompleteLayoutError(BadDataError):
    """One split of a layout is there and another is not. A whole layout may lie elsewhere in the same tree."""


def file_split(tree: Tree, labels: Mapping[str, int]) -> FileSplit:
    """Files by path with their labels, ordered so that positions never depend on a folder's own order."""
    names = sorted(labels, key=lambda name: (labels[name], name))
    return FileSplit(tree, tuple(names), tuple(labels[name] for name in names))


@dataclass(frozen=True)
class Pixels:
    """Images in memory as a file holds them.

    rows: gives the images of some rows, (n, 3, S, S) uint8. labels: (N,) int64, in the file's own numbering.
    names: (N,) file names; may be empty.
    """

    rows: Callable[[list[int]], NDArray[np.uint8]]
    labels: NDArray[np.int64]
    names: Sequence[str] = ()


def pixel_source(kind: str, path: Path, class_names: Sequence[str], splits: Mapping[str, Pixels], **more: Any) -> Source:
    """Classes sorted by name, and images by class and file name, as an image folder of them would have it.

    class_names: in the file's own numbering. Raises BadDataError for labels without a class.
    """
    class_names = official_names(class_names)
    new_label = np.argsort(np.argsort(np.array(class_names), kind="stable"))
    ordered = {}
    for split, pixels in splits.items():
        if not 0 <= pixels.labels.min(initial=0) <= pixels.labels.max(initial=0) < len(class_names):
            raise BadDataError(f"{path}: '{split}' has labels beyond its {len(class_names)} class names.")
        labels, names = new_label[pixels.labels], pixels.names or [""] * len(pixels.labels)
        order = [row for *_, row in sorted(zip(labels.tolist(), names, range(len(labels)), strict=True))]
        blocks = functools.partial(_blocks, pixels, order)
        ordered[split] = PixelSplit(tuple(labels[order].tolist()), pixels.rows(order[:1]).shape[-1], blocks)
    return Source(kind, path, tuple(sorted(class_names)), ordered, **more)


def _blocks(pixels: Pixels, order: list[int]) -> Iterator[NDArray[np.uint8]]:
    return (pixels.rows(order[start : start + _ROWS_AT_ONCE]) for start in range(0, len(order), _ROWS_AT_ONCE))


def numbered_class(label: int, last: int) -> str:
    """The name of a class that has only a number, padded so that the order of such names is that of the numbers."""
    return f"{label:0{len(str(last))}}"


def split_word(name: str) -> str:
    """The last of the `SPLIT_NAMES` that is a word of a path: "valid" in "data/valid-00000-of-00001"; "" if there is none."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in (*SPLIT_NAMES["train"], *SPLIT_NAMES["test"])]
    return words[-1] if words else ""


def choose_splits(labeled: Collection[str], test_split: str | None, path: Path) -> tuple[str, str, tuple[str, ...]]:
    """(name of the training split, name of the test split, notes) among the split names that have labels.

    test_split: the one to take as the test split; None for the first of `SPLIT_NAMES`.
    Raises UsageError if it is not there, IncompleteLayoutError if there is no training or no test split.
    """
    train = next((name for name in SPLIT_NAMES["train"] if name in labeled), "")
    tests = [name for name in SPLIT_NAMES["test"] if name in labeled]
    if test_split is not None and test_split not in tests:
        have = f"Labeled ones are: {', '.join(tests)}." if tests else "It has no labeled test split."
        raise UsageError(f"{path} has no labeled images in a split '{test_split}'.", have)
    if not train or not tests:
        missing = "'test' (or 'val')" if train else "'train'"
        raise IncompleteLayoutError(f"{path} has no labeled images in {missing}.", LAYOUTS)
    chosen = test_split or tests[0]
    if test_split is not None or len(tests) == 1:
        return train, chosen, ()
    note = f"{path} has labeled images in {' and in '.join(tests)}; '{chosen}' became the test split. "
    return train, chosen, (f"{note}To take another one: --test-split {tests[1]} --force",)
