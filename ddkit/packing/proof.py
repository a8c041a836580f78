"""Proving a track 2 bundle: it is unpacked into an empty folder and run with only the packages that it requires."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import Tensor

from ddkit.challenge import BATCH_SIZE, DatasetSpec
from ddkit.data.images import denormalize
from ddkit.data.store import dataset_spec
from ddkit.errors import ComputeError, InvalidSubmissionError
from ddkit.evaluation.sources import check_training_set
from ddkit.evaluation.timed_script import ScriptEntry
from ddkit.evaluation.tracks import images_per_class
from ddkit.packing.zipping import unpack
from ddkit.runtime.progress import Listener, Progress, ignore

SCRIPT = "generate.py"
REQUIREMENTS = ("torch", "diffusers", "safetensors")
_ROUNDING = 0.01  # of a step of 1/255, that normalizing in float32 may cost


@dataclass(frozen=True)
class ProofSettings:
    """The settings of a proof.

    budget: seconds for each dataset. fresh_venv: install requirements.txt from the package index into the environment,
    instead of letting it use the packages that are installed here. most: images of each dataset, after which the bundle
    stops, one of each class or more; None for as many as the budget allows.
    """

    budget: float = 60.0
    fresh_venv: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Proof:
    """The result for one dataset. seconds: from before the process was started to after its end."""

    dataset: str
    images: int
    images_per_class: tuple[int, int]
    seconds: float
    budget: float


def prove(bundle: Path, settings: ProofSettings, *, progress: Listener = ignore) -> tuple[Proof, ...]:
    """Unpack a bundle's zip into an empty folder, run it there for each of its datasets, and check what comes out.

    The interpreter is isolated (`python -I`). Only the packages that the bundle requires, and those that these require,
    can be imported; model hubs are offline, and the working folder is another one.
    Raises InvalidSubmissionError, saying what is wrong about the bundle, and ComputeError with the script's last lines.
    """
    with tempfile.TemporaryDirectory(prefix="ddkit-proof-") as temporary:
        folder, elsewhere = Path(temporary) / "bundle", Path(temporary) / "elsewhere"
        folder.mkdir()
        elsewhere.mkdir()
        unpack(bundle, folder)
        python = _environment(Path(temporary) / "environment", folder, settings, progress)
        return tuple(_prove(folder, name, python, elsewhere, settings, progress) for name in datasets_of(folder))


def datasets_of(folder: Path) -> list[str]:
    """The datasets that a bundle has models for; empty for a bundle that another program made."""
    return sorted(path.parent.name for path in folder.glob("models/*/entry.json"))


def _prove(folder: Path, name: str, python: Path, elsewhere: Path, settings: ProofSettings, progress: Listener) -> Proof:
    # Our variables without those that steer Python or ddkit, an empty home, where libraries and drivers may keep what they
    # compile, and no network for model hubs.
    passed_on = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DDKIT_", "HF_"))}
    home = elsewhere.with_name("home")
    home.mkdir(exist_ok=True)
    entry = ScriptEntry(
        folder / SCRIPT,
        name,
        () if settings.most is None else ("--most", str(settings.most)),
        python=(str(python), "-I"),
        environment={**passed_on, "HF_HUB_OFFLINE": "1", **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME"), str(home))},
        folder=elsewhere,
        may_end_early=settings.most is not None,
        progress=progress,
    )
    made = entry(0, settings.budget)
    spec = dataset_spec(name)
    check_made(made.images, made.labels, spec)
    if left := sorted(path.name for path in elsewhere.iterdir()):
        raise InvalidSubmissionError(f"The bundle left {', '.join(left)} in its working folder.")
    return Proof(name, len(made.images), images_per_class(made.labels, spec.num_classes), made.seconds, settings.budget)


def check_made(images: Tensor, labels: Tensor, spec: DatasetSpec) -> None:
    """Raise InvalidSubmissionError unless these are normalized bytes, in balance, and not all the same."""
    check_training_set(images, labels, spec)
    if images.dtype != torch.float32:
        raise InvalidSubmissionError(f"The images are {images.dtype}, not float32.")
    alike = len(images) > 1
    for part in images.split(BATCH_SIZE):  # the images of a GPU can be gigabytes
        bytes_ = denormalize(part, spec) * 255
        if float((bytes_ - bytes_.round().clamp(0, 255)).abs().max()) > _ROUNDING:
            raise InvalidSubmissionError(f"The images are not 8-bit pixels normalized with the constants of {spec.name}.")
        alike = alike and bool((part == images[0]).all())
    least, most = images_per_class(labels, spec.num_classes)
    if most - least > 1:
        raise InvalidSubmissionError(f"The classes have {least} to {most} images.")
    if alike:
        raise InvalidSubmissionError("All images are the same.")


def _environment(folder: Path, bundle: Path, settings: ProofSettings, progress: Listener) -> Path:
    """Make the environment; returns its interpreter."""
    venv.create(folder, with_pip=settings.fresh_venv, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if settings.fresh_venv:
        progress(Progress("installing the requirements", 0, None))
        command = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(bundle / "requirements.txt")]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            words = (finished.stderr or finished.stdout).strip().splitlines()[-1:]
            raise ComputeError("The requirements could not be installed.", " ".join(["pip said:", *words]))
        return python
    site_packages = next(path for path in folder.rglob("site-packages") if path.is_dir())
    # Where this interpreter finds packages: its own places, the user's, and those of a system below a virtual environment.
    own = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    below = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # A module that is None there cannot be imported.
    hiding = f"import sys; sys.modules.update(dict.fromkeys({sorted(_hidden_modules())}))"
    (site_packages / "ddkit-proof.pth").write_text("\n".join([hiding, *dict.fromkeys([*own, *below])]) + "\n", encoding="utf-8")
    return python


def _hidden_modules() -> set[str]:
    """The modules of all packages here but those that the bundle requires, and those that these require."""
    visible: set[str] = set()
    pending = list(REQUIREMENTS)
    while pending:
        name = canonicalize_name(pending.pop())
        if name in visible:
            continue
        visible.add(name)
        try:
            needed = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue  # it is for another system, or another Python
        pending += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    owners = importlib.metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not visible & {canonicalize_name(name) for name in names}}
    return hidden | {"ddkit"}
