"""The installed libraries, and the processes that `accelerate launch` started together."""

from __future__ import annotations

import os
import platform

from ddkit import __version__
from ddkit.errors import DDKitError

_NAMED_IN_RESULTS = ("torch", "torchvision", "diffusers")
_PACKAGES = {"PIL": "pillow", "yaml": "pyyaml"}  # of modules that are called otherwise


class BrokenInstallError(DDKitError):
    """Installed libraries that do not work together, or a missing one."""


def explain_broken_install(error: Exception) -> BrokenInstallError | None:
    """Explain an error raised while a library was imported; None for other errors.

    torchvision's compiled operators are missing if it was built for another torch than the installed one, for example
    if torch is the build for CPUs and torchvision is not.
    """
    text = str(error)
    if "torchvision::" in text or "torchvision" in text and "undefined symbol" in text:
        return BrokenInstallError(
            f"torch {_installed('torch')} and torchvision {_installed('torchvision')} were not built for each other.",
            "Install a pair that was: pip install --force-reinstall torch torchvision",
        )
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("ddkit"):
        package = error.name.partition(".")[0]
        package = _PACKAGES.get(package, package)
        return BrokenInstallError(f"The Python package '{package}' is missing.", f"pip install {package}")
    return None


def is_main() -> bool:
    """True in the process that prints and writes for those started together, and in a process alone."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """The number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """The number of them that run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def versions() -> dict[str, str]:
    """Versions of ddkit, Python and the libraries that results depend on, for records."""
    return {
        "ddkit": __version__,
        "python": platform.python_version(),
        **{name: _installed(name) for name in _NAMED_IN_RESULTS},
    }


def _installed(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # imported late: it takes longer than all of this module

    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
