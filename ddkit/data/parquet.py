"""Hugging Face datasets as parquet files: data/train-00000-of-00001.parquet with image files and labels in its columns.

Classes are named by the files' own metadata, by dataset_infos.json or by the dataset's card, README.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from posixpath import join
from typing import IO, Any

from ddkit.data.archives import READ_ERRORS, DamagedFileError, FolderTree, PackedTree, Tree
from ddkit.data.class_names import official_names
from ddkit.data.listing import Source, choose_splits, file_split, numbered_class, split_word
from ddkit.errors import BadDataError, MissingDataError, first_few
from ddkit.runtime.files import explain_os_error

_IMAGE_COLUMNS = ("image", "img", "images", "jpg", "png", "webp")
_LABEL_COLUMNS = ("fine_label", "fine_labels", "label", "labels", "class", "target", "wnid")
_ROWS_AT_ONCE = 1024


def read_parquet(tree: Tree, folder: str, test_split: str | None, scratch: Path) -> Source | None:
    """The splits of the parquet files in a folder, in its `data`, or in its folders of splits.

    scratch: a folder for the image files, which are copied out of their columns; it must stay as long as they are needed.
    Raises MissingDataError if pyarrow is not installed, and BadDataError for files that are damaged or of something else.
    """
    shards: dict[str, list[str]] = defaultdict(list)
    for below in ("", *(name for name in tree.folders[folder][0] if name.lower() == "data" or split_word(name))):
        place = join(folder, below) if below else folder
        for name in tree.folders[place][1]:
            if name.lower().endswith(".parquet") and (word := split_word(name.removesuffix("parquet")) or split_word(below)):
                shards[word].append(join(place, name))
    if not shards:
        return None
    handle, blob = tempfile.mkstemp(suffix=".images", dir=scratch)
    with os.fdopen(handle, "wb") as target:
        copy = _Copy(tree, target)
        labels = {word: copy.add(names) for word, names in shards.items()}
    # Where the labels of a test split are kept secret, they are all -1 or missing.
    labeled = {word for word, values in labels.items() if not set(values.values()) <= {None, -1}}
    train, test, notes = choose_splits(labeled, test_split, tree.path)
    chosen = {"train": labels[train], "test": labels[test]}
    names = copy.class_names or _names_beside(tree, folder, copy.label_column)
    class_of = _class_of(tree.path, chosen, names)
    class_names = tuple(sorted(set(class_of.values())))
    place_of = {name: label for label, name in enumerate(class_names)}
    images = PackedTree(tree.path, Path(blob), copy.index)
    splits = {
        split: file_split(images, {path: place_of[class_of[value]] for path, value in values.items()})
        for split, values in chosen.items()
    }
    numbered = not names and all(isinstance(value, int) for value in class_of)
    return Source("parquet files", tree.path, class_names, splits, notes=notes, numbered=numbered)


class _Copy:
    """The image files of parquet files, written one after another to `target`.

    index: where each of them is. label_column, class_names: as the files say; empty if they do not.
    """

    def __init__(self, tree: Tree, target: IO[bytes]) -> None:
        self._tree, self._target = tree, target
        self.index: dict[str, tuple[int, int]] = {}
        self.label_column = ""
        self.class_names: list[str] = []

    def add(self, shards: Sequence[str]) -> dict[str, Any]:
        """Copy the images of one split; the label of each. Raises BadDataError, MissingDataError or BadFileError."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise MissingDataError(
                f"{self._tree.path} holds parquet files, and pyarrow, which reads them, is not installed.",
                "Install it: pip install 'ddkit[parquet]'",
            ) from error
        labels = {}
        for shard in sorted(shards):
            try:
                with self._tree.open(shard) as opened:  # parquet files are read from the end
                    source = opened if isinstance(self._tree, FolderTree) else io.BytesIO(opened.read())
                    file = pyarrow.parquet.ParquetFile(source)
                    image_column, self.label_column = self._columns(shard, file.schema_arrow)
                    with contextlib.suppress(ValueError, LookupError, TypeError):
                        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
                        self.class_names = self.class_names or list(features[self.label_column]["names"])
                    row = 0
                    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[image_column, self.label_column]):
                        values = batch.column(self.label_column).to_pylist()
                        for image, value in zip(batch.column(image_column).to_pylist(), values, strict=True):
                            data = (image.get("bytes") if isinstance(image, dict) else image) or b""
                            labels[path := f"{shard}, row {row:07}"] = value
                            self.index[path] = (self._target.tell(), len(data))
                            row += 1
                            try:
                                self._target.write(data)
                            except OSError as error:
                                raise explain_os_error(error, self._target.name) from error
            except (pyarrow.ArrowException, *READ_ERRORS) as error:
                raise BadDataError(f"{self._tree.path}: {shard} is damaged: {error}.", "Get it again.") from error
        return labels

    def _columns(self, shard: str, schema: Any) -> tuple[str, str]:
        """The names of the columns of images and of labels. Raises BadDataError."""
        images = [name for name in _IMAGE_COLUMNS if name in schema.names and "binary" in str(schema.field(name).type)]
        labels = [name for name in _LABEL_COLUMNS if name in schema.names and not schema.field(name).type.num_fields]
        if not images or not labels:
            kind = "image files" if not images else "labels"
            raise BadDataError(
                f"{self._tree.path}: {shard} has no column of {kind}; it has {first_few(schema.names, 10)}.",
                "Images are looked for in the columns 'image' and 'img', labels in 'fine_label' and 'label'.",
            )
        return images[0], labels[0]


def _class_of(path: Path, labels: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[Any, str]:
    """The class name of each label. Raises BadDataError for labels without a name, and for classes of one split only."""
    found = {split: set(values.values()) for split, values in labels.items()}
    values = found["train"] | found["test"]
    known = range(len(names)) if names else range(2**63)
    if unknown := [value for value in values if value is None or (isinstance(value, int) and value not in known)]:
        raise BadDataError(f"{path}: there are rows with the label {unknown[0]!r}, which has no class name.")
    if differing := sorted(map(str, found["train"] ^ found["test"])):
        raise BadDataError(f"{path}: only one of the splits has the classes {first_few(differing)}.", "Add or remove them.")
    ordered = sorted(values)
    of_numbers = (names[value] if names else numbered_class(value, ordered[-1]) for value in ordered if isinstance(value, int))
    spelled = official_names(list(of_numbers) or [str(value) for value in ordered])
    return dict(zip(ordered, spelled, strict=True))


def _names_beside(tree: Tree, folder: str, column: str) -> list[str]:
    """The class names that a dataset's card or dataset_infos.json gives, here or above; empty if there are none."""
    parts = folder.split("/") if folder else []
    for depth in range(len(parts), -1, -1):
        place = "/".join(parts[:depth])
        for file in ("README.md", "dataset_infos.json"):
            if file not in tree.folders[place][1]:
                continue
            with contextlib.suppress(DamagedFileError, UnicodeDecodeError):
                text = tree.read(join(place, file)).decode("utf-8-sig")
                for info in _infos(text, file):
                    with contextlib.suppress(LookupError, TypeError, AttributeError, ValueError, StopIteration):
                        if names := _names_in(info["features"], column):
                            return names
    return []


def _infos(text: str, file: str) -> list[Any]:
    """The descriptions of a dataset's configurations, as its card or dataset_infos.json has them."""
    if file.endswith(".json"):
        with contextlib.suppress(ValueError, AttributeError):
            return list(json.loads(text).values())
        return []
    import yaml

    with contextlib.suppress(yaml.YAMLError, LookupError, AttributeError):
        infos = yaml.safe_load(text.split("---")[1]).get("dataset_info", [])
        return infos if isinstance(infos, list) else [infos]
    return []


def _names_in(features: Any, column: str) -> list[str]:
    """The class names in a description of a dataset's columns, which is a mapping or a list of them."""
    if isinstance(features, Mapping):
        names = features[column]["names"]
    else:
        names = next(item["dtype"]["class_label"]["names"] for item in features if item["name"] == column)
    return [names[key] for key in sorted(names, key=int)] if isinstance(names, Mapping) else list(names)
