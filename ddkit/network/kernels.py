"""Compiling this package's C++ once for the processor at hand, and keeping the result in the cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ddkit.errors import BadFileError, DDKitError
from ddkit.runtime.container import cpu_flags
from ddkit.runtime.device import cpu_model
from ddkit.runtime.files import atomic_write, cache_folder

# -O3 unrolls the loops over taps and vectors; no flag relaxes the arithmetic but fused multiply-add, which is GCC's
# and Clang's habit and rounds once instead of twice.
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")
_CACHE_FOLDER = "_kernels"  # no dataset can have this name
# What "for this very processor" is called; the first that the compiler knows is taken.
_TARGETS = (("-march=native",), ("-mcpu=native",), ())


class CompileError(DDKitError):
    """There is no C++ compiler, or it does not take our source."""


def load_library(source: Path, *flags: str) -> ctypes.CDLL:
    """The shared library made from `source`; compiled when this machine has not done so before, and tried once.

    flags: for the compiler, next to those that all libraries get.
    Where the cache cannot be written, the library serves this process alone.
    Raises CompileError.
    """
    loaded = _tried(source, flags)
    if isinstance(loaded, DDKitError):
        raise loaded.with_traceback(None)  # else it would hold on to the networks of all who asked
    return loaded


@functools.cache
def _tried(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL | DDKitError:
    """The library, or why there is none."""
    flags = (*_FLAGS, *flags)
    try:
        compiler = compiler_command()
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
        # The CPU's flags too: a virtual machine may hide instructions while it shows the same model name.
        processor = (platform.machine(), cpu_model(), *sorted(cpu_flags()))
        made_of = "\n".join((source.read_text(encoding="utf-8"), version, *flags, *processor))
        fingerprint = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        path = cache_folder() / _CACHE_FOLDER / f"{source.stem}-{fingerprint}.so"
        if not path.exists():
            try:
                with atomic_write(path) as temporary:
                    _compile(compiler, flags, source, temporary)
            except BadFileError:  # such as a cache that others share for reading
                with tempfile.TemporaryDirectory(prefix="ddkit-kernels-", ignore_cleanup_errors=True) as folder:
                    _compile(compiler, flags, source, Path(folder, path.name))
                    return _loaded(Path(folder, path.name))  # which does not need the file any more
        return _loaded(path)
    except DDKitError as error:
        return error


def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"{path} cannot be loaded: {error}.", "Delete it; ddkit then compiles it again.") from error


def compiler_command() -> list[str]:
    """The words of $CXX, or else the first compiler on the path. Raises CompileError where there is none."""
    wanted = os.environ.get("CXX")
    for command in [wanted] if wanted else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise CompileError(
        f"The C++ compiler '{wanted}' was not found." if wanted else "There is no C++ compiler.",
        "Install g++ or clang++, or set CXX to one.",
    )


def _compile(compiler: list[str], flags: tuple[str, ...], source: Path, out: Path) -> None:
    complaint = ""
    # GCC for Windows does not align the stack for the longer vectors that "native" may mean.
    for target in _TARGETS if os.name != "nt" else _TARGETS[-1:]:
        try:
            made = subprocess.run(
                [*compiler, *flags, *target, str(source), "-o", str(out)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise CompileError(f"{compiler[0]} cannot be run: {error.strerror}.") from error
        if made.returncode == 0:
            return
        complaint = complaint or made.stderr.strip().split("\n")[0]
    raise CompileError(f"{' '.join(compiler)} does not compile {source.name}: {complaint}")
