"""From a source to a prepared store: what `ddkit data prepare` does, and what the first use of a dataset does.

Apart from `store`, which reads: most programs only open stores and need none of this.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddkit import __version__
from ddkit.challenge import DATASETS
from ddkit.data import store
from ddkit.data.archives import DamagedMember, open_tree
from ddkit.data.decoding import BadImage, Problem, decode_split, open_image
from ddkit.data.sources import PixelSplit, Source, open_source
from ddkit.data.split_file import SplitFile
from ddkit.data.store import ImageSet, SplitFacts, StoreFacts
from ddkit.errors import BadData, UsageError, nearest_name
from ddkit.files import explain_os_error, replacing_folder, sha256_of
from ddkit.progress import Listener, Progress, ignore

try:
    import fcntl
except ImportError:  # Windows has no such locks; there two preparations at once are the user's care.
    fcntl = None

_log = logging.getLogger(__name__)

_MOST_PROBLEMS = 100  # unusable files after which a preparation that must refuse anyway stops looking


@dataclass(frozen=True)
class Request:
    """What is asked of a preparation.

    source: folder or file; None for what the dataset's own address offers, or is drawn.
    image_size: resize images of other sizes to this; None to refuse them.
    skip_bad: leave out files that are no whole images; otherwise they are an error.
    """

    name: str
    source: Path | None = None
    image_size: int | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.image_size is not None and not 8 <= self.image_size <= 1024:
            raise UsageError(f"An image size of {self.image_size} cannot be meant.", "Give 8 to 1024 pixels.")
        spec = DATASETS.get(self.name)
        if spec is None and self.source is None:
            known = tuple(dict.fromkeys((*DATASETS, *store.list_prepared())))
            raise UsageError(
                f"There is no dataset '{self.name}'.",
                f"{nearest_name(self.name, known)} For images of your own: ddkit data prepare {self.name} --from PATH",
            )
        if spec is not None and self.image_size not in (None, spec.image_size):
            raise UsageError(
                f"The images of '{self.name}' are {spec.image_size} pixels, not {self.image_size}.",
                "Choose another name to prepare them at another size.",
            )
        if self.name == "glyphs" and self.source is not None:
            raise UsageError("The images of 'glyphs' are drawn, not read.", "Leave out --from, or choose another name.")


def prepare(
    name: str,
    source: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
    progress: Listener = ignore,
    cache: Path | None = None,
) -> Path:
    """Make the store of a dataset and return its folder; one that is there already is not made again.

    name: a built-in dataset, or any name for images of one's own. The rest: see `Request`; force: make it anew.
    An earlier store stays as it is until the new one is complete. Raises UsageError for what cannot be meant,
    MissingData where the source or the network is not there, BadData for sources that cannot be used (naming
    the files), BadFile for what the system refuses.
    """
    folder = store.store_folder(name, cache=cache)
    request = Request(name, None if source is None else Path(source), image_size, skip_bad)
    with _alone(folder):
        if force or not _is_finished(request, cache):
            _build(request, _obtain(request, progress), folder, progress)
    return folder


def open_dataset(name: str, split: str, *, progress: Listener = ignore, cache: Path | None = None) -> ImageSet:
    """Open a split, preparing a built-in dataset first where it is not: drawn or downloaded.

    Raises what `prepare` and `ddkit.data.store.load_dataset` raise.
    """
    if name in DATASETS and not store.is_prepared(name, cache=cache):
        prepare(name, progress=progress, cache=cache)
    return store.load_dataset(name, split, cache=cache)


def _is_finished(request: Request, cache: Path | None) -> bool:
    """Whether the store is there, whole, and from that source. Raises UsageError if from another one."""
    if not store.is_prepared(request.name, cache=cache):
        return False
    try:
        facts = store.store_facts(request.name, cache=cache)
        for split in facts.splits:
            store.load_dataset(request.name, split, cache=cache)
    except BadData as error:
        _log.warning("%s", error.message)
        return False
    if request.source is None:
        return set(facts.splits) == set(store.SPLITS)
    if _identity(request) != {key: facts.source.get(key) for key in _identity(request)}:
        raise UsageError(
            f"'{request.name}' is already prepared from {facts.source.get('path') or facts.source.get('kind')}.",
            "Add --force to prepare it anew, or choose another name.",
        )
    return True


def _identity(request: Request) -> dict[str, Any]:
    """What distinguishes one preparation from another, as kept in meta.json."""
    path = None if request.source is None else str(request.source.resolve())
    return {"path": path, "image_size": request.image_size, "skip_bad": request.skip_bad}


def _obtain(request: Request, progress: Listener) -> Source:
    if request.name == "glyphs":
        from ddkit.data import glyphs

        return glyphs.source(progress)
    return open_source(request.source)


def _build(request: Request, source: Source, folder: Path, progress: Listener) -> None:
    image_size = _image_size(request, source)
    with replacing_folder(folder) as temporary:
        splits, mean_and_std = {}, None
        for split in source.splits:
            file, skipped = _fill(request, source, split, temporary / f"{split}.safetensors", image_size, progress)
            labels = file.labels()
            _refuse_empty_classes(source, split, labels)
            if split == "train":
                mean_and_std = _measure(file)
            splits[split] = SplitFacts(file.count, _per_class(labels), sha256_of(file.path), skipped)
        spec = DATASETS.get(request.name)
        mean, std = (spec.mean, spec.std) if spec else mean_and_std
        store.write_facts(
            StoreFacts(
                name=request.name,
                image_size=image_size,
                mean=mean,
                std=std,
                class_names=source.class_names,
                class_titles=source.class_titles,
                listed_order=source.listed_order,
                splits=splits,
                source={"kind": source.kind, **_identity(request)},
                prepared=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                ddkit_version=__version__,
            ),
            temporary,
        )


def _fill(
    request: Request, source: Source, split: str, path: Path, image_size: int, progress: Listener
) -> tuple[SplitFile, tuple[str, ...]]:
    """Write one split. Returns its file and the names of the files that were left out."""
    content = source.splits[split]
    file = SplitFile.create(path, content.labels, image_size)
    if isinstance(content, PixelSplit):
        file.write(0, content.images)
        return file, ()
    task, total = f"reading {request.name}, {split}", len(content.names)
    problems = decode_split(
        source.path,
        content.names,
        file,
        resize=request.image_size is not None,
        give_up_after=None if request.skip_bad else _MOST_PROBLEMS,
        report=lambda done: progress(Progress(task, done, total, "images")),
    )
    if not problems:
        return file, ()
    _refuse_problems(problems, source, image_size, request.skip_bad)
    kept = np.ones(total, bool)
    kept[[problem.row for problem in problems]] = False
    labels = np.asarray(content.labels)[kept]
    return file.keep(labels, kept), tuple(problem.name for problem in problems)


def _refuse_problems(problems: Sequence[Problem], source: Source, image_size: int, skip_bad: bool) -> None:
    """Raise BadData unless every problem is a file that may be skipped; images of another size never may."""
    if sizes := [problem for problem in problems if problem.other_size]:
        raise BadData(
            f"{source.path}: images are not all {image_size} x {image_size} pixels: {_described(sizes)}.",
            f"Add --image-size {image_size} to crop them to squares and resize them.",
        )
    if not skip_bad:
        raise BadData(
            f"{source.path}: {len(problems)} files cannot be used: {_described(problems)}.",
            "Mend or remove them, or add --skip-bad to leave them out.",
        )


def _described(problems: Sequence[Problem], limit: int = 10) -> str:
    shown = "; ".join(f"{problem.name} ({problem.reason})" for problem in problems[:limit])
    return shown + (f"; and {len(problems) - limit} more" if len(problems) > limit else "")


def _image_size(request: Request, source: Source) -> int:
    """The dataset's own, the one asked for, or that of the first whole image. Raises BadData unless square."""
    if request.name in DATASETS:
        return DATASETS[request.name].image_size
    if request.image_size is not None:
        return request.image_size
    content = source.splits["train"]
    if isinstance(content, PixelSplit):
        return content.images.shape[-1]
    tree = open_tree(source.path)
    for name in content.names:
        with contextlib.suppress(BadImage, DamagedMember):
            width, height = open_image(tree.read(name)).size
            if width != height:
                raise BadData(
                    f"{source.path}: {name} is {width} x {height} pixels; datasets are of squares.",
                    "Add --image-size N to crop the images to squares and resize them.",
                )
            return width
    raise BadData(f"{source.path}: none of its {len(content.names)} training files is an image.")


def _refuse_empty_classes(source: Source, split: str, labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(source.class_names))
    if not counts.all():
        name = source.class_names[int(counts.argmin())]
        raise BadData(f"{source.path}: the {split} split has no image of the class '{name}'.")


def _per_class(labels: np.ndarray) -> tuple[int, int]:
    counts = np.bincount(labels)
    return int(counts.min()), int(counts.max())


def _measure(file: SplitFile) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over all pixels, in units of [0, 1], rounded to 4 digits.

    Exact, from the histogram of the 256 values. A channel that never changes has nothing to scale: its std is 1.
    """
    counts = np.zeros((3, 256), np.int64)
    for block in file.blocks():
        for channel in range(3):
            counts[channel] += np.bincount(block[:, channel].ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) or 1.0 for s in std)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time prepares a store; the others wait and find it made."""
    if fcntl is None:
        yield
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise explain_os_error(error, error.filename or folder) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
