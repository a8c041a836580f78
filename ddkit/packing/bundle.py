"""The track 2 entry as a folder and as a zip: the stand-alone scripts, the models, and what organizers need to know."""

from __future__ import annotations

import contextlib
import platform
import string
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ddkit.challenge import CHALLENGE_DATASETS, DatasetSpec
from ddkit.data.store import dataset_spec
from ddkit.errors import BadFileError, MissingModelError, UsageError
from ddkit.evaluation.job import GeneratorFiles
from ddkit.generator import uvit as denoiser
from ddkit.generator.config import SamplingSettings, default_guidance
from ddkit.generator.model_folder import DENOISER_PART, WEIGHTS_FILE, ModelFacts, load_model
from ddkit.generator.samplers import make_scheduler
from ddkit.packing.zipping import unpack, write_zip
from ddkit.runtime.files import atomic_folder, atomic_write, read_json, sha256_of, write_json, write_text
from ddkit.runtime.tensor_files import save_safetensors

SCRIPT = "generate.py"
HASHES_FILE = "SHA256SUMS"  # as sha256sum writes and checks it
REQUIREMENTS = ("torch", "diffusers", "safetensors")
_SCRIPTS = (SCRIPT, "shards.py", "worker.py", "sampling.py")


DEFAULT_SAMPLING = SamplingSettings(guidance=default_guidance(None), precision="float32")


@dataclass(frozen=True)
class EntrySettings:
    """How a bundle's model is sampled and stored.

    sampling: of which sampler, steps, guidance, its interval and the precision count. Its guidance is less than for ten
        images a class, as hundreds of them have to differ.
    device: "auto" takes what there is; "cuda" refuses to run without a GPU. half: store the weights as float16.
    """

    sampling: SamplingSettings = field(default_factory=lambda: DEFAULT_SAMPLING)
    device: str = "auto"
    half: bool = False


@dataclass(frozen=True)
class EntryModel:
    """A model to bundle: of a dataset, in a folder, with its settings."""

    dataset: str
    folder: Path
    settings: EntrySettings = field(default_factory=EntrySettings)


def build_folder(models: Sequence[EntryModel], out: Path) -> Path:
    """Write the bundle as a folder, which can be run as it is; an earlier one is replaced.

    The same models and settings make the same files. Raises UsageError without models or with two of one dataset,
    MissingModelError where a model or the scripts are missing, and what `load_model` raises.
    """
    datasets = [model.dataset for model in models]
    if not datasets or len(set(datasets)) < len(datasets):
        raise UsageError(f"A bundle takes one model for each dataset, not {', '.join(datasets) or 'none'}.")
    with atomic_folder(out) as folder:
        for name, source in scripts().items():
            (folder / name).write_bytes(source.read_bytes())
        (folder / SCRIPT).chmod(0o755)
        facts = {model.dataset: _add_model(model, folder / "models" / model.dataset) for model in models}
        write_text(folder / "requirements.txt", "".join(f"{line}\n" for line in requirements()))
        write_text(folder / "README.md", _readme(models, facts))
        _write_hashes(folder)
    return out


def zip_folder(folder: Path, out: Path) -> Path:
    """The bundle as a zip, its files at the root; the same files make the same bytes."""
    members = {name: folder / name for name in sorted(_names(folder))}
    with atomic_write(out) as temporary:
        write_zip(members, temporary)
    return out


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder of a bundle, with generate.py in it: of a zip, unpacked while it is used; of a folder; of the script.

    Raises MissingModelError where there is nothing, UsageError for a file of another kind, BadFileError for a zip that is none.
    """
    if not path.exists():
        raise MissingModelError(f"There is no track 2 entry {path}.", "Make one: ddkit pack --track 2")
    if path.is_dir() or path.name == SCRIPT:
        yield _with_script(path if path.is_dir() else path.parent, path)
        return
    if path.suffix != ".zip":
        raise UsageError(f"{path} is no track 2 entry.", "Give a bundle's zip or folder, or its generate.py.")
    with tempfile.TemporaryDirectory(prefix="ddkit-bundle-") as temporary:
        yield _with_script(unpack(path, Path(temporary)), path)


@contextlib.contextmanager
def opened_generators(paths: Sequence[Path], dataset: str | None = None) -> Iterator[list[GeneratorFiles]]:
    """The bundles at these paths, opened as `opened` does, for `ddkit.evaluation.job.evaluate_files`.

    dataset: None takes every dataset that a bundle has a model for. Raises UsageError if a bundle does not tell.
    """
    with contextlib.ExitStack() as stack:
        generators = []
        for path in paths:
            folder = stack.enter_context(opened(path))
            names = [dataset] if dataset else datasets_of(folder)
            if not names:
                raise UsageError(f"{path} does not tell which datasets it is for.", "Add --dataset NAME.")
            generators += [GeneratorFiles(path, folder, folder / SCRIPT, name, entry_facts(folder, name)) for name in names]
        yield generators


def datasets_of(folder: Path) -> list[str]:
    """The datasets that a bundle has models for; empty of an entry of another make."""
    return sorted(path.parent.name for path in folder.glob("models/*/entry.json"))


def entry_facts(folder: Path, dataset: str) -> dict[str, Any]:
    """How a bundle samples that dataset; empty of an entry of another make."""
    path = folder / "models" / dataset / "entry.json"
    return dict(read_json(path)) if path.is_file() else {}


def scripts() -> dict[str, Path]:
    """The stand-alone scripts, from the source checkout or from where the package's data was installed."""
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))  # pip may fall back to the latter
    installed = [Path(sysconfig.get_path("data", scheme)) / "share" / "ddkit" for scheme in schemes]
    places = [Path(__file__).parents[2] / "submission", *installed]
    for place in (place / "track2" for place in places):
        found = {name: place / name for name in _SCRIPTS}
        if all(path.is_file() for path in found.values()):
            return {**found, "denoiser.py": Path(denoiser.__file__)}
    raise MissingModelError(
        f"The scripts of the track 2 entry are in none of {', '.join(map(str, places))}.",
        "Run ddkit from a checkout: pip install -e .",
    )


def requirements() -> list[str]:
    """What the entry needs, with the versions that are installed here: those it is tested with."""
    # Local labels, such as "+cpu", name builds that the package index does not have.
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


def lacking(datasets: Sequence[str]) -> list[str]:
    """Datasets of the challenge that a bundle of these has no model for."""
    return [spec.name for spec in CHALLENGE_DATASETS if spec.name not in datasets]


def _with_script(folder: Path, path: Path) -> Path:
    if not (folder / SCRIPT).is_file():
        raise BadFileError(f"{path} holds no {SCRIPT}.", "Give a bundle that ddkit pack --track 2 made, or one like it.")
    return folder


def _add_model(model: EntryModel, folder: Path) -> ModelFacts:
    """Write a model's folder: its parts without what only ddkit reads, its sampler, and entry.json."""
    facts, spec = load_model(model.folder, dataset=model.dataset).facts, dataset_spec(model.dataset)
    _check_fits(facts, spec, model.folder)
    parts = [part for part in ("vae", DENOISER_PART) if (model.folder / part).is_dir()]
    for part in parts:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_bytes((model.folder / part / "config.json").read_bytes())
        _copy_weights(model.folder / part / WEIGHTS_FILE, folder / part / WEIGHTS_FILE, half=model.settings.half)
    sampling = model.settings.sampling
    make_scheduler(sampling.sampler, facts.prediction).save_config(folder / "scheduler")
    entry = {
        "dataset": spec.name,
        "num_classes": spec.num_classes,
        "image_size": spec.image_size,
        "mean": spec.mean,
        "std": spec.std,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "guidance_interval": sampling.guidance_interval,
        "precision": sampling.precision,
        "device": model.settings.device,
        "pixels": True,  # generate.py has the option --pixels
    }
    write_json(folder / "entry.json", entry)
    return facts


def _check_fits(facts: ModelFacts, spec: DatasetSpec, folder: Path) -> None:
    if (len(facts.class_names), facts.image_size) != (spec.num_classes, spec.image_size):
        raise UsageError(
            f"The model in {folder} makes {len(facts.class_names)} classes of {facts.image_size} px; "
            f"{spec.name} has {spec.num_classes} of {spec.image_size} px.",
            "Train a model on the dataset as it is now.",
        )


def _copy_weights(source: Path, target: Path, *, half: bool) -> None:
    if not half:
        target.write_bytes(source.read_bytes())
        return
    weights = load_file(source)
    save_safetensors({name: w.half() if w.dtype == torch.float32 else w for name, w in weights.items()}, target)


def _readme(models: Sequence[EntryModel], facts: Mapping[str, ModelFacts]) -> str:
    rows = ["| dataset | images | mean | std | sampling | training steps of the model |", "|---|---|---|---|---|---|"]
    for model in models:
        spec, sampling = dataset_spec(model.dataset), model.settings.sampling
        numbers = [", ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std)]
        rows.append(
            f"| {spec.name} | {spec.num_classes} classes, {spec.image_size} x {spec.image_size} | {numbers[0]} | "
            f"{numbers[1]} | {sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}, "
            f"{sampling.precision} | {facts[model.dataset].steps:,} |"
        )
    template = string.Template((scripts()[SCRIPT].parent / "README.md").read_text(encoding="utf-8"))
    text = template.substitute(datasets="\n".join(rows), python=".".join(platform.python_version_tuple()[:2]))
    return text if "cifar100" in facts else text.replace("--dataset cifar100", f"--dataset {models[0].dataset}")


def _write_hashes(folder: Path) -> None:
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in sorted(_names(folder))]
    write_text(folder / HASHES_FILE, "".join(lines))


def _names(folder: Path) -> list[str]:
    """All files below the folder, as paths from there with forward slashes; what running it leaves is left out."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in files if "__pycache__" not in path.parts]
