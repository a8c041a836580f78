"""Sets as papers' repositories publish them: images with labels, in the layouts of their own code.

The challenge's file is one bare tensor. Others save `[images, labels]`, a list of `[image, label]`, a dict, a tensor for each
class, two files next to each other, or a folder of `<class>/<image>`. Nothing in a file is executed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.archives import DamagedFileError, FolderTree
from ddkit.data.class_names import SPLIT_NAMES, plain_name
from ddkit.data.decoding import BadImageError, WrongSizeError, read_image
from ddkit.data.store import class_names, class_titles
from ddkit.errors import DDKitError, InvalidSubmissionError, UsageError
from ddkit.runtime.files import explain_os_error, why_not_a_file
from ddkit.runtime.torch_file import Global, Pairs, StoredTensor, TorchFile, TorchFileError, as_dict
from ddkit.sets.distilled import class_labels
from ddkit.sets.reading import describe_value, foreign_names, runs_code, unreadable

_IMAGE_KEYS = (
    "images", "image", "data", "x", "imgs", "img", "image_syn", "images_syn", "syn_images", "syn_data", "synthetic_images",
    "x_syn", "images_train", "train_images", "x_train", "distilled_images", "images_best", "images_val",
)  # fmt: skip
_LABEL_KEYS = (
    "labels", "label", "targets", "target", "y", "lbls", "label_syn", "labels_syn", "syn_labels", "synthetic_labels",
    "y_syn", "labels_train", "train_labels", "y_train", "distilled_labels", "labels_best", "labels_val",
)  # fmt: skip
_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_OF_ARGUMENTS = Global("argparse", "Namespace")  # the settings of a program, which many save with their images


@dataclass(frozen=True)
class LabeledImages:
    """The images and labels of a published set as they are in its file.

    images: (N, 3, S, S), uint8 or floating point, normalized in whatever way. labels: (N,) int64, in any order.
    layout: what the file holds, in words. notes: a sentence on each choice that was made in reading it.
    one_file: False for a folder, and if the labels lie in a second file. reduced: True if the labels were soft ones, which
    were reduced to their largest class.
    """

    images: Tensor
    labels: Tensor
    layout: str
    notes: tuple[str, ...] = ()
    one_file: bool = True
    reduced: bool = False


def is_published_folder(path: Path) -> bool:
    """True for a folder that may hold images by class: any that does not hold tensors."""
    return path.is_dir() and not any(path.glob("*.pt"))


def holds_containers(path: Path) -> bool:
    """True for a file of torch.save that holds a list, a tuple or a dict."""
    try:
        with _opened(path) as opened:
            return isinstance(opened.value, (list, tuple)) or as_dict(opened.value) is not None
    except DDKitError:
        return False


def read_published(path: Path, spec: DatasetSpec, *, argmax: bool = False) -> LabeledImages:
    """Read a published set without executing anything in it.

    spec: the dataset that its images are for. argmax: reduce soft labels to their largest class; otherwise they are
    refused. Raises InvalidSubmissionError, which says what the file holds, UsageError for a pipe or a device, and
    BadFileError if the system refuses the file.
    """
    if path.is_dir():
        return _read_folder(path, spec)
    with _opened(path) as opened:
        return _Published(path, opened, spec, argmax).read()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TorchFile]:
    """A file of torch.save, whose damage is named by an InvalidSubmissionError, in this context too."""
    try:
        if problem := why_not_a_file(path):
            raise UsageError(f"{path} {problem}.", "Name a .pt file.")
        with path.open("rb") as file:
            try:
                yield TorchFile(file)
            except TorchFileError as error:
                raise InvalidSubmissionError(f"{path}: {unreadable(error, file, path.name).message}") from error
    except OSError as error:
        raise explain_os_error(error, path) from error


@dataclass
class _Published:
    """A file of torch.save that holds a published set. Fields as in `read_published` and, once it is read, `LabeledImages`."""

    path: Path
    opened: TorchFile
    spec: DatasetSpec
    argmax: bool
    reduced: bool = False

    def read(self) -> LabeledImages:
        if foreign := foreign_names(self.opened.names - {_OF_ARGUMENTS}):
            raise self._refused(runs_code(foreign, self.path.name).message)
        value = self.opened.value
        found = None
        if isinstance(value, StoredTensor):
            found = self._of_tensor(value)
        elif (entries := as_dict(value)) is not None:
            found = self._of_dict(entries)
        elif isinstance(value, (list, tuple)):
            found = self._of_sequence(value)
        if found is None:
            described, _ = describe_value(self.opened, value, self.spec)
            raise InvalidSubmissionError(
                f"{self.path} holds {described}. ddkit finds no images with labels in it.",
                "Save them as a list of two tensors: torch.save([torch.as_tensor(images), torch.as_tensor(labels)], PATH).",
            )
        if not self.opened.whole:
            raise self._refused("It has too many parts to be read. Stack them: torch.save([images, labels], PATH).")
        return found

    def _of_tensor(self, images: StoredTensor) -> LabeledImages:
        if neighbor := labels_next_to(self.path):
            with _opened(neighbor) as opened:
                if not isinstance(opened.value, StoredTensor):
                    raise InvalidSubmissionError(f"{neighbor} does not hold the labels of {self.path.name} as one tensor.")
                labels = self._labels(opened.load(opened.value), _count(images))
            return replace(self._made(images, labels, f"images, with their labels in {neighbor.name}"), one_file=False)
        count, classes = _count(images), self.spec.num_classes
        if count == 0 or count % classes:
            raise self._refused(
                f"It holds {count:,} images without labels, which is not a multiple of the {classes} classes of "
                f"{self.spec.name}. Save the labels with them: torch.save([images, labels], PATH)."
            )
        return self._made(images, class_labels(classes, count // classes), "one tensor, class by class")

    def _of_sequence(self, items: Sequence[Any]) -> LabeledImages | None:
        kind = type(items).__name__
        if len(items) == 2 and (pair := self._pair(*items)):
            return self._made(*pair, f"a {kind} of images and labels")
        tensors = [self._tensor(item) for item in items]
        stacks = [tensor for tensor in tensors if tensor is not None and len(tensor.shape) == 4]
        if len(stacks) == len(items) == self.spec.num_classes:
            return self._by_class(dict(enumerate(stacks)), f"a {kind} of a tensor for each class")
        pairs = [item for item in items if isinstance(item, (list, tuple)) and len(item) == 2]
        if not items or len(pairs) != len(items):
            return None
        if first := self._pair(*pairs[0]):
            notes = [f"It holds {len(pairs)} sets, of which the first is evaluated."] if len(pairs) > 1 else []
            return self._made(*first, f"a {kind} of images and labels", notes)
        images = [self._tensor(image) for image, _ in pairs]
        loaded = [self._load(image) for image in images if image is not None and len(image.shape) == 3]
        labels = [self._number(label) for _, label in pairs]
        known = [label for label in labels if label is not None]
        if len(loaded) != len(pairs) or len(known) != len(pairs):
            return None
        if len({(image.shape, image.dtype) for image in loaded}) > 1:
            raise self._refused("Its images differ in shape or type.")
        targets = self._labels(_as_tensor(known), len(loaded))
        return self._made(torch.stack(loaded), targets, f"a {kind} of images with a label each")

    def _of_dict(self, entries: Pairs) -> LabeledImages | None:
        named = {plain_name(key): value for key, value in entries.items if isinstance(key, str)}
        images = next((named[key] for key in _IMAGE_KEYS if key in named), None)
        labels = next((named[key] for key in _LABEL_KEYS if key in named), None)
        if pair := self._pair(images, labels):
            return self._made(*pair, "a dict of images and labels")
        numbered = {key: tensor for key, value in entries.items if (tensor := self._tensor(value)) is not None}
        if numbered and all(type(key) is int and len(tensor.shape) == 4 for key, tensor in numbered.items()):
            return self._by_class(numbered, "a dict of a tensor for each class")
        # In the code of dataset condensation, the images and labels of several runs lie under "data".
        return self._of_sequence(images) if isinstance(images, (list, tuple)) else None

    def _by_class(self, tensors: Mapping[int, StoredTensor], layout: str) -> LabeledImages:
        self._require_classes(_as_tensor(tensors))
        loaded = {label: self._load(tensors[label]) for label in sorted(tensors)}
        if len({(tensor.shape[1:], tensor.dtype) for tensor in loaded.values()}) > 1:
            raise self._refused("The images of its classes differ in shape or type.")
        labels = torch.cat([torch.full((len(tensor),), label) for label, tensor in loaded.items()])
        return self._made(torch.cat(list(loaded.values())), labels, layout)

    def _pair(self, images: Any, labels: Any) -> tuple[StoredTensor, Tensor] | None:
        """The images and their labels, if that is what the two values are; None otherwise."""
        stored = self._tensor(images)
        if stored is None or len(stored.shape) != 4:
            return None
        values = self._tensor(labels)
        if values is not None and len(values.shape) in (1, 2):
            return stored, self._labels(self._load(values), _count(stored))
        if isinstance(labels, (list, tuple)) and labels and all(type(label) is int for label in labels):
            return stored, self._labels(_as_tensor(labels), _count(stored))
        return None

    def _labels(self, values: Tensor, count: int) -> Tensor:
        """(N,) int64 from class numbers, one-hot rows or, if they may be reduced, soft labels."""
        if len(values) != count:
            raise self._refused(f"It holds {count:,} images and {len(values):,} labels.")
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        values = values.long() if values.dtype == torch.bool else values
        whole = not values.is_floating_point() or bool((values == values.round()).all())
        if values.ndim == 2:
            if values.shape[1] != self.spec.num_classes:
                raise self._refused(
                    f"Its labels have {values.shape[1]} values for each image; {self.spec.name} has {self.spec.num_classes} "
                    "classes."
                )
            one_hot = whole and bool((values.sum(1) == 1).all()) and bool((values.amin(1) == 0).all())
            if not one_hot and not self.argmax:
                raise InvalidSubmissionError(
                    f"{self.path} has soft labels, (N, {self.spec.num_classes}) probabilities or logits. The challenge trains "
                    "with hard ones.",
                    "Reduce them to their largest class with --argmax, which loses what the soft labels say.",
                )
            if values.isnan().any():
                raise self._refused("Its soft labels hold values that are NaN.")
            self.reduced = not one_hot
            values = values.argmax(dim=1)
        elif not whole:
            raise self._refused("Its labels are numbers with fractions, which are not classes.")
        labels = values.long()
        self._require_classes(labels)
        return labels

    def _require_classes(self, labels: Tensor) -> None:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.spec.num_classes:
            raise self._refused(
                f"Its labels run from {int(labels.min())} to {int(labels.max())}; the classes of {self.spec.name} are 0 to "
                f"{self.spec.num_classes - 1}."
            )

    def _made(self, images: StoredTensor | Tensor, labels: Tensor, layout: str, notes: Sequence[str] = ()) -> LabeledImages:
        values = images if isinstance(images, Tensor) else self._load(images)
        notes = [*(["Its soft labels were reduced to their largest class."] if self.reduced else []), *notes]
        side = self.spec.image_size
        if tuple(values.shape[1:]) == (side, side, 3):
            values = values.permute(0, 3, 1, 2)
            notes.append("Its images are channels last; their dimensions were exchanged.")
        if values.ndim != 4 or tuple(values.shape[1:]) != self.spec.image_shape or len(values) == 0:
            raise self._refused(
                f"Its images have the shape {tuple(values.shape)}; {self.spec.name} has (N, 3, {side}, {side})."
            )
        if values.is_complex() or values.dtype == torch.bool:
            raise self._refused(f"Its images are {str(values.dtype).removeprefix('torch.')}.")
        if not values.is_floating_point() and values.dtype != torch.uint8:
            if int(values.min()) < 0 or int(values.max()) > 255:
                raise self._refused("Its images are whole numbers beyond 0 to 255.")
            values = values.to(torch.uint8)
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise self._refused("Its images hold values that are NaN or infinite.")
        whole = values if values.dtype == torch.uint8 else values.float()
        return LabeledImages(whole.contiguous(), labels, layout, tuple(notes), reduced=self.reduced)

    def _tensor(self, value: Any) -> StoredTensor | None:
        return value if isinstance(value, StoredTensor) else self.opened.stored_tensor(value)

    def _load(self, stored: StoredTensor) -> Tensor:
        if stored.overlaps():  # a few bytes could claim to be any number of images
            raise self._refused("A tensor in it is expanded from fewer numbers. Save tensor.clone().")
        return self.opened.load(stored)

    def _number(self, value: Any) -> int | None:
        """The class that a label of one image says; None if it is no whole number."""
        if type(value) is int:
            return value
        stored = self._tensor(value)
        if stored is None or stored.numel != 1:
            return None
        return int(self._labels(self._load(stored).reshape(1), 1))

    def _refused(self, reason: str) -> InvalidSubmissionError:
        return InvalidSubmissionError(f"{self.path}: {reason}")


def _as_tensor(labels: Iterable[int]) -> Tensor:
    """(N,) int64; whole numbers beyond 64 bits, which are no classes, become the nearest that there are."""
    limits = torch.iinfo(torch.int64)
    return torch.tensor([min(max(label, limits.min), limits.max) for label in labels])


def _count(stored: StoredTensor) -> int:
    """The size of the first dimension; 0 for a single number."""
    return stored.shape[0] if stored.shape else 0


def labels_next_to(path: Path) -> Path | None:
    """The file of labels that belongs to a file of images, as trajectory matching saves both; None if there is none."""
    for word, other in (("images", "labels"), ("image", "label"), ("imgs", "lbls"), ("data", "labels")):
        if re.search(rf"(^|[\W_]){word}([\W_]|$)", path.stem):
            neighbor = path.with_name(re.sub(rf"(^|(?<=[\W_])){word}(?=[\W_]|$)", other, path.stem) + path.suffix)
            if neighbor.is_file() and neighbor != path:
                return neighbor
    return None


def _read_folder(path: Path, spec: DatasetSpec) -> LabeledImages:
    """The images of a folder of `<class>/<image>`, or of the training split of `<split>/<class>/<image>`."""
    tree = FolderTree(path)
    tops = tree.folders[""][0]
    # A class may be named like a split, as CIFAR-100's trains are: only a split holds folders.
    split = next((name for name in tops if name.lower() in SPLIT_NAMES["train"] and tree.folders[name][0]), "")
    folders = tree.folders[split][0] if split else tops
    labels = _labels_of(path, folders, spec)
    images, targets = [], []
    for folder in folders:
        place = f"{split}/{folder}" if split else folder
        for name in tree.folders[place][1]:
            if not name.lower().endswith(_IMAGE_ENDINGS):
                raise InvalidSubmissionError(f"{path}: {place}/{name} is not an image.", "Remove it, or name another folder.")
            try:
                images.append(torch.tensor(read_image(tree.read(f"{place}/{name}"), spec.image_size)))
            except WrongSizeError as error:
                raise InvalidSubmissionError(
                    f"{path}: {place}/{name} is {error} pixels; {spec.name} has {spec.image_size} x {spec.image_size}.",
                    "Resize the images first, as the set's authors do it.",
                ) from error
            except (BadImageError, DamagedFileError) as error:
                raise InvalidSubmissionError(f"{path}: {place}/{name} cannot be read: {error}.") from error
            targets.append(labels[folder])
    if not images:
        raise InvalidSubmissionError(f"{path} holds no images in folders of classes.", "The layout is <class>/<image>.")
    return LabeledImages(torch.stack(images), torch.tensor(targets), "a folder of <class>/<image>", one_file=False)


def _labels_of(path: Path, folders: Sequence[str], spec: DatasetSpec) -> dict[str, int]:
    """The label of each folder by the class that its name, title or number says. Raises InvalidSubmissionError."""
    known: dict[str, int] = {}
    for names in (class_titles(spec.name), class_names(spec.name)):
        known |= {plain_name(name): label for label, name in enumerate(names)}
    by_name = {folder: known[plain_name(folder)] for folder in folders if plain_name(folder) in known}
    if folders and len(by_name) == len(folders):
        return by_name
    numbers = {folder: int(match[1]) for folder in folders if (match := re.fullmatch(r"\D*(\d{1,6})", folder))}
    if folders and len(numbers) == len(folders) == len({*numbers.values()}) and max(numbers.values()) < spec.num_classes:
        return numbers
    strange = next((folder for folder in folders if folder not in by_name), "")
    raise InvalidSubmissionError(
        f"{path}: the folder '{strange}' is not a class of {spec.name}." if strange else f"{path} has no folders of classes.",
        f"Name the folders after the classes, or by their numbers 0 to {spec.num_classes - 1}.",
    )
