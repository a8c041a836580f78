"""From a source to a prepared store: what `ddkit data prepare` does, and what the first use of a dataset does.

Apart from `store`, which reads: most programs only open stores and need none of this.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddkit import __version__
from ddkit.challenge import DATASETS, DatasetSpec
from ddkit.data import glyphs, store
from ddkit.data.archives import DamagedMemberError, open_tree
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.decoding import BadImageError, Problem, decode_split, open_image
from ddkit.data.download import OFFICIAL, download
from ddkit.data.sources import PixelSplit, Source, open_source, some
from ddkit.data.split_file import SplitFile
from ddkit.data.store import ImageSet, SplitFacts, StoreFacts
from ddkit.errors import BadDataError, MissingDataError, UsageError
from ddkit.runtime.files import atomic_folder, cache_folder, one_at_a_time, sha256_of
from ddkit.runtime.progress import Listener, Progress, ignore

_log = logging.getLogger(__name__)

_MOST_PROBLEMS = 100  # unusable files after which a preparation that must refuse anyway stops looking


@dataclass(frozen=True)
class _Request:
    """What is asked of `prepare`, whose docstring explains it."""

    name: str
    source: Path | None = None
    image_size: int | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.image_size is not None and not 8 <= self.image_size <= 1024:
            raise UsageError(f"An image size of {self.image_size} cannot be meant.", "Give 8 to 1024 pixels.")
        spec = DATASETS.get(self.name)
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
) -> Path:
    """Make the store of a dataset and return its folder; one that is there already is not made again.

    name: a built-in dataset, or any name for images of one's own.
    source: folder or archive in any layout of `ddkit.data.sources`; None to draw or download a built-in dataset.
    image_size: crop images of other sizes to squares and resize them to this; None to refuse them.
    skip_bad: leave out files that are no whole images; otherwise they are an error that names them.
    force: make it anew even if it is there, from whatever source.
    An earlier store stays as it is until the new one is complete. Raises UsageError for what cannot be meant,
    MissingDataError where the source or the network is not there, BadDataError for sources that cannot be used (naming
    the files), BadFileError for what the system refuses.
    """
    folder = store.store_folder(name)
    request = _Request(name, None if source is None else Path(source), image_size, skip_bad)
    if source is None:
        store.dataset_spec(name)  # raises UsageError for a name that is neither built in nor prepared
    with one_at_a_time(folder.parent / f".{folder.name}.lock", f"prepares {name}"):
        _tidy(folder)
        if force or not _is_finished(request):
            _build(request, _obtain(request, progress), folder, progress)
            _remove_download(request)
    return folder


def open_dataset(name: str, split: str, *, progress: Listener = ignore) -> ImageSet:
    """Open a split, preparing a built-in dataset first where it is not: drawn or downloaded.

    Raises what `prepare` and `ddkit.data.store.load_dataset` raise.
    """
    if name in DATASETS and not store.is_prepared(name):
        prepare(name, progress=progress)
    return store.load_dataset(name, split)


def _is_finished(request: _Request) -> bool:
    """Whether the store is there, whole, and from that source. Raises UsageError if from another one."""
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
    if _origin(request)["path"] != facts.source.get("path") or request.image_size not in (None, facts.image_size):
        earlier = facts.source.get("path") or facts.source.get("kind")
        raise UsageError(
            f"'{request.name}' is already prepared from {earlier}, at {facts.image_size} pixels.",
            "Add --force to prepare it anew, or choose another name.",
        )
    return True


def _origin(request: _Request) -> dict[str, Any]:
    """Where a store comes from, as kept in meta.json."""
    path = None if request.source is None else _readable(str(request.source.resolve()))
    return {"path": path, "image_size": request.image_size, "skip_bad": request.skip_bad}


def _obtain(request: _Request, progress: Listener) -> Source:
    """Draw, download or open what was asked for. Raises BadDataError where a built-in name does not fit it."""
    if request.name == "glyphs":
        return glyphs.source()
    path = request.source
    if path is None and request.name not in OFFICIAL:
        raise UsageError(f"'{request.name}' can be prepared anew only from its pictures.", "Say where they are: --from PATH.")
    if path is None:
        path = download(OFFICIAL[request.name], _downloads(), progress=progress)
    source = open_source(path)
    _refuse_unwritable(source)
    _refuse_other_classes(request.name, source)
    return source


def _downloads() -> Path:
    return cache_folder() / ".downloads"


def _remove_download(request: _Request) -> None:
    """The store has all that the archive had."""
    if request.source is None and request.name in OFFICIAL:
        (_downloads() / OFFICIAL[request.name].file_name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what another download has begun stays
            _downloads().rmdir()


def _refuse_other_classes(name: str, source: Source) -> None:
    """A built-in name promises its classes in their order; one class fewer would shift the labels of all others."""
    if "train" not in source.splits and name not in CLASS_NAMES:
        raise BadDataError(f"{source.path} holds only test images.", "Give a source that has training images too.")
    if name not in CLASS_NAMES or source.class_names == CLASS_NAMES[name]:
        return
    missing = [known for known in CLASS_NAMES[name] if known not in source.class_names]
    extra = [found for found in source.class_names if found not in CLASS_NAMES[name]]
    differences = [f"{word} {some(names)}" for word, names in (("it lacks", missing), ("it has", extra)) if names]
    raise BadDataError(
        f"{source.path} is not '{name}': it has {len(source.class_names)} classes of {len(CLASS_NAMES[name])}; "
        f"{'; '.join(differences)}.",
        "Prepare it under a name of its own.",
    )


def _build(request: _Request, source: Source, folder: Path, progress: Listener) -> None:
    """Write the whole store to a temporary folder, then put it in the place of the earlier one."""
    image_size = _image_size(request, source)
    spec = DATASETS.get(request.name)
    with atomic_folder(folder) as temporary:
        splits: dict[str, SplitFacts] = {}
        for split in source.splits:
            file, skipped = _fill(request, source, split, temporary / f"{split}.safetensors", image_size, progress)
            splits[split] = _split_facts(source, split, file, skipped)
            if spec is None and split == "train":
                spec = DatasetSpec(request.name, len(source.class_names), image_size, *_measure(file))
        facts = _facts(spec, source, splits, {"kind": source.kind, **_origin(request)})
        if "train" not in splits:
            facts = _with_earlier_training_split(facts, folder, temporary)
        store.write_facts(facts, temporary)


def _with_earlier_training_split(facts: StoreFacts, folder: Path, temporary: Path) -> StoreFacts:
    """A reference file has the test split only: what is prepared of the training split already, if whole, stays."""
    try:
        store.load_dataset(facts.name, "train")
        earlier = store.store_facts(facts.name)
    except (MissingDataError, BadDataError):
        return facts
    shutil.copyfile(folder / "train.safetensors", temporary / "train.safetensors")
    return replace(
        facts,
        splits={"train": earlier.splits["train"], **facts.splits},
        source={**facts.source, "train": dict(earlier.source)},
        class_titles=earlier.class_titles,
        listed_order=earlier.listed_order,
    )


def _facts(spec: DatasetSpec, source: Source, splits: Mapping[str, SplitFacts], origin: Mapping[str, Any]) -> StoreFacts:
    return StoreFacts(
        name=spec.name,
        image_size=spec.image_size,
        mean=spec.mean,
        std=spec.std,
        class_names=source.class_names,
        class_titles=source.class_titles,
        listed_order=source.listed_order,
        splits=splits,
        source=origin,
        prepared=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        ddkit_version=__version__,
    )


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
    problems = decode_split(
        source.path,
        content.names,
        file,
        resize=request.image_size is not None,
        give_up_after=None if request.skip_bad else _MOST_PROBLEMS,
        report=report,
    )
    if not problems:
        return file, ()
    _refuse_problems(problems, source, image_size, request.skip_bad)
    kept = np.ones(total, bool)
    kept[[problem.row for problem in problems]] = False
    return file.keep(np.asarray(content.labels)[kept].tolist(), kept), tuple(_readable(problem.name) for problem in problems)


def _split_facts(source: Source, split: str, file: SplitFile, skipped: tuple[str, ...]) -> SplitFacts:
    """Raises BadDataError where a class has no image: nothing could be learnt or tested of it."""
    counts = np.bincount(file.labels(), minlength=len(source.class_names))
    if not counts.all():
        name = source.class_names[int(counts.argmin())]
        raise BadDataError(f"{source.path}: the {split} split has no usable image of the class '{name}'.")
    return SplitFacts(file.count, (int(counts.min()), int(counts.max())), sha256_of(file.path), skipped)


def _refuse_problems(problems: Sequence[Problem], source: Source, image_size: int, skip_bad: bool) -> None:
    """Raise BadDataError unless every problem is a file that may be skipped; images of another size never may."""
    if sizes := [problem for problem in problems if problem.other_size]:
        raise BadDataError(
            f"{source.path}: images are not all {image_size} x {image_size} pixels: {_described(sizes)}.",
            f"Add --image-size {image_size} to crop them to squares and resize them.",
        )
    if not skip_bad:
        raise BadDataError(
            f"{source.path}: {len(problems)} file{'s'[: len(problems) > 1]} cannot be used: {_described(problems)}.",
            "Mend or remove them, or add --skip-bad to leave them out.",
        )


def _described(problems: Sequence[Problem], limit: int = 10) -> str:
    shown = "; ".join(f"{problem.name} ({problem.reason})" for problem in problems[:limit])
    return shown + (f"; and {len(problems) - limit} more" if len(problems) > limit else "")


def _image_size(request: _Request, source: Source) -> int:
    """The dataset's own, the one asked for, or that of the first whole image. Raises BadDataError where none fits."""
    spec, content = DATASETS.get(request.name), source.splits.get("train") or source.splits["test"]
    wanted = spec.image_size if spec else request.image_size
    if isinstance(content, PixelSplit):
        if wanted not in (None, content.image_size):
            raise BadDataError(
                f"The images of {source.path or 'that source'} are {content.image_size} pixels, not {wanted}.",
                "Only images in files of their own can be resized.",
            )
        return content.image_size
    return wanted or _size_of_first(source, content.names)


def _size_of_first(source: Source, names: Sequence[str]) -> int:
    tree = open_tree(source.path)
    for name in names:
        with contextlib.suppress(BadImageError, DamagedMemberError):
            width, height = open_image(tree.read(name)).size
            if width != height:
                raise BadDataError(
                    f"{source.path}: {name} is {width} x {height} pixels; datasets are of squares.",
                    "Add --image-size N to crop the images to squares and resize them.",
                )
            return width
    raise BadDataError(f"{source.path}: none of its {len(names)} training files is an image.")


def _refuse_unwritable(source: Source) -> None:
    """Raise BadDataError for a class whose name is no text, before anything is decoded."""
    for name in source.class_names:
        if _readable(name) != name:
            raise BadDataError(f"{source.path}: the name of the class '{_readable(name)}' is not UTF-8.", "Rename its folder.")


def _readable(name: str) -> str:
    """A file's name as text that can be written; names are bytes to some systems, and not always UTF-8."""
    return name.encode("utf-8", "replace").decode("utf-8")


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


def _tidy(folder: Path) -> None:
    """Mend what a preparation left that was killed on the spot. Only one process at a time may do so."""
    left = [
        path for path in folder.parent.glob("*") if re.fullmatch(re.escape(f".{folder.name}.") + r"\w{8}\.(tmp|old)", path.name)
    ]
    for path in left:
        if path.suffix == ".old" and not folder.exists():
            # It died between setting the earlier store aside and putting the new one in its place.
            path.replace(folder)
        shutil.rmtree(path, ignore_errors=True)
