"""Where images come from: the layouts that people keep datasets in, recognized by content and not by name.

The layout may lie a few folders deep, next to other folders, or in an archive inside the folder or archive that is given.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from posixpath import join

import numpy as np
from numpy.typing import NDArray

from ddkit.challenge import CHALLENGE_DATASETS
from ddkit.data.archives import READ_ERRORS, FolderTree, Tree, ZipTree, first_bytes, is_tar, open_tar
from ddkit.data.arrays import read_arrays
from ddkit.data.cifar_archive import read_cifar
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.image_folders import read_image_folder
from ddkit.data.listing import LAYOUTS, IncompleteLayoutError, Pixels, Source, pixel_source
from ddkit.data.parquet import read_parquet
from ddkit.errors import BadDataError, MissingDataError, first_few
from ddkit.runtime.files import explain_os_error, why_not_a_file

_MAX_DEPTH = 3  # folders above a layout
_MOST_FOLDERS = 10_000  # that are searched for a layout
_MAX_NESTING = 2  # archives inside archives
_MOST_ARCHIVES = 20  # in one folder; more are shards of something else
_ARCHIVE_ENDINGS = (".zip", ".npz", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
_UNREAD = {b"7z\xbc\xaf": "7z", b"Rar!": "RAR", b"(\xb5/\xfd": "Zstandard"}
_SAVED_TO_DISK = (
    "It is what `save_to_disk` of Hugging Face's datasets writes. Convert it, and give the folder 'parquet': python -c "
    "\"from datasets import load_from_disk as load; d = load('{path}'); "
    "[d[s].to_parquet(f'parquet/{{s}}.parquet') for s in d]\""
)
_TOLERANCE = 0.5 / 255  # of a reference file's values, in units of [0, 1]


def open_source(path: Path, scratch: Path, *, classes: Sequence[str] = (), test_split: str | None = None) -> Source:
    """Find out what lies at `path` and list it.

    scratch: a folder for what has to be unpacked, which must stay as long as images are read.
    classes: where there are several datasets, the one with these class names is meant.
    test_split: the folder or file that becomes the test split ("val"), where several have labels.
    Raises MissingDataError if nothing is there, UsageError for a test split that is not there, BadDataError for what is
    damaged, hostile or in no known layout, BadFileError for what the system refuses.
    """
    if not path.exists():
        raise MissingDataError(f"{path} does not exist.", "Check the path given to --from.")
    tree = _open_tree(path, path, scratch)
    if isinstance(tree, ZipTree) and any(name.endswith("data.pkl") for name in tree.files):
        return _read_reference(path)
    search = _Search(scratch, frozenset(classes), test_split)
    saved_to_disk = any(name.endswith(".arrow") for name in tree.files)
    try:
        found = search.sources(tree)
    except IncompleteLayoutError:
        if not saved_to_disk:
            raise
        found = []
    found = [item for item in found if search.fits(item[1])] or found
    if len(found) > 1:
        places = first_few(sorted(place for place, _ in found))
        raise BadDataError(f"{path} holds several datasets: {places}.", "Give the path of one of them to --from.")
    if not found:
        remedy = _SAVED_TO_DISK.format(path=path) if saved_to_disk else LAYOUTS
        holds = first_few(sorted({*tree.folders[""][0], *tree.folders[""][1]})) or "nothing"
        raise BadDataError(f"{path} does not have a layout that ddkit knows; it holds {holds}.", remedy)
    return found[0][1]


def _open_tree(path: Path, file: Path, scratch: Path) -> Tree:
    """The tree of a folder or an archive. path: what it is called in messages. Raises BadDataError for other files."""
    if file.is_dir():
        return FolderTree(path)
    if problem := why_not_a_file(file):
        raise BadDataError(f"{path} {problem}.", LAYOUTS)
    beginning = first_bytes(file)
    if beginning.startswith(b"PK"):
        return ZipTree(path, file)
    if is_tar(beginning):
        return open_tar(path, scratch, file)
    if unread := next((kind for magic, kind in _UNREAD.items() if beginning.startswith(magic)), None):
        raise BadDataError(f"{path} is a {unread} archive, which ddkit does not read.", "Unpack it and give the folder.")
    raise BadDataError(f"{path} is neither a folder nor an archive.", LAYOUTS)


@dataclass(frozen=True)
class _Search:
    """The search for datasets in a tree. See `open_source` for the fields."""

    scratch: Path
    classes: frozenset[str]
    test_split: str | None

    def fits(self, source: Source) -> bool:
        """True if this is the dataset that is meant, as far as that is known."""
        return not self.classes or self.classes == set(source.class_names)

    def sources(self, tree: Tree, nesting: int = 0) -> list[tuple[str, Source]]:
        """The datasets that lie least deep, each with its place; deeper ones too while none of them is the one meant.

        Archives inside the tree are opened if it holds no such dataset itself. If nothing whole is found, what is
        incomplete or damaged is raised as a BadDataError.
        """
        problems: list[BadDataError] = []
        found: list[tuple[str, Source]] = []
        level = [""]
        for _ in range(_MAX_DEPTH + 1):
            below = []
            for folder in level[:_MOST_FOLDERS]:
                for read in (read_cifar, read_image_folder, read_arrays, partial(read_parquet, scratch=self.scratch)):
                    try:
                        if source := read(tree, folder, self.test_split):
                            found.append((folder or tree.path.name, source))
                            break
                    except IncompleteLayoutError as error:
                        problems.append(error)
                else:  # no layout begins here
                    below += [join(folder, name) for name in tree.folders[folder][0]]
            if any(self.fits(source) for _, source in found):
                return found
            level = below
        archives = [name for name in tree.files if name.count("/") < 2 and name.lower().endswith(_ARCHIVE_ENDINGS)]
        for name in archives[:_MOST_ARCHIVES] if nesting < _MAX_NESTING else ():
            try:
                found += self.sources(_open_tree(tree.path / name, self._copied(tree, name), self.scratch), nesting + 1)
            except BadDataError as error:
                problems.append(error)
        if problems and not found:
            raise problems[0]
        return found

    def _copied(self, tree: Tree, name: str) -> Path:
        """A file of a tree as one of the system. Raises BadDataError if it is damaged."""
        if isinstance(tree, FolderTree):
            return tree.path / name
        handle, copy = tempfile.mkstemp(dir=self.scratch)
        with os.fdopen(handle, "wb") as target:
            try:
                with tree.open(name) as source:
                    shutil.copyfileobj(source, target)
            except OSError as error:
                raise explain_os_error(error, error.filename or copy) from error
            except READ_ERRORS as error:
                raise BadDataError(f"{tree.path}: {name} is damaged: {error}.", "Get it again.") from error
        return Path(copy)


def _read_reference(path: Path) -> Source:
    """The challenge's own test file: `images_val` (N, 3, S, S) float32, normalized, and `labels_val` (N,) int64."""
    # Imported late, because they load torch, which no other layout needs.
    from ddkit.data.images import denormalize, to_uint8
    from ddkit.runtime.torch_file import TorchFileError, load_tensors

    try:
        images, labels = load_tensors(path, "images_val", "labels_val")
    except (TorchFileError, MemoryError) as error:
        raise BadDataError(f"{path} is not the challenge's test file: {error}.", LAYOUTS) from error
    spec = next((spec for spec in CHALLENGE_DATASETS if images.shape[1:] == spec.image_shape), None)
    if spec is None or labels.shape != images.shape[:1] or not images.is_floating_point():
        raise BadDataError(
            f"{path}: images_val is {images.dtype} {tuple(images.shape)} and labels_val {tuple(labels.shape)}, "
            "but none of the challenge's datasets has these shapes."
        )
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < spec.num_classes:
        raise BadDataError(f"{path}: labels_val has values outside the classes 0 to {spec.num_classes - 1}.")

    def pixels(rows: list[int]) -> NDArray[np.uint8]:
        unit = denormalize(images[rows], spec)
        if not bool(((unit > -_TOLERANCE) & (unit < 1 + _TOLERANCE)).all()):
            raise BadDataError(f"{path}: images_val was not normalized with the mean and standard deviation of {spec.name}.")
        return to_uint8(unit).numpy()

    test = Pixels(pixels, labels.long().numpy())
    return pixel_source("the challenge's test file", path, CLASS_NAMES[spec.name], {"test": test})
