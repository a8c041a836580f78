"""Proving a track 2 bundle: unpacked into an empty folder and run there by a Python that has only what it asks for."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import denormalize
from ddkit.data.store import dataset_spec
from ddkit.errors import ComputeError, InvalidSubmissionError
from ddkit.evaluation.sources import check_training_set
from ddkit.evaluation.timed_script import ScriptEntry
from ddkit.evaluation.tracks import generate_within, images_per_class
from ddkit.packing.bundle import REQUIREMENTS, SCRIPT, datasets_of
from ddkit.packing.zipping import unpack
from ddkit.runtime.progress import Listener, Progress, ignore

_ROUNDING = 0.01  # of a step of 1/255, that normalizing in float32 may cost
# Where the guard below lies in the environment's site-packages, beside the .pth file that imports it.
_GUARD = "ddkit_proof_guard"


@dataclass(frozen=True)
class ProofSettings:
    """How to prove a bundle.

    budget: seconds for each dataset. fresh_venv: install requirements.txt from the package index into the environment,
    instead of letting it see those packages of ours. device: as the entry takes it, None for what it was packed with.
    most: images of each dataset, which may be there before the budget is spent; None for as many as it allows.
    """

    budget: float = 60.0
    fresh_venv: bool = False
    device: str | None = None
    most: int | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the entry, beside dataset, budget and seed."""
        device = ("--device", self.device) if self.device else ()
        return device if self.most is None else (*device, "--most", str(self.most))


@dataclass(frozen=True)
class Proof:
    """What came out for one dataset. seconds: from before the process was started to after its end."""

    dataset: str
    images: int
    images_per_class: tuple[int, int]
    seconds: float
    budget: float


def prove(bundle: Path, settings: ProofSettings | None = None, *, progress: Listener = ignore) -> tuple[Proof, ...]:
    """Unpack a bundle's zip into an empty folder, run it there for each of its datasets, and check what comes out.

    The interpreter is isolated (`python -I`), in an environment in which of all packages here only those can be
    imported that the bundle requires, and what these require; without network for model hubs, in another folder.
    Raises InvalidSubmissionError, saying what is wrong about the bundle, and ComputeError with the entry's last words.
    """
    settings = settings or ProofSettings()
    with tempfile.TemporaryDirectory(prefix="ddkit-proof-") as temporary:
        folder, elsewhere = Path(temporary) / "bundle", Path(temporary) / "elsewhere"
        folder.mkdir()
        elsewhere.mkdir()
        unpack(bundle, folder)
        python = _environment(Path(temporary) / "environment", folder, settings, progress)
        _check_without_ddkit(python)
        return tuple(_prove(folder, name, python, elsewhere, settings, progress) for name in datasets_of(folder))


def _prove(folder: Path, name: str, python: Path, elsewhere: Path, settings: ProofSettings, progress: Listener) -> Proof:
    entry = ScriptEntry(
        folder / SCRIPT,
        name,
        settings.arguments,
        python=(str(python), "-I"),
        environment=_variables(elsewhere),
        folder=elsewhere,
        progress=progress,
    )
    made = generate_within(entry, 0, settings.budget)
    spec = dataset_spec(name)
    check_made(made.images, made.labels, spec)
    if left := sorted(path.name for path in elsewhere.iterdir()):
        raise InvalidSubmissionError(f"The entry left {', '.join(left)} in the folder that it was run in.")
    return Proof(name, len(made.images), images_per_class(made.labels, spec.num_classes), made.seconds, settings.budget)


def check_made(images: Tensor, labels: Tensor, spec: DatasetSpec) -> None:
    """Raise InvalidSubmissionError unless these are normalized bytes, in balance, and not all the same."""
    check_training_set(images, labels, spec)
    if images.dtype != torch.float32:
        raise InvalidSubmissionError(f"The images are {images.dtype}, not float32.")
    bytes_ = denormalize(images, spec) * 255
    if float((bytes_ - bytes_.round().clamp(0, 255)).abs().max()) > _ROUNDING:
        raise InvalidSubmissionError(f"The images are not bytes normalized with the constants of {spec.name}.")
    least, most = images_per_class(labels, spec.num_classes)
    if most - least > 1:
        raise InvalidSubmissionError(f"The classes have {least} to {most} images.")
    if len(images) > 1 and bool((images == images[0]).all()):
        raise InvalidSubmissionError("All images are the same.")


def _environment(folder: Path, bundle: Path, settings: ProofSettings, progress: Listener) -> Path:
    """Make the environment; returns its interpreter."""
    venv.create(folder, with_pip=settings.fresh_venv, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if settings.fresh_venv:
        _install(python, bundle / "requirements.txt", progress)
        return python
    site_packages = next(path for path in folder.rglob("site-packages") if path.is_dir())
    (site_packages / f"{_GUARD}.py").write_text(_guard(), encoding="utf-8")
    # Where this interpreter finds packages: its own places, the user's, and those of a system below a virtual environment.
    own = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    below = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    ours = dict.fromkeys([*own, *below])
    (site_packages / f"{_GUARD}.pth").write_text("\n".join([f"import {_GUARD}", *ours]) + "\n", encoding="utf-8")
    return python


def _install(python: Path, requirements: Path, progress: Listener) -> None:
    progress(Progress("installing the requirements", 0, None))
    command = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        words = (finished.stderr or finished.stdout).strip().splitlines()[-1:]
        raise ComputeError("The requirements could not be installed.", " ".join(["pip said:", *words]))


def _guard() -> str:
    """A module that hides all packages here but those that the bundle requires, and what these require."""
    visible = _with_requirements(REQUIREMENTS)
    tops = importlib.metadata.packages_distributions()
    hidden_modules = {top for top, owners in tops.items() if not visible & {_normal(owner) for owner in owners}}
    hidden_packages = {_normal(owner) for owners in tops.values() for owner in owners} - visible
    return _GUARD_SOURCE.format(modules=sorted(hidden_modules | {"ddkit"}), packages=sorted(hidden_packages))


_GUARD_SOURCE = """\
import sys
from importlib.machinery import PathFinder

MODULES, PACKAGES = frozenset({modules}), frozenset({packages})


class Guard(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in MODULES else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *arguments, **names):
        for found in PathFinder.find_distributions(*arguments, **names):
            if (found.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-") not in PACKAGES:
                yield found


sys.meta_path[:] = [Guard if finder is PathFinder else finder for finder in sys.meta_path]
"""


def _with_requirements(names: Iterable[str]) -> set[str]:
    """Normalized names of these packages and of all that are installed because of them; extras are left out."""
    found: set[str] = set()
    pending = [_normal(name) for name in names]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system, or another Python
        found.add(name)
        needed = [line for line in requirements if "extra ==" not in line]
        pending += [_normal(re.split(r"[^\w.-]", line.strip(), maxsplit=1)[0]) for line in needed]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _variables(home: Path) -> dict[str, str]:
    """Ours without what steers Python or ddkit, an empty home, and no network for model hubs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DDKIT_", "HF_"))}
    return {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(home.parent / "cache"),
            "HF_HOME": str(home.parent / "cache")}  # fmt: skip


def _check_without_ddkit(python: Path) -> None:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('ddkit') is not None)"
    if subprocess.run([str(python), "-I", "-c", code], check=False).returncode != 0:
        raise ComputeError(f"The environment of {sys.executable} lets the proof import ddkit.", "Try --fresh-venv.")
