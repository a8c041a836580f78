"""From a source to a prepared store: what `ddkit data prepare` does, and what the first use of a dataset does.

Apart from `store`, which reads: most programs only open stores and need none of this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddkit import __version__
from ddkit.challenge import DATASETS
from ddkit.data import glyphs, store
from ddkit.data.archives import DamagedFileError
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.decoding import BadImageError, Problem, decode_split, open_image
from ddkit.data.download import OFFICIAL, download
from ddkit.data.listing import PixelSplit, Source
from ddkit.data.sources import open_source
from ddkit.data.split_file import SplitFile
from ddkit.data.store import ImageSet, SplitFacts, StoreFacts
from ddkit.errors import BadDataError, MissingDataError, UsageError, counted, first_few
from ddkit.runtime.files import atomic_folder, cache_folder, explain_os_error, one_at_a_time, sha256_of, write_json
from ddkit.runtime.progress import Listener, Progress, ignore

_log = logging.getLogger(__name__)

_MOST_PROBLEMS = 100  # unusable files after which a preparation that will fail anyway stops looking


@dataclass(frozen=True)
class _Request:
    """The arguments of `prepare`, whose docstring explains them."""

    name: str
    source: Path | None = None
    image_size: int | None = None
    test_split: str | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.image_size is not None and not 8 <= self.image_size <= 1024:
            raise UsageError(f"The image size of {self.image_size} pixels is out of range.", "Give 8 to 1024 pixels.")
        spec = DATASETS.get(self.name)
        if spec is not None and self.image_size not in (None, spec.image_size):
            raise UsageError(
                f"The images of '{self.name}' are {spec.image_size} pixels, not {self.image_size}.",
                "Choose another name to prepare them at another size.",
            )
        if self.name == "glyphs" and self.source is not None:
            raise UsageError("The images of 'glyphs' are drawn, not read.", "Leave out --from, or choose another name.")
        if self.source is None:
            store.dataset_spec(self.name)  # raises UsageError for a name that is neither built in nor prepared

    @property
    def origin(self) -> dict[str, Any]:
        """Where a store comes from, as meta.json keeps it."""
        path = None if self.source is None else str(self.source.resolve())
        return {"path": path, "image_size": self.image_size, "test_split": self.test_split, "skip_bad": self.skip_bad}


def prepare(
    name: str,
    source: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    test_split: str | None = None,
    skip_bad: bool = False,
    force: bool = False,
    progress: Listener = ignore,
) -> Path:
    """Make the store of a dataset and return its folder. Nothing is written if the store is there already.

    name: a built-in dataset, or any name for other images.
    source: folder or archive in any layout of `ddkit.data.sources`; None to draw or download a built-in dataset.
    image_size: pixels; images of other sizes are cropped to squares and resized. None to refuse them.
    test_split: the folder that becomes the test split ("val"), if several have labels.
    skip_bad: leave out files that are not whole images; otherwise they are an error that names them.
    force: make the store again, from whatever source.
    An earlier store stays as it is until the new one is complete. Raises UsageError for options that do not fit,
    MissingDataError if the source or the network is not there, BadDataError for sources that cannot be used (naming the
    files), BadFileError for what the system refuses.
    """
    folder = store.store_folder(name)
    request = _Request(name, None if source is None else Path(source), image_size, test_split, skip_bad)
    if not force and _is_finished(request):
        return folder
    with one_at_a_time(folder.parent / f".{name}.lock", f"prepares {name}"):
        _clean_up(folder)
        if force or not _is_finished(request):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                # Under a name that `_clean_up` knows.
                scratch = tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=folder.parent)
            except OSError as error:
                raise explain_os_error(error, error.filename or folder) from error
            with scratch as path:
                _build(request, _obtain(request, Path(path), progress), folder, progress)
            if source is None and name in OFFICIAL:
                # The store has all that the archive had.
                (_downloads() / OFFICIAL[name].file_name).unlink(missing_ok=True)
    return folder


def open_dataset(name: str, split: str, *, progress: Listener = ignore) -> ImageSet:
    """Open a split. A built-in dataset that is not prepared is drawn or downloaded first.

    Raises what `prepare` and `ddkit.data.store.load_dataset` raise.
    """
    if name in DATASETS and not store.is_prepared(name):
        prepare(name, progress=progress)
    return store.load_dataset(name, split)


def _is_finished(request: _Request) -> bool:
    """True if the store is there, whole, and from that source. Raises UsageError if it is from another one."""
    if not store.is_prepared(request.name):
        return False
    try:
        facts = store.store_facts(request.name)
        for split in facts.splits:
            store.load_dataset(request.name, split)
    except BadDataError as error:
        _log.warning("%s", error.message)
        return False
    if request.source is None:
        return set(facts.splits) == set(store.SPLITS)
    earlier = f"'{request.name}' is already prepared from {facts.source.get('path') or facts.source.get('kind')}"
    remedy = "Add --force to replace it, or choose another name."
    if request.origin["path"] != facts.source.get("path") or request.image_size not in (None, facts.image_size):
        raise UsageError(f"{earlier}, at {facts.image_size} pixels.", remedy)
    if request.test_split not in (None, facts.source.get("test_split")):
        raise UsageError(f"{earlier}, without --test-split {request.test_split}.", remedy)
    return True


def _obtain(request: _Request, scratch: Path, progress: Listener) -> Source:
    """Draw, download or open what was asked for. Raises BadDataError if a built-in name does not fit it."""
    if request.name == "glyphs":
        return glyphs.source()
    path = request.source
    if path is None and request.name not in OFFICIAL:
        raise UsageError(f"'{request.name}' can only be prepared again from its images.", "Say where they are: --from PATH.")
    if path is None:
        path = download(OFFICIAL[request.name], _downloads(), progress=progress)
    source = open_source(path, scratch, classes=CLASS_NAMES.get(request.name, ()), test_split=request.test_split)
    source = _with_official_classes(request.name, source)
    for note in source.notes:
        _log.warning("%s", note)
    return source


def _downloads() -> Path:
    return cache_folder() / ".downloads"


def _with_official_classes(name: str, source: Source) -> Source:
    """A built-in name promises its classes in their order; with one class fewer, the labels of all others would shift.

    Raises BadDataError for other classes.
    """
    if name not in CLASS_NAMES:
        if "train" not in source.splits:
            raise BadDataError(f"{source.path} holds only test images.", "Give a source that has training images too.")
        return source
    official = CLASS_NAMES[name]
    if source.class_names == official:
        return source
    if source.numbered and len(source.class_names) == len(official):
        if name != "cifar100":
            raise BadDataError(
                f"{source.path} numbers its classes without naming them, and {name} is numbered in more than one way.",
                "Add the class names, or prepare it under another name.",
            )
        note = f"{source.path} numbers its classes without naming them; the numbers are taken for those of CIFAR-100."
        return replace(source, class_names=official, notes=(*source.notes, note))
    missing = [known for known in official if known not in source.class_names]
    extra = [found for found in source.class_names if found not in official]
    differences = [f"{word} {first_few(names)}" for word, names in (("without", missing), ("with", extra)) if names]
    raise BadDataError(
        f"{source.path} is not '{name}': it has {len(source.class_names)} classes, where {name} has {len(official)}: "
        f"{' and '.join(differences)}.",
        "Prepare it under another name.",
    )


def _build(request: _Request, source: Source, folder: Path, progress: Listener) -> None:
    """Write the whole store to a temporary folder, then put it in the place of the earlier one."""
    image_size = _image_size(request, source)
    with atomic_folder(folder) as temporary:
        files, splits = {}, {}
        for split in source.splits:
            path = temporary / f"{split}.safetensors"
            files[split], skipped = _fill(request, source, split, path, image_size, progress)
            counts = np.bincount(files[split].labels(), minlength=len(source.class_names))
            if not counts.all():  # nothing could be learned or tested about a class without images
                name = source.class_names[int(counts.argmin())]
                raise BadDataError(f"{source.path}: the {split} split has no usable image of the class '{name}'.")
            splits[split] = SplitFacts(files[split].count, (int(counts.min()), int(counts.max())), sha256_of(path), skipped)
        spec = DATASETS.get(request.name)
        mean, std = (spec.mean, spec.std) if spec else _measure(files["train"])
        origin = {"kind": source.kind, **request.origin}
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        facts = StoreFacts(
            request.name, image_size, mean, std, source.class_names, splits, origin,
            source.class_titles, source.listed_order, now, __version__,
        )  # fmt: skip
        if "train" not in splits:
            facts = _with_earlier_training_split(facts, folder, temporary)
        write_json(temporary / store.META_FILE, dataclasses.asdict(facts))


def _with_earlier_training_split(facts: StoreFacts, folder: Path, temporary: Path) -> StoreFacts:
    """A reference file has the test split only: the training split that is prepared already stays, if it is whole."""
    try:
        store.load_dataset(facts.name, "train")
        earlier = store.store_facts(facts.name)
    except (MissingDataError, BadDataError):
        return facts
    shutil.copyfile(folder / "train.safetensors", temporary / "train.safetensors")
    splits = {"train": earlier.splits["train"], **facts.splits}
    origin = {**facts.source, "train": dict(earlier.source)}
    titles, order = earlier.class_titles, earlier.listed_order
    return replace(facts, splits=splits, source=origin, class_titles=titles, listed_order=order)


def _fill(
    request: _Request, source: Source, split: str, path: Path, image_size: int, progress: Listener
) -> tuple[SplitFile, tuple[str, ...]]:
    """Write one split. Returns its file and the names of the files that were left out."""
    content = source.splits[split]
    total = len(content.labels)
    file = SplitFile.create(path, content.labels, image_size)

    def report(done: int) -> None:
        progress(Progress(f"{request.name}, {split}", done, total, "images"))

    if isinstance(content, PixelSplit):
        done = 0
        for block in content.blocks():
            file.write(done, block)
            done += len(block)
            report(done)
        return file, ()
    resize, limit = request.image_size is not None, None if request.skip_bad else _MOST_PROBLEMS
    problems = decode_split(content.tree, content.names, file, resize=resize, give_up_after=limit, report=report)
    if not problems:
        return file, ()
    if sizes := [problem for problem in problems if problem.other_size]:  # these may not be skipped
        raise BadDataError(
            f"{source.path}: images are not all {image_size} x {image_size} pixels: {_described(sizes)}.",
            f"Add --image-size {image_size} to crop them to squares and resize them.",
        )
    if not request.skip_bad:
        raise BadDataError(
            f"{source.path}: {counted(len(problems), 'file', 'files')} cannot be used: {_described(problems)}.",
            "Repair or remove them, or add --skip-bad to leave them out.",
        )
    kept = np.ones(total, bool)
    kept[[problem.row for problem in problems]] = False
    return file.keep(np.asarray(content.labels)[kept].tolist(), kept), tuple(problem.name for problem in problems)


def _described(problems: Sequence[Problem]) -> str:
    return first_few([f"{problem.name} ({problem.reason})" for problem in problems], 10, joint="; ")


def _image_size(request: _Request, source: Source) -> int:
    """The dataset's own, the one asked for, or that of the first whole image. Raises BadDataError if none of them fits."""
    spec, content = DATASETS.get(request.name), source.splits.get("train") or source.splits["test"]
    wanted = spec.image_size if spec else request.image_size
    if isinstance(content, PixelSplit):
        if wanted not in (None, content.image_size):
            message = f"The images of {source.path or 'that source'} are {content.image_size} pixels, not {wanted}."
            raise BadDataError(message, "Only image files can be resized.")
        return content.image_size
    if wanted is not None:
        return wanted
    path = content.tree.path
    for name in content.names:
        with contextlib.suppress(BadImageError, DamagedFileError):
            width, height = open_image(content.tree.read(name)).size
            if width != height:
                raise BadDataError(
                    f"{path}: {name} is {width} x {height} pixels; the images of a dataset are squares.",
                    "Add --image-size N to crop the images to squares and resize them.",
                )
            return width
    raise BadDataError(f"{path}: none of its {len(content.names)} training files is an image.")


def _measure(file: SplitFile) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel over all pixels, in units of [0, 1], rounded to 4 digits.

    Exact, from the histogram of the 256 values. A channel that never changes has nothing to scale: its std is 1.
    """
    counts = np.zeros((3, 256), np.int64)
    for block in file.blocks():
        for channel in range(3):
            counts[channel] += np.bincount(block[:, channel].ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    red, green, blue = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1)).round(4).tolist()
    return tuple(mean.round(4).tolist()), (red or 1.0, green or 1.0, blue or 1.0)


def _clean_up(folder: Path) -> None:
    """Mend what a preparation left that was killed. Only for the one process that prepares this store."""
    left = re.compile(rf"\.{re.escape(folder.name)}\.[^.]{{8}}\.(tmp|old)")
    for path in [path for path in folder.parent.glob(".*") if left.fullmatch(path.name)]:
        if path.suffix == ".old" and not folder.exists():
            # It was killed between setting the earlier store aside and putting the new one in its place.
            path.replace(folder)
        shutil.rmtree(path, ignore_errors=True)
