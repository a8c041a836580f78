"""Image files to (3, S, S) uint8 pixels, on all cores, straight into the file that will hold them.

Decoding small images is mostly Python's own work, so threads do not help; `decode_split` starts processes instead.
Those of `concurrent.futures` would either be forked from a process in which torch has threads, or import the user's
program, which would then need a `__main__` guard. These import this module only, without torch.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import signal
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddkit.data.archives import DamagedFileError, Tree
from ddkit.data.split_file import SplitFile
from ddkit.errors import BadFileError, ComputeError
from ddkit.runtime.container import available_cpus
from ddkit.runtime.files import explain_os_error

_BLOCK = 256  # the most images that a worker decodes and writes at once; few, so that all workers end together
_FEW = 2000  # images; with fewer, starting processes costs more than it saves

# EPS is a program that Pillow hands to an outside interpreter; nothing of others' is executed here.
_REFUSED_FORMATS = {"EPS"}
# Tried first: Pillow asks each format in turn whether a file is its own.
_COMMON_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
_ORIENTATION_TAG = 0x0112  # of EXIF

# What Pillow's readers raise on damaged files, found by feeding them some; one bad file must not end the others.
_PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, AssertionError, AttributeError, TypeError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


class BadImageError(Exception):
    """A file that is not an image, or is damaged."""


class WrongSizeError(Exception):
    """A whole image of another size than the dataset's."""


@dataclass(frozen=True)
class Problem:
    """A row that could not be filled: its file's name and the reason. other_size: only the size is wrong."""

    row: int
    name: str
    reason: str
    other_size: bool = False


def open_image(data: bytes) -> Image.Image:
    """Read the header and decode the first frame, upright. Raises BadImageError."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
        image.load()
        if "exif" in image.info and image.getexif().get(_ORIENTATION_TAG, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return image
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
            # The central square; Pillow's bicubic filter widens with the reduction, so it antialiases.
            edge = min(rgb.size)
            left, top = (rgb.width - edge) / 2, (rgb.height - edge) / 2
            box = (left, top, left + edge, top + edge)
            rgb = rgb.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
        return np.asarray(rgb).transpose(2, 0, 1)
    except _PILLOW_ERRORS as error:
        raise BadImageError(_reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB with 8 bits a channel. Raises ValueError for floating-point pixels."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grayscale is "I;16" or, from some formats, 32-bit "I": 65535 becomes 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("whole-number pixels beyond 16 bits, whose range is not known")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def decode_split(
    tree: Tree,
    names: Sequence[str],
    target: SplitFile,
    *,
    resize: bool = False,
    give_up_after: int | None = None,
    workers: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> list[Problem]:
    """Decode the named files of `tree` into rows 0 ... of `target`.

    resize: bring images of other sizes to the target's size; otherwise they are problems.
    give_up_after: the number of problems after which the other files are not decoded.
    workers: the number of processes; None for as many as there are cores, and for none with a small set.
    report: called with the number of files done so far.
    Returns the rows that could not be filled, in order. Raises BadFileError if `target` cannot be written, ComputeError if a
    process ends before its work is done.
    """
    size = min(_BLOCK, target.rows_at_once)
    blocks = [(start, names[start : start + size]) for start in range(0, len(names), size)]
    if workers is None:
        workers = 0 if len(names) < _FEW or not sys.executable else min(available_cpus(), len(blocks))
    problems: list[Problem] = []
    done = 0
    with contextlib.closing(_decoded(_Job(tree, target, resize), blocks, workers)) as parts:
        for count, found in parts:
            done += count
            problems += found
            report(done)
            if give_up_after is not None and len(problems) >= give_up_after:
                break
    return sorted(problems, key=lambda problem: problem.row)


@dataclass(frozen=True)
class _Job:
    """The tree, the target and the option that all blocks of a split share."""

    tree: Tree
    target: SplitFile
    resize: bool

    def decode(self, start: int, names: Sequence[str]) -> list[Problem]:
        """Fill the rows from `start` on; the problems met. Raises BadFileError."""
        side = self.target.image_size
        rows = np.zeros((len(names), 3, side, side), np.uint8)
        problems = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd files, would fall between the lines of the progress
            for k, name in enumerate(names):
                try:
                    rows[k] = read_image(self.tree.read(name), side, resize=self.resize)
                except (WrongSizeError, BadImageError, DamagedFileError) as error:
                    problems.append(Problem(start + k, name, str(error), isinstance(error, WrongSizeError)))
        try:
            self.target.write(start, rows)
        except OSError as error:
            raise explain_os_error(error, self.target.path) from error
        return problems


_Block = tuple[int, Sequence[str]]  # its first row, and the names of its files


def _decoded(job: _Job, blocks: list[_Block], workers: int) -> Generator[tuple[int, list[Problem]], None, None]:
    """The number of files and the problems of each block, decoded in this process or in `workers` others."""
    if workers < 1:
        yield from ((len(names), job.decode(start, names)) for start, names in blocks)
        return
    own = threading.local()
    with contextlib.ExitStack() as processes:

        def decode(block: _Block) -> tuple[int, list[Problem]]:
            if not hasattr(own, "process"):  # started by the thread that uses it, so that all start at once
                own.process = processes.enter_context(_worker(job))
            return len(block[1]), _ask(own.process, block)

        pool = ThreadPoolExecutor(workers)
        try:
            yield from (future.result() for future in as_completed([pool.submit(decode, block) for block in blocks]))
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _worker(job: _Job) -> Iterator[subprocess.Popen[bytes]]:
    """A process that decodes, killed at the context's end."""
    # Isolated from the working folder and from variables, and then given the packages of this process.
    program = f"import sys; sys.path[:] = {[entry for entry in sys.path if entry]!r}; import {__name__} as it; it._work()"
    process = subprocess.Popen([sys.executable, "-I", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None  # both pipes were asked for
    try:
        with contextlib.suppress(BrokenPipeError):  # `_ask` will report it
            _send(job, process.stdin)
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _ask(process: subprocess.Popen[bytes], block: _Block) -> list[Problem]:
    """Have one block decoded, and wait. Raises what `_Job.decode` raises, and ComputeError if the process dies."""
    assert process.stdout is not None  # `_worker` asked for the pipe
    try:
        _send(block, process.stdin)
        answer = pickle.load(process.stdout)
    except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
        status = process.wait()
        remedy = "It may have been killed for lack of memory: close other programs and try again." if status < 0 else ""
        raise ComputeError(f"A process that decodes images ended with status {status}.", remedy) from error
    if isinstance(answer, BadFileError):
        raise answer
    return answer


def _work() -> None:
    """Run a worker: read a job and then blocks from standard input, and answer each block on standard output."""
    # Ctrl-C reaches every process of a terminal; the one that started this process decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    job: _Job = pickle.load(requests)
    with contextlib.suppress(EOFError):
        while True:
            try:
                _send(job.decode(*pickle.load(requests)), answers)
            except BadFileError as error:
                _send(error, answers)


def _send(value: object, pipe: IO[bytes] | None) -> None:
    assert pipe is not None
    pickle.dump(value, pipe)
    pipe.flush()


@functools.cache
def _formats() -> list[str]:
    Image.init()
    known = [name for name in dict.fromkeys((*_COMMON_FORMATS, *Image.ID)) if name in Image.OPEN]
    return [name for name in known if name not in _REFUSED_FORMATS]


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"
    return " ".join(str(error).split()) or type(error).__name__
