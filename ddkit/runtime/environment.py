"""What is installed: recognizing pairs of libraries that do not work together, and naming versions in results, and which
process of several speaks."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from ddkit import __version__
from ddkit.errors import DDKitError

_NAMED_IN_RESULTS = ("torch", "torchvision", "diffusers")


class BrokenInstallError(DDKitError):
    """Libraries that are installed and cannot be used together, or one that is missing."""


def explain_broken_install(error: Exception) -> BrokenInstallError | None:
    """What `error`, raised by importing a library, means for the user; None when it is another matter.

    torchvision's compiled operators are missing when it was built for another torch than the one
    installed, for example a CPU-only torch beside the registry's torchvision.
    """
    text = str(error)
    if "torchvision::" in text or "torchvision" in text and "undefined symbol" in text:
        return BrokenInstallError(
            f"torch {_installed('torch')} and torchvision {_installed('torchvision')} were not built for each other.",
            "Install a pair that was: pip install --force-reinstall torch torchvision",
        )
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("ddkit"):
        return BrokenInstallError(f"The Python package '{error.name}' is missing.", f"pip install {error.name}")
    return None


def is_main() -> bool:
    """Whether this process speaks for those that `accelerate launch` started together; a process alone does."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes `accelerate launch` started together; 1 for a process alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def versions() -> dict[str, str]:
    """Versions of ddkit, Python and the libraries that decide on results, for records of how they came about."""
    return {
        "ddkit": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in _NAMED_IN_RESULTS},
    }


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
