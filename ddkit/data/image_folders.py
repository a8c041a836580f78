"""Folders of image files: <split>/<class>/<image>, and tiny-imagenet-200 in all the forms in which people keep it.

An image may also lie in <split>/<class>/images. A test split may instead be labeled by its annotations, lines of a file's
name and a class, as TinyImageNet's validation images are; and many sort these into folders afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from posixpath import join

from ddkit.data.archives import DamagedFileError, Tree
from ddkit.data.class_names import SPLIT_NAMES, official_names
from ddkit.data.listing import LAYOUTS, FileSplit, IncompleteLayoutError, Source, choose_splits, file_split
from ddkit.errors import BadDataError, first_few

_IMAGES = "images"  # TinyImageNet's folder between a class, or a split without classes, and its images
_NOT_IMAGES = {"", ".txt", ".csv", ".tsv", ".md", ".json", ".xml", ".html"}


@dataclass
class _Split:
    """One split folder. labels: class names by file; empty if it is not labeled.

    folders: the classes that have a folder. unlabeled: files that lie in no class's folder.
    """

    folder: str
    labels: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    unlabeled: list[str] = field(default_factory=list)


def read_image_folder(tree: Tree, top: str, test_split: str | None) -> Source | None:
    """Train and test images by class, if the folder `top` has split folders.

    test_split: the name of the test split, for those that have several; None for the first of `SPLIT_NAMES`.
    Raises IncompleteLayoutError if one of the splits is missing or has no labels, and BadDataError for labels that do not
    fit: classes that only one split has, annotations that name missing files, images without a class.
    """
    spelled = {name.lower(): join(top, name) for name in tree.folders[top][0]}
    found = {name: spelled[name] for names in SPLIT_NAMES.values() for name in names if name in spelled}
    for name, folder in found.items():
        folders, loose = tree.folders[folder]
        # Archives that were unpacked into a folder of their own name have their folders below it.
        if not loose and [below.lower() for below in folders] == [name] and tree.folders[f"{folder}/{folders[0]}"][0]:
            found[name] = f"{folder}/{folders[0]}"
    if not found:
        return None
    train_folder = next((found[name] for name in SPLIT_NAMES["train"] if name in found), None)
    class_names = list(_class_folders(tree, train_folder)) if train_folder else []
    if train_folder and not class_names:
        raise IncompleteLayoutError(f"{tree.path}: {train_folder} does not have a folder for each class.", LAYOUTS)
    splits = {name: _read_split(tree, top, folder, name, class_names) for name, folder in found.items()}
    labeled = [name for name, split in splits.items() if split.labels or split.folders]
    if not any(name in labeled for name in SPLIT_NAMES["test"]):
        # Folders that are not of these classes are a mistake to be named; a folder of images is only not labeled.
        labeled += [name for name in splits if name not in labeled and _class_folders(tree, found[name], class_names)]
    train, test, notes = choose_splits(labeled, test_split, tree.path)
    _refuse_unfit(tree, splits[train], splits[test], class_names)
    spelled = dict(zip(class_names, official_names(class_names), strict=True))
    place = {name: label for label, name in enumerate(sorted(class_names, key=lambda name: spelled[name]))}
    files = {
        name: file_split(tree, {path: place[label] for path, label in splits[word].labels.items()})
        for name, word in (("train", train), ("test", test))
    }
    return _described(tree, top, tuple(sorted(spelled.values())), files, notes)


def _described(
    tree: Tree, top: str, class_names: tuple[str, ...], splits: dict[str, FileSplit], notes: tuple[str, ...]
) -> Source:
    """With the titles of words.txt and the order of wnids.txt, where these are there."""
    here = {name.lower(): join(top, name) for name in tree.folders[top][1]}
    annotated = [_annotation_files(tree, top, join(top, name), name.lower()) for name in tree.folders[top][0]]
    if not any(annotated) and "wnids.txt" not in here:
        return Source("image folder", tree.path, class_names, splits, notes=notes)
    titles = {}
    for _, line in _lines(tree, here["words.txt"]) if "words.txt" in here else ():
        wnid, *words = line.split("\t" if "\t" in line else None, 1)
        titles[wnid.strip()] = "".join(words).partition(",")[0].strip()
    listed = [line.split()[0] for _, line in _lines(tree, here["wnids.txt"])] if "wnids.txt" in here else []
    order = tuple(dict.fromkeys(wnid for wnid in listed if wnid in set(class_names)))
    class_titles = tuple(titles.get(name) or name for name in class_names)
    listed_order = order if len(order) == len(class_names) else ()
    return Source("tiny-imagenet-200", tree.path, class_names, splits, class_titles, listed_order, notes)


def _read_split(tree: Tree, top: str, folder: str, name: str, class_names: Sequence[str]) -> _Split:
    """The labels of one split folder: from the folders of classes, from annotations, or from both."""
    classes = set(class_names)
    split = _Split(folder)
    for class_name, places in _class_folders(tree, folder, class_names).items():
        if class_name in classes:
            split.folders.append(class_name)
            for place in places:
                split.labels.update(dict.fromkeys(_images_of_class(tree, place, class_name), class_name))
    images = f"{folder}/{_IMAGES}"
    loose = [f"{images}/{file}" for file in tree.folders.get(images, ([], []))[1] if _IMAGES not in classes]
    if annotations := _annotation_files(tree, top, folder, name):
        here = (file for file in tree.folders[folder][1] if PurePosixPath(file).suffix.lower() not in _NOT_IMAGES)
        loose += [f"{folder}/{file}" for file in here]
        _annotate(tree, split, loose, annotations[0], classes)
    # Those who sort by copying leave the images where they were as well.
    sorted_names = {PurePosixPath(path).name for path in split.labels}
    split.unlabeled.extend(path for path in loose if path not in split.labels and PurePosixPath(path).name not in sorted_names)
    return split


def _annotation_files(tree: Tree, top: str, folder: str, name: str) -> list[str]:
    """The files that may say which class the images of a test split have."""
    if name not in SPLIT_NAMES["test"]:
        return []
    inside = [f"{folder}/{file}" for file in tree.folders[folder][1] if file.lower().endswith("annotations.txt")]
    wanted = {f"{name}_annotations.txt", "val_annotations.txt" if name.startswith("val") else ""}
    return inside + [join(top, file) for file in tree.folders[top][1] if file.lower() in wanted]


def _annotate(tree: Tree, split: _Split, loose: Sequence[str], path: str, classes: set[str]) -> None:
    """Label the loose files by the lines of an annotation file. Raises BadDataError that names a line that does not fit."""
    by_name: dict[str, list[str]] = {}
    for file in (*split.labels, *loose):
        for key in (PurePosixPath(file).name, PurePosixPath(file).stem + "."):
            by_name.setdefault(key, []).append(file)
    in_folders = dict(split.labels)
    for number, line in _lines(tree, path):
        separator = next((mark for mark in "\t," if mark in line), None)
        name, label = [*(part.strip() for part in line.split(separator)), ""][:2]
        name = re.split(r"[/\\]", name)[-1]
        where = f"{tree.path}: line {number} of {PurePosixPath(path).name}"
        files = by_name.get(name) or by_name.get(PurePosixPath(name).stem + ".")
        if not files and in_folders and not loose:
            continue  # all images are sorted, and these are the annotations of more of them
        if label not in classes:
            raise BadDataError(f"{where} names the class {label!r}, which is not in the training split.", "Correct that line.")
        if not files:
            raise BadDataError(f"{where} names {name}, which does not exist.", "Download the dataset again.")
        sorted_labels = {in_folders[file] for file in files if file in in_folders}
        if sorted_labels and label not in sorted_labels:
            raise BadDataError(
                f"{where} gives {name} the class {label!r}, but the file lies in the folder of {min(sorted_labels)!r}.",
                "Correct that line or move the file.",
            )
        for file in files if not sorted_labels else ():
            if split.labels.setdefault(file, label) != label:
                raise BadDataError(f"{where} gives {name} a second class, {label!r}.", "Remove one of the lines.")


def _class_folders(tree: Tree, split: str, class_names: Sequence[str] = ()) -> dict[str, list[str]]:
    """The folders of each class: in the split itself or, as some tutorials sort them, in TinyImageNet's `images` below it.

    class_names: those of the training split, if this is another one. `images` is a class only next to others.
    """
    names, images = tree.folders[split][0], f"{split}/{_IMAGES}"
    below, files = tree.folders.get(images, ([], []))
    is_class = _IMAGES in class_names or (not class_names and len(names) > 1 and bool(files))
    found: dict[str, list[str]] = {name: [f"{split}/{name}"] for name in names if name != _IMAGES or is_class}
    for name in below if not is_class else ():
        found.setdefault(name, []).append(f"{images}/{name}")
    return dict(sorted(found.items()))


def _images_of_class(tree: Tree, folder: str, name: str) -> Iterator[str]:
    """The files of a class except its list of boxes. Raises BadDataError for files that lie deeper than layouts have them."""
    images = f"{folder}/{_IMAGES}"
    for place in (folder, images):
        below, files = tree.folders.get(place, ([], []))
        yield from (f"{place}/{file}" for file in files if file != f"{name}_boxes.txt")
        for deeper in (f"{place}/{each}" for each in below):
            if deeper != images and (misplaced := [path for path in tree.files if path.startswith(f"{deeper}/")]):
                raise BadDataError(f"{tree.path}: {misplaced[0]} lies deeper than <split>/<class>/<image>.", LAYOUTS)


def _refuse_unfit(tree: Tree, train: _Split, test: _Split, class_names: Sequence[str]) -> None:
    """Raise BadDataError for whatever would shift or lose labels."""
    path, inside = tree.path, lambda split: PurePosixPath(split.folder).name
    if extra := sorted(_class_folders(tree, test.folder, class_names).keys() - set(class_names)):
        raise BadDataError(
            f"{path}: {inside(test)} has classes that {inside(train)} does not have: {first_few(extra)}.", "Add or remove them."
        )
    for split in (train, test):
        if split.unlabeled:
            message = f"{path}: {first_few(split.unlabeled, 1)} does not have a class."
            raise BadDataError(message, "Add a line to its annotations, or remove it.")
        filled = set(split.labels.values())
        if missing := [name for name in class_names if name not in filled and name not in split.folders]:
            raise BadDataError(
                f"{path}: {inside(split)} does not have all the classes of {inside(train)}; missing: {first_few(missing)}.",
                "Add or remove them.",
            )
        if empty := [f"{inside(split)}/{name}" for name in class_names if name not in filled]:
            raise BadDataError(f"{path}: there are no images in {first_few(empty)}.", "Add some, or remove it.")


def _lines(tree: Tree, path: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a text that are not blank. Raises BadDataError if it cannot be read."""
    try:
        data = tree.read(path)
    except DamagedFileError as error:
        raise BadDataError(f"{tree.path}: {path} cannot be read: {error}.") from error
    # As editors save it: UTF-8, UTF-16 or UTF-32, else an 8-bit encoding of Windows.
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding, "strict" if encoding.startswith("utf-8") else "replace")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        if line := line.strip():
            yield number, line
