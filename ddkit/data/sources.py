"""Where images come from: one reader per layout, recognized by content and not by name.

A reader lists what there is and its labels; `ddkit.data.prepare` turns that into a store. Image files are decoded
only then; layouts that hold pixels already give them in blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddkit.challenge import CHALLENGE_DATASETS, DatasetSpec
from ddkit.data.archives import DamagedMemberError, FolderTree, Tree, ZipTree
from ddkit.data.cifar_archive import CifarArchive, CifarSplit, cifar_folder, read_folder, read_tar
from ddkit.data.class_names import CLASS_NAMES
from ddkit.errors import BadDataError, MissingDataError
from ddkit.runtime.files import explain_os_error, why_not_a_file

if TYPE_CHECKING:
    from torch import Tensor

_LAYOUTS = (
    "Known layouts: <split>/<class>/<image> with splits train and test (or val), as a folder or a zip; "
    "tiny-imagenet-200 as a folder or zip; cifar-100-python as a folder or tar.gz; the challenge's *_test.pt."
)


_ZIP, _GZIP, _TAR = b"PK", b"\x1f\x8b", b"ustar"  # how these files begin; a tar says so at byte 257
_ROWS_AT_ONCE = 1024
_TOLERANCE = 0.5 / 255  # of a reference file's values, in units of [0, 1]


@dataclass(frozen=True)
class FileSplit:
    """A split of image files: their paths inside the source, ordered by class and name, and their labels."""

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
    """What was found at a path.

    kind: the layout, in words. path: None where the images are drawn. class_names: sorted as strings.
    splits: "train" and "test", or "test" alone.
    class_titles, listed_order: see `ddkit.data.store.StoreFacts`.
    """

    kind: str
    path: Path | None
    class_names: tuple[str, ...]
    splits: Mapping[str, FileSplit | PixelSplit]
    class_titles: tuple[str, ...] = ()
    listed_order: tuple[str, ...] = ()


def open_source(path: str | os.PathLike[str]) -> Source:
    """Find out what lies at `path` and list it.

    Raises MissingDataError when nothing is there, BadDataError for what is damaged, hostile or of no known layout, BadFileError
    for what the system refuses.
    """
    path = Path(path)
    if path.is_dir():
        if (folder := cifar_folder(path)) is not None:
            return _cifar_source(path, read_folder(folder))
        return _tree_source(FolderTree(path))
    if not path.exists():
        raise MissingDataError(f"There is no {path}.", "Check the path given to --from.")
    if problem := why_not_a_file(path):
        raise BadDataError(f"{path} {problem}.", _LAYOUTS)
    beginning = _first_bytes(path)
    if beginning.startswith(_GZIP) or _is_tar(beginning):
        return _cifar_source(path, read_tar(path))
    if beginning.startswith(_ZIP):
        tree = ZipTree(path)
        return _reference_source(path) if tree.is_torch_file() else _tree_source(tree)
    raise BadDataError(f"{path} is neither a folder nor an archive.", _LAYOUTS)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise explain_os_error(error, path) from error


def _is_tar(beginning: bytes) -> bool:
    return beginning[257:262] == _TAR


def _tree_source(tree: Tree) -> Source:
    """The layouts that are image files, in a folder or in a zip."""
    files, folders = tree.names()
    for top in _possible_tops(files):
        listing = _Listing(tree, top, _below(files, top), _below(folders, top))
        for read in (_read_tiny_imagenet, _read_image_folder):
            if (source := read(tree.path, listing)) is not None:
                return source
    raise BadDataError(f"{tree.path} has no layout that ddkit knows; it holds {_glimpse(files, folders)}.", _LAYOUTS)


@dataclass(frozen=True)
class _Listing:
    """The files and folders below `top`, relative to it; `top` is "" or ends in "/"."""

    tree: Tree
    top: str
    files: list[str]
    folders: list[str]

    def text(self, name: str) -> list[str]:
        """The lines of a text file. Raises BadDataError naming it."""
        try:
            return self.tree.read(self.top + name).decode("utf-8").splitlines()
        except (DamagedMemberError, UnicodeDecodeError) as error:
            raise BadDataError(f"{self.tree.path}: {self.top}{name} cannot be read: {error}.") from error


def _read_tiny_imagenet(path: Path, listing: _Listing) -> Source | None:
    """train/<wnid>/images/*, val/images/* labeled by val/val_annotations.txt; words.txt has the words of each wnid."""
    if "val/val_annotations.txt" not in listing.files:
        return None
    train = [name for name in listing.files if _matches(name, "train", "*", "images", "*")]
    wnids = tuple(sorted(name.split("/")[1] for name in listing.folders if _matches(name, "train", "*")))
    if not wnids:
        raise BadDataError(f"{path} looks like tiny-imagenet-200, but has no train/<wnid>/images.", "Get all of it again.")
    place = {wnid: k for k, wnid in enumerate(wnids)}
    labels = {name: place[name.split("/")[1]] for name in train}
    splits = {
        "train": _file_split(listing, labels),
        "test": _file_split(listing, _tiny_imagenet_validation(path, listing, place)),
    }
    words = _words(listing)
    listed = tuple(listing.text("wnids.txt")) if "wnids.txt" in listing.files else ()
    titles = tuple(words.get(wnid, wnid) for wnid in wnids)
    return Source("tiny-imagenet-200", path, wnids, splits, titles, listed if set(listed) == set(wnids) else ())


def _tiny_imagenet_validation(path: Path, listing: _Listing, place: Mapping[str, int]) -> dict[str, int]:
    """The labels of val/images by file name."""
    present = {name for name in listing.files if _matches(name, "val", "images", "*")}
    labels = {}
    for number, line in enumerate(listing.text("val/val_annotations.txt"), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in place:
            raise BadDataError(f"{path}: line {number} of val_annotations.txt names the class {wnid!r}, which train lacks.")
        if f"val/images/{name}" not in present:
            raise BadDataError(f"{path}: val_annotations.txt names {name}, which is not there.", "Get all of it again.")
        labels[f"val/images/{name}"] = place[wnid]
    if unlabeled := sorted(present - set(labels)):
        raise BadDataError(f"{path}: val_annotations.txt has no class for {unlabeled[0]}.", "Get all of it again.")
    return labels


def _words(listing: _Listing) -> dict[str, str]:
    """wnid -> the first of its words ("goldfish" of "goldfish, Carassius auratus")."""
    if "words.txt" not in listing.files:
        return {}
    lines = (line.partition("\t") for line in listing.text("words.txt"))
    return {wnid: words.partition(",")[0].strip() for wnid, _, words in lines if words}


def _read_image_folder(path: Path, listing: _Listing) -> Source | None:
    """<split>/<class>/<image>; the test split may be called val."""
    folders = {
        split: sorted(name.split("/")[1] for name in listing.folders if _matches(name, split, "*"))
        for split in ("train", "test", "val")
    }
    test = "test" if folders["test"] else "val"
    if not folders["train"] and not folders[test]:
        return None
    for split in ("train", test):
        if not folders[split]:
            needed = "train" if split == "train" else "test (or val)"
            raise BadDataError(f"{path} has no folder '{needed}' with a folder for each class.", _LAYOUTS)
    _refuse_class_mismatch(path, folders["train"], folders[test], test)
    place = {name: k for k, name in enumerate(folders["train"])}
    splits = {}
    for split, folder in (("train", "train"), ("test", test)):
        files = [name for name in listing.files if name.startswith(f"{folder}/") and name.count("/") > 1]
        if deeper := [name for name in files if name.count("/") > 2]:
            raise BadDataError(f"{path}: {deeper[0]} lies deeper than <split>/<class>/<image>.", _LAYOUTS)
        splits[split] = _file_split(listing, {name: place[name.split("/")[1]] for name in files})
        _refuse_empty_classes(path, folder, folders["train"], splits[split])
    return Source("image folder", path, tuple(folders["train"]), splits)


def _refuse_class_mismatch(path: Path, train: Sequence[str], test: Sequence[str], test_folder: str) -> None:
    """Two names that differ only by case are one folder on some systems; classes that only one split has are a mistake."""
    seen: dict[str, str] = {}
    for name in sorted({*train, *test}):
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise BadDataError(f"{path}: the classes '{other}' and '{name}' differ only by case.", "Rename or merge them.")
    if extra := sorted(set(test) - set(train)):
        raise BadDataError(f"{path}: {test_folder} has classes that train lacks: {some(extra)}.", "Add or remove them.")
    if missing := sorted(set(train) - set(test)):
        raise BadDataError(f"{path}: {test_folder} lacks classes that train has: {some(missing)}.", "Add or remove them.")


def _refuse_empty_classes(path: Path, folder: str, class_names: Sequence[str], split: FileSplit) -> None:
    filled = set(split.labels)
    if empty := [name for label, name in enumerate(class_names) if label not in filled]:
        raise BadDataError(f"{path}: no images in {some([f'{folder}/{name}' for name in empty])}.", "Add some, or remove it.")


def _file_split(listing: _Listing, labels: Mapping[str, int]) -> FileSplit:
    """Ordered by class, then by file name, so that labels and positions never depend on a folder's own order."""
    names = sorted(labels, key=lambda name: (labels[name], name))
    return FileSplit(tuple(listing.top + name for name in names), tuple(labels[name] for name in names))


def _cifar_source(path: Path, archive: CifarArchive) -> Source:
    """Classes sorted by name, and images by class and file name, as an image folder of them would have it."""
    names = tuple(sorted(archive.class_names))
    place = np.array([names.index(name) for name in archive.class_names])
    splits = {split: _ordered(content, place[content.labels]) for split, content in archive.splits.items()}
    return Source("cifar-100-python", path, names, splits)


def _ordered(content: CifarSplit, labels: NDArray[np.int64]) -> PixelSplit:
    names = content.names or [""] * len(labels)
    order = sorted(range(len(labels)), key=lambda row: (labels[row], names[row]))

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(order), _ROWS_AT_ONCE):
            yield content.images[order[start : start + _ROWS_AT_ONCE]]

    return PixelSplit(tuple(labels[order].tolist()), content.images.shape[-1], blocks)


def _reference_source(path: Path) -> Source:
    """The challenge's own test file: `images_val` (N, 3, S, S) float32, normalized, and `labels_val` (N,) int64."""
    images, labels = _reference_tensors(path)
    spec = next((spec for spec in CHALLENGE_DATASETS if images.shape[1:] == spec.image_shape), None)
    if spec is None or labels.shape != images.shape[:1] or not images.is_floating_point():
        raise BadDataError(
            f"{path}: images_val is {images.dtype} {tuple(images.shape)} and labels_val {tuple(labels.shape)}, "
            "which is none of the challenge's datasets."
        )
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < spec.num_classes:
        raise BadDataError(f"{path}: labels_val is not of classes 0 to {spec.num_classes - 1}.")
    order = labels.argsort(stable=True)

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(order), _ROWS_AT_ONCE):
            yield _pixels(images[order[start : start + _ROWS_AT_ONCE]], spec, path)

    split = PixelSplit(tuple(labels[order].tolist()), spec.image_size, blocks)
    return Source("the challenge's test file", path, CLASS_NAMES[spec.name], {"test": split})


def _reference_tensors(path: Path) -> tuple[Tensor, Tensor]:
    """images_val and labels_val. Raises BadDataError for files of anything else, or of code, which is not run."""
    from ddkit.runtime.torch_file import TorchFileError, load_tensors

    try:
        images, labels = load_tensors(path, "images_val", "labels_val")
    except (TorchFileError, MemoryError) as error:
        raise BadDataError(f"{path} is not the challenge's test file: {error}.", _LAYOUTS) from error
    return images, labels


def _pixels(normalized: Tensor, spec: DatasetSpec, path: Path) -> NDArray[np.uint8]:
    """Back from normalized values to uint8. Raises BadDataError where they were normalized with other constants."""
    from ddkit.data.images import denormalize, to_uint8

    unit = denormalize(normalized, spec)
    if not bool(((unit > -_TOLERANCE) & (unit < 1 + _TOLERANCE)).all()):
        raise BadDataError(f"{path}: images_val was not normalized with the mean and standard deviation of {spec.name}.")
    return to_uint8(unit).numpy()


def _possible_tops(files: Sequence[str]) -> list[str]:
    """Where the layout may begin: at the root, or in the one folder that holds everything."""
    tops = {name.partition("/")[0] for name in files if "/" in name}
    return ["", f"{tops.pop()}/"] if len(tops) == 1 else [""]


def _below(names: Sequence[str], top: str) -> list[str]:
    return [name[len(top) :] for name in names if name.startswith(top)]


def _matches(name: str, *pattern: str) -> bool:
    """Whether the path has exactly these parts; "*" stands for any."""
    parts = name.split("/")
    return len(parts) == len(pattern) and all(want in ("*", part) for part, want in zip(parts, pattern, strict=True))


def _glimpse(files: Sequence[str], folders: Sequence[str]) -> str:
    top = sorted({name.partition("/")[0] for name in (*files, *folders)})
    return some(top) if top else "nothing"


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
