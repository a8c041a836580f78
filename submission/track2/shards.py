"""What the processes of generate.py share: the job, and the folder of shards in which its images gather.

Shard `<worker>-<first>-<end>.safetensors` holds the worker's images number `first` to `end` as bytes, with the classes that
they were sampled as, their indices within those and, where only a share is kept, the probabilities that the classifier gives
to the classes. `run.json` says what they are of, and how much of the budget is spent.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
HASHES_FILE = "SHA256SUMS"
ROWS_AT_ONCE = 512  # images on their way from shards to the file
OWN_CLASS = 10  # how many times as likely as others the class is whose mode an image is steered to


class Failure(Exception):
    """An error that the user can fix. status: the process's exit status."""

    def __init__(self, message: str, status: int = 3) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Job:
    """What to make; the same for all workers.

    entry: the model folder's entry.json. workers: how many share the work. limit: of images made, equally many a class.
    began: when the process started, on time.monotonic()'s clock. budget: seconds from then on; math.inf with --ipc.
    pixels: write the images as bytes, with the constants, instead of normalized.
    """

    model: Path
    entry: Mapping[str, Any]
    out: Path
    seed: int
    device: str
    workers: int
    ipc: int | None
    limit: int
    began: float
    budget: float
    pixels: bool = False

    @property
    def bytes_per_value(self) -> int:
        """Of the written file."""
        return 1 if self.pixels else 4

    @property
    def shards(self) -> Path:
        return shards_folder(self.out)

    @property
    def end(self) -> float:
        return self.began + self.budget

    @property
    def margin(self) -> float:
        """Seconds in reserve: 4 % of the budget, between 2 and 20 s, and at most a quarter of the budget."""
        return min(max(0.04 * self.budget, 2.0), 20.0, 0.25 * self.budget)

    @property
    def seconds_per_shard(self) -> float:
        return min(max(self.budget / 100, 2.0), 10.0)

    @property
    def classes(self) -> int:
        return self.entry["num_classes"]

    @property
    def keep(self) -> float:
        """The share of the images that the file gets, labeled by the classifier; 1 keeps all as they were sampled."""
        return self.entry.get("keep", 1.0)

    def share(self, worker: int) -> int:
        """How many images the worker may make. All workers together may make the same number of each class."""
        if self.ipc is None:
            turns, rest = divmod(self.limit // self.classes, self.workers)
            # Of the turns that are left over the worker makes the classes up to where the one `rest` places further began.
            return turns * self.classes + self._first_class(worker + rest) - self._first_class(worker)
        return len(range(worker, made_for(self.ipc, self.keep), self.workers)) * self.classes

    def image(self, worker: int, position: int) -> tuple[int, int]:
        """The worker's image number `position`: its class, and its index in that class.

        The indices are dealt out to the workers. Each takes all classes in turn, and each begins with another one.
        """
        turn, place = divmod(position, self.classes)
        return (place + self._first_class(worker)) % self.classes, worker + self.workers * turn

    def _first_class(self, worker: int) -> int:
        """Where the worker begins; beyond the number of classes for a number beyond that of the workers."""
        return worker * self.classes // self.workers


def shards_folder(out: Path) -> Path:
    return out.with_name(out.name + ".shards")


def made_for(kept: int, keep: float) -> int:
    """How many images are made so that `kept` remain of them."""
    return math.ceil(round(kept / keep, 6))


def open_shards(job: Job) -> Job:
    """Make the folder of shards, or continue what the same run left when it was killed, with the time that it spent."""
    settings = {"entry": dict(job.entry), "seed": job.seed, "workers": job.workers, "ipc": job.ipc,
                "model": sha256_of(HERE / HASHES_FILE)}  # fmt: skip
    spent = 0.0
    if job.shards.exists():
        left = read_run(job)
        if left.get("settings") == settings:
            spent = left["spent"]
            say(f"continuing a run that was stopped after {spent:.0f} s and left images in {job.shards}")
        else:
            say(f"discarding the images that another run left in {job.shards}")
            shutil.rmtree(job.shards)
    job.shards.mkdir(exist_ok=True)
    write_run(job, {"settings": settings, "spent": spent})
    # As if this run had begun so much earlier.
    return replace(job, began=job.began - spent)


def read_run(job: Job) -> dict[str, Any]:
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads((job.shards / "run.json").read_text(encoding="utf-8"))
    return {}


def write_spent(job: Job) -> None:
    """Note how much of the budget is spent, for a run that continues this one."""
    write_run(job, read_run(job) | {"spent": time.monotonic() - job.began})


def write_run(job: Job, run: Mapping[str, Any]) -> None:
    with atomic_write(job.shards / "run.json") as file:
        file.write(json.dumps(run).encode())


class Shard:
    """Images of one worker, its `first` to `end`, on their way to the disk."""

    def __init__(self, job: Job, worker: int, first: int) -> None:
        self.job, self.worker, self.first, self.end = job, worker, first, first
        self.began = time.monotonic()
        self.classes: list[int] = []
        self.indices: list[int] = []
        self.images: list[Any] = []
        self.probabilities: list[Any] = []

    def add(self, sampler: Callable[..., Any], count: int, classifier: Callable[..., Any] | None = None) -> None:
        images = [self.job.image(self.worker, position) for position in range(self.end, self.end + count)]
        classes, indices = [c for c, _ in images], [i for _, i in images]
        pixels = sampler(classes, indices)
        if classifier:
            self.probabilities.append(classifier(pixels))
        self.images.append(pixels)
        self.classes += classes
        self.indices += indices
        self.end += count

    def write(self, master: Connection) -> Shard:
        """Write it and say so; returns the next one."""
        if not multiprocessing.parent_process().is_alive():
            sys.exit()  # the folder may be another run's by now
        if self.images:
            import torch
            from safetensors.torch import save

            began = time.monotonic()
            tensors = {"labels": torch.tensor(self.classes), "indices": torch.tensor(self.indices)}
            if self.probabilities:
                tensors["probabilities"] = torch.cat(self.probabilities)
            with atomic_write(self.job.shards / f"{self.worker}-{self.first}-{self.end}.safetensors") as file:
                file.write(save({"images": torch.cat(self.images), **tensors}))
            master.send(("written", (self.end - self.first, time.monotonic() - began)))
        return Shard(self.job, self.worker, self.end)


def join(job: Job) -> tuple[int, str]:
    """Make the file of what lies in the shards, and remove them. Returns how many images, in all and of each class."""
    if not (settings := read_run(job).get("settings")):
        raise Failure(f"there is nothing to join in {job.shards}.")
    import torch

    entry, ipc = settings["entry"], settings["ipc"]
    keep = entry.get("keep", 1.0)
    shards = shard_files(job, settings["workers"])
    labels_of = [tensor_of(shard, "labels").clone() for shard in shards]
    labels, counts = torch.cat(labels_of), torch.tensor([len(labels) for labels in labels_of])
    indices = torch.cat([tensor_of(shard, "indices").clone() for shard in shards])
    if ipc and len(labels) < (wanted := made_for(ipc, keep) * entry["num_classes"]):
        raise Failure(f"{len(labels):,} of {wanted:,} images were made; run it again to continue.")
    order = (labels * (indices.max() + 1) + indices).argsort()  # the same however many workers made them
    labels = labels[order]
    if keep < 1:
        probabilities = torch.cat([tensor_of(shard, "probabilities").clone() for shard in shards])[order]
        share = math.floor(keep * len(labels) / entry["num_classes"] + 1e-6)  # `made_for` rounds up
        if entry["mode_guidance"]:
            favor(probabilities, labels)
        labels = assign(probabilities, ipc or max(1, share))
    kept = (labels >= 0).nonzero()[:, 0]
    chosen = kept[choose(labels[kept], entry["num_classes"], ipc)]
    labels, chosen = labels[chosen], order[chosen]
    shape = (len(chosen), 3, entry["image_size"], entry["image_size"])
    kind = torch.ByteStorage if job.pixels else torch.FloatStorage
    images = StreamedTensor(kind, shape, gathered(shards, counts, chosen, settings["workers"], None if job.pixels else entry))
    if ipc and not job.pixels:
        write_set(job, images)
    else:
        constants = {name: streamed(torch.tensor(entry[name])) for name in ("mean", "std")} if job.pixels else {}
        write_set(job, {"images": images, "labels": streamed(labels), **constants})
    shutil.rmtree(job.shards, ignore_errors=True)
    per_class = torch.bincount(labels, minlength=entry["num_classes"])
    least, most = int(per_class.min()), int(per_class.max())
    return len(chosen), f"{least}" if least == most else f"{least} or {most}"


def shard_files(job: Job, workers: int) -> list[Path]:
    """Those of one worker after those of another."""
    places = [(worker, *shard) for worker in range(workers) for shard in shards_of(job, worker)]
    if not places:
        raise Failure(f"there are no images in {job.shards}.")
    return [job.shards / f"{worker}-{first}-{end}.safetensors" for worker, first, end in places]


def tensor_of(path: Path, name: str) -> Any:
    """A tensor of a shard, memory-mapped."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor(name)


def gathered(shards: Sequence[Path], counts: Any, chosen: Any, workers: int, entry: Mapping[str, Any] | None) -> Iterator[Any]:
    """The `chosen` of the shards' rows, in that order, (n, 3, S, S), some hundred at a time.

    counts: rows of each shard. entry: normalizes to float32 with its constants; None leaves the bytes.
    """
    import torch

    ends = counts.cumsum(0)
    images_of = functools.lru_cache(maxsize=2 * workers)(tensor_of)  # what is mapped counts as memory
    for rows in chosen.split(ROWS_AT_ONCE):
        shard_of = torch.bucketize(rows, ends, right=True)
        images = None
        for number in shard_of.unique().tolist():
            here = shard_of == number
            found = images_of(shards[number], "images")[rows[here] - (ends[number] - counts[number])]
            images = found.new_empty(len(rows), *found.shape[1:]) if images is None else images
            images[here] = found
        if entry is None:
            yield images
        else:
            mean, std = (torch.tensor(entry[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
            yield (images.float() / 255 - mean) / std


class Storage:
    """The numbers of a tensor in the file, and how the pickle names them."""

    def __init__(self, kind: Any, size: int) -> None:
        self.kind, self.size = kind, size


class StreamedTensor:
    """A tensor on its way to the file, a block of rows at a time. kind: such as torch.FloatStorage."""

    def __init__(self, kind: Any, shape: tuple[int, ...], blocks: Iterable[Any]) -> None:
        self.storage, self.shape, self.blocks = Storage(kind, math.prod(shape)), shape, blocks

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is what torch.save makes of a tensor."""
        import torch

        stride = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, collections.OrderedDict())


def streamed(tensor: Any) -> StreamedTensor:
    """A tensor that is in memory, as one block."""
    import torch

    kind = {torch.int64: torch.LongStorage, torch.float32: torch.FloatStorage}[tensor.dtype]
    return StreamedTensor(kind, tuple(tensor.shape), [tensor])


def write_set(job: Job, content: Any) -> None:
    """Write a `StreamedTensor` or a dict of them as torch.save would, without ever holding the images in memory."""
    try:
        with atomic_write(job.out) as file:
            save(content, file)
    except OSError as error:
        stays = f"The images stay in {job.shards}: make room, then --join."
        raise Failure(f"{job.out} cannot be written: {error.strerror or error}. {stays}") from error


def save(content: Any, file: IO[bytes]) -> None:
    """Write torch.save's format: a zip of a pickle and of the numbers of each tensor."""
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    keys = {id(tensor.storage): str(number) for number, tensor in enumerate(tensors)}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, Storage):
                return ("storage", value.kind, keys[id(value)], "cpu", value.size)
            return None

    pickled = io.BytesIO()
    Pickler(pickled, protocol=2).dump(content)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", pickled.getvalue()), ("byteorder", sys.byteorder.encode())):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
        for key, tensor in enumerate(tensors):
            with archive.open(zipfile.ZipInfo(f"archive/data/{key}"), "w", force_zip64=True) as member:
                for block in tensor.blocks:
                    member.write(memoryview(block.contiguous().numpy()).cast("B"))
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


def choose(labels: Any, classes: int, ipc: int | None) -> Any:
    """Which images make the set, in its order: class by class with --ipc; else class after class in turn, none more
    than one image ahead of the others.

    labels: (N,) int64. Returns (n,) int64, rows of them.
    """
    import torch

    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=classes)
    if ipc:
        return by_class
    rank = rank_in_class(labels[by_class], counts)
    kept = rank <= counts.min()
    return by_class[kept][(rank[kept] * classes + labels[by_class][kept]).argsort()]


def rank_in_class(labels: Any, counts: Any) -> Any:
    """(N,) int64: the place of each of the sorted labels among those like it. counts: how many there are of each."""
    import torch

    return torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def favor(probabilities: Any, classes: Any) -> None:
    """Make the class that each image was sampled as OWN_CLASS times as likely beside the others, in place.

    Images that are steered to modes of a class mostly show it, which the classifier does not know. This is Bayes' rule with
    that prior. probabilities: (N, C) float16. classes: (N,) int64.
    """
    own = probabilities.gather(1, classes[:, None]).float()
    total = 1 + (OWN_CLASS - 1) * own
    probabilities.div_(total)
    probabilities.scatter_(1, classes[:, None], (OWN_CLASS * own / total).to(probabilities.dtype))


def assign(probabilities: Any, wanted: int) -> Any:
    """Label images by their probabilities: each class gets the images with its highest, whatever they were sampled as.

    Each image that has no label yet goes to the likeliest of the classes that still want some, and each of these takes the
    surest that come to it; and so on until all classes have as many as they want.
    probabilities: (N, C) float16. wanted: images of each class. Returns (N,) int64, -1 for an image that is not kept.
    """
    import torch

    labels = torch.full((len(probabilities),), -1)
    left = torch.full((probabilities.shape[1],), wanted)
    while left.any() and len(free := (labels < 0).nonzero()[:, 0]):
        open_classes = left.nonzero()[:, 0]
        best = [probabilities[rows][:, open_classes].max(1) for rows in free.split(ROWS_AT_ONCE**2)]
        surest = torch.cat([found.values for found in best]).argsort(descending=True, stable=True)
        classes = open_classes[torch.cat([found.indices for found in best])[surest]]
        by_class = classes.argsort(stable=True)
        counts = torch.bincount(classes, minlength=len(left))
        taken = by_class[rank_in_class(classes[by_class], counts) < left[classes[by_class]]]
        labels[free[surest[taken]]] = classes[taken]
        left -= torch.bincount(classes[taken], minlength=len(left))
    return labels


def shards_of(job: Job, worker: int) -> list[tuple[int, int]]:
    """First and end of each of the worker's shards on disk, in order, none of them overlapping."""
    names = [path.stem.split("-") for path in job.shards.glob(f"{worker}-*-*.safetensors")]
    found: list[tuple[int, int]] = []
    for first, end in sorted((int(first), -int(end)) for _, first, end in names):
        if not found or first >= found[-1][1]:
            found.append((first, -end))
    return found


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place, synced, when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def say(text: str) -> None:
    print(f"generate.py: {text}", file=sys.stderr, flush=True)
