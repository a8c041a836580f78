"""Image files to (3, S, S) uint8 pixels, on all cores, straight into the file that will hold them.

Decoding small images is mostly Python's own work, so threads do not help; `decode_split` starts processes of
this very module instead. They import neither torch nor the user's program, and need no `__main__` guard in it.
A worker reads lines of JSON, {"start": row, "names": [...]}, and answers each with the rows it could not fill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import queue
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddkit.data.archives import DamagedMemberError, Tree, open_tree
from ddkit.data.split_file import SplitFile
from ddkit.errors import BadFileError, ComputeError
from ddkit.runtime.files import explain_os_error
from ddkit.runtime.openmp import available_cpus

_BLOCK = 256  # most images a worker decodes and writes at once; few enough that all workers end together
_FEW = 2000  # images below which starting processes costs more than it saves
_MAX_PIXELS = 1 << 27  # of one image file; larger ones are taken for bombs

# EPS is a program that Pillow hands to an outside interpreter; nothing of others' is executed here.
_REFUSED_FORMATS = {"EPS"}
# Tried first: Pillow asks each format in turn whether a file is its own.
_COMMON_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
_ORIENTATION_TAG = 0x0112  # of EXIF

# What Pillow's readers raise on damaged files, found by feeding them some; one bad file must not end the others.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadImageError(Exception):
    """A file that is no image, or a damaged one."""


class WrongSizeError(Exception):
    """A whole image of another size than the dataset's."""


@dataclass(frozen=True)
class Problem:
    """A row that could not be filled: its file's name and why; other_size when only the size is wrong."""

    row: int
    name: str
    reason: str
    other_size: bool = False


def open_image(data: bytes) -> Image.Image:
    """Read the header and decode the first frame, upright. Raises BadImageError."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        if math.prod(image.size) > _MAX_PIXELS:
            raise BadImageError(f"{image.width} x {image.height} pixels, too many to be an image to train on")
        image.load()
        return _upright(image)
    except _PILLOW_ERRORS as error:
        raise BadImageError(_reason(error)) from error


def read_image(data: bytes, image_size: int, *, resize: bool = False) -> NDArray[np.uint8]:
    """An image file's bytes -> (3, S, S) uint8 RGB, S = image_size.

    Grayscale and palettes become RGB; transparent pixels are laid on white; CMYK is converted;
    16-bit values are scaled to 8 bits. With `resize`, other sizes are cropped to the central square and resized
    with antialiasing; without it they raise WrongSizeError. Raises BadImageError for what cannot be decoded.
    """
    image = open_image(data)
    if image.size != (image_size, image_size) and not resize:
        raise WrongSizeError(f"{image.width} x {image.height}")
    try:
        rgb = to_rgb(image)
        if rgb.size != (image_size, image_size):
            rgb = _resized(rgb, image_size)
        return np.asarray(rgb).transpose(2, 0, 1)
    except _PILLOW_ERRORS as error:
        raise BadImageError(_reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB with 8 bits a channel. Raises ValueError for floating-point pixels."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def decode_split(
    path: Path,
    names: Sequence[str],
    target: SplitFile,
    *,
    resize: bool = False,
    give_up_after: int | None = None,
    workers: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[Problem]:
    """Decode the named files of the folder or zip `path` into rows 0 ... of `target`.

    resize: bring other sizes to the target's; otherwise they are problems.
    give_up_after: problems after which the rest is not looked at.
    workers: processes; None for as many as there are cores, and none at all for a small set.
    report: called with the number of files done so far.
    Returns the rows that could not be filled, in order. Raises BadFileError when `target` cannot be written.
    """
    size = min(_BLOCK, target.rows_at_once)
    blocks = [(start, names[start : start + size]) for start in range(0, len(names), size)]
    if workers is None:
        workers = 0 if len(names) < _FEW or not sys.executable else min(available_cpus(), len(blocks))
    problems: list[Problem] = []
    done = 0
    with _decoders(_Job(path, target, resize), workers) as decode:
        for count, found in decode(blocks):
            done += count
            problems += found
            report(done)
            if give_up_after is not None and len(problems) >= give_up_after:
                break
    return sorted(problems, key=lambda problem: problem.row)


@dataclass(frozen=True)
class _Job:
    """What every block of a split has in common."""

    path: Path  # of the source
    target: SplitFile
    resize: bool

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> _Job:
        value = json.loads(text)
        target = SplitFile(**{**value["target"], "path": Path(value["target"]["path"])})
        return cls(Path(value["path"]), target, value["resize"])


_Block = tuple[int, Sequence[str]]
_Decode = Callable[[list[_Block]], Iterator[tuple[int, list[Problem]]]]


@contextlib.contextmanager
def _decoders(job: _Job, workers: int) -> Iterator[_Decode]:
    """A function that decodes blocks, in this process or in `workers` others, which end with the context."""
    if workers < 1:
        tree = open_tree(job.path)
        with _quiet():
            yield lambda blocks: ((len(names), _decode_block(job, tree, start, names)) for start, names in blocks)
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            worker = _Worker(job)
            stack.callback(worker.end)
            idle.put(worker)
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)

        def run(start: int, names: Sequence[str]) -> tuple[int, list[Problem]]:
            worker = idle.get()
            try:
                return len(names), worker.decode(start, names)
            finally:
                idle.put(worker)

        yield lambda blocks: (future.result() for future in as_completed([pool.submit(run, *b) for b in blocks]))


class _Worker:
    """One process of this module."""

    def __init__(self, job: _Job) -> None:
        # The worker must find the same packages as this process, wherever it found them.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            # By its path: with -m, whatever lies in the working folder could be imported in the place of what is meant.
            [sys.executable, __file__, job.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def decode(self, start: int, names: Sequence[str]) -> list[Problem]:
        """Have one block decoded, and wait. Raises BadFileError where the target cannot be written, ComputeError if it dies."""
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"start": start, "names": list(names)}).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            remedy = "It may have been killed for want of memory: close other programs and try again."
            raise ComputeError(f"A process that decodes images ended with status {status}.", remedy if status < 0 else "")
        reply = json.loads(answer)
        if reply["refused"]:
            raise BadFileError(*reply["refused"])
        return [Problem(**problem) for problem in reply["problems"]]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _decode_block(job: _Job, tree: Tree, start: int, names: Sequence[str]) -> list[Problem]:
    side = job.target.image_size
    rows = np.zeros((len(names), 3, side, side), np.uint8)
    problems = []
    for k, name in enumerate(names):
        try:
            rows[k] = read_image(tree.read(name), side, resize=job.resize)
        except WrongSizeError as error:
            problems.append(Problem(start + k, name, str(error), other_size=True))
        except (BadImageError, DamagedMemberError) as error:
            problems.append(Problem(start + k, name, str(error)))
    try:
        job.target.write(start, rows)
    except OSError as error:
        raise explain_os_error(error, job.target.path) from error
    return problems


@functools.cache
def _formats() -> list[str]:
    Image.init()
    known = [name for name in dict.fromkeys((*_COMMON_FORMATS, *Image.ID)) if name in Image.OPEN]
    return [name for name in known if name not in _REFUSED_FORMATS]


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    return " ".join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the camera's orientation tag says, where there is one."""
    if "exif" in image.info and image.getexif().get(_ORIENTATION_TAG, 1) != 1:
        return ImageOps.exif_transpose(image)
    return image


def _resized(image: Image.Image, side: int) -> Image.Image:
    """The central square, resized; Pillow's bicubic filter widens with the reduction, so it antialiases."""
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2
    return image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit grayscale, which Pillow holds as "I;16" or, from some formats, as 32-bit "I": 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("whole-number pixels beyond 16 bits, whose range is not known")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's remarks on odd files would fall between the lines of the progress."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _work(job: _Job, requests: BinaryIO, answers: BinaryIO) -> None:
    tree = open_tree(job.path)
    for line in requests:
        request, refused, problems = json.loads(line), None, []
        try:
            problems = _decode_block(job, tree, request["start"], request["names"])
        except BadFileError as error:
            refused = (error.message, error.remedy)
        answer = {"refused": refused, "problems": [dataclasses.asdict(problem) for problem in problems]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    # Ctrl-C reaches every process of a terminal; the one that started this decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _quiet():
        _work(_Job.from_json(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
