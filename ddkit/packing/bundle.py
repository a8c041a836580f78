"""Track 2's bundle, as a folder and as a zip: stand-alone scripts, models, and what the organizers need to know."""

from __future__ import annotations

import contextlib
import platform
import shutil
import string
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ddkit.data.prepare import open_dataset
from ddkit.data.store import ImageSet, dataset_spec, train_sha256
from ddkit.errors import BadFileError, DDKitError, MissingModelError, UsageError
from ddkit.evaluation.job import GeneratorFiles
from ddkit.generator import linear_plan, uvit
from ddkit.generator.config import BundleSettings
from ddkit.generator.model_facts import (
    DENOISER_PART,
    WEIGHTS_FILE,
    ModelFacts,
    model_hash,
    require_label_dropout,
    require_present_dataset,
)
from ddkit.generator.model_folder import Model, load_model
from ddkit.generator.modes import find_modes
from ddkit.generator.samplers import make_plan, make_scheduler
from ddkit.generator.sampling import Sampler
from ddkit.history import PackedRecords, require_name
from ddkit.metrics.features import CLASSIFIER, convnet_features
from ddkit.packing.pack import PackedFile, packed_files
from ddkit.packing.proof import REQUIREMENTS, SCRIPT, Proof, ProofSettings, datasets_of, prove
from ddkit.packing.zipping import unpack, write_zip
from ddkit.runtime import container
from ddkit.runtime.device import resolve_device
from ddkit.runtime.files import atomic_folder, atomic_write, read_json, require_ending, sha256_of, write_json, write_text
from ddkit.runtime.progress import Listener, ignore
from ddkit.runtime.tensor_files import save_safetensors

MODES_FILE = "modes.safetensors"  # as sampling.py reads it
_MODES = 500  # of each class, at most; where a class has fewer images, each of them is a mode
HASHES_FILE = "SHA256SUMS"  # as sha256sum writes and checks it
_SCRIPTS = (SCRIPT, "shards.py", "worker.py", "sampling.py", "classifier.py")


@dataclass(frozen=True)
class BundleModel:
    """A model to bundle: its dataset, its folder and its settings."""

    dataset: str
    folder: Path
    settings: BundleSettings = field(default_factory=BundleSettings)


@dataclass(frozen=True)
class PackedBundle:
    """A packed bundle. proofs: one for each dataset; empty if none was asked for."""

    path: Path
    sha256: str
    files: tuple[PackedFile, ...]
    proofs: tuple[Proof, ...]


def pack_bundle(
    models: Sequence[BundleModel],
    out: Path,
    *,
    proof: ProofSettings | None,
    name: str | None = None,
    records: PackedRecords | None = None,
    recipe: str = "",
    on_event: Callable[[str], object] = lambda text: None,
    progress: Listener = ignore,
) -> PackedBundle:
    """Bundle models with the stand-alone scripts into the zip `out`, and prove it before it takes its place.

    The same models, settings, cached classifier and cached modes make the same bytes; a classifier that is trained again may
    differ by rounding, and modes that are found again on another device by more. proof: None packs without running the
    bundle. records: where the zip is recorded, with the path `recipe`, under `name` or else under that of the file `out`;
    None records nothing. on_event: called with a sentence if it is recorded under another name. An earlier zip is kept if
    anything fails. Raises UsageError for a proof of fewer images than a dataset has classes, for what cannot be a name or if
    the records hold the name for other files, and what `build_folder` and `prove` raise.
    """
    if models and proof and proof.most is not None:
        largest = max((dataset_spec(model.dataset) for model in models), key=lambda spec: spec.num_classes)
        if proof.most < (least := largest.num_classes):
            raise UsageError(
                f"--proof-images {proof.most} is less than an image of each of the {least} classes of {largest.name}.",
                f"Give --proof-images {least} or more.",
            )
    require_name(name)
    require_ending(out, ".zip")
    with tempfile.TemporaryDirectory(prefix="ddkit-pack-") as temporary, atomic_write(out) as zipped:
        zip_folder(build_folder(models, Path(temporary) / "bundle", progress=progress), zipped)
        files = packed_files(zipped)
        hashes = {file.name: file.sha256 for file in files}
        chosen, remark = records.choose_name(name, out.stem, hashes) if records else ("", "")
        proofs = prove(zipped, proof, progress=progress) if proof else ()
    packed = PackedBundle(out, sha256_of(out), files, proofs)
    if records:
        records.add(chosen, out, packed.sha256, 2, hashes, recipe)
        if remark:
            on_event(remark)
    return packed


def build_folder(models: Sequence[BundleModel], out: Path, *, progress: Listener = ignore) -> Path:
    """Write the bundle as a folder that can be run as it is; an earlier one is replaced.

    A classifier is trained on the real images once, unless all images are kept, and their modes are found once for mode
    guidance. Raises UsageError without models, with two of one dataset or for guidance of a model that was trained without
    label dropout, MissingModelError if a model or the scripts are missing, and what `load_model`, `find_modes` and
    `open_dataset` raise.
    """
    datasets = [model.dataset for model in models]
    if not datasets or len(set(datasets)) < len(datasets):
        raise UsageError(f"A bundle takes one model for each dataset, not {', '.join(datasets) or 'none'}.")
    with atomic_folder(out) as folder:
        for name, source in scripts().items():
            shutil.copyfile(source, folder / name)
        (folder / SCRIPT).chmod(0o755)
        facts = {model.dataset: _add_model(model, folder / "models" / model.dataset, progress) for model in models}
        write_text(folder / "requirements.txt", "".join(f"{line}\n" for line in requirements()))
        write_text(folder / "README.md", _readme(models, facts))
        lines = [f"{sha256_of(folder / name)}  {name}\n" for name in sorted(_names(folder))]
        write_text(folder / HASHES_FILE, "".join(lines))
    return out


def zip_folder(folder: Path, out: Path) -> Path:
    """The bundle as a zip, its files at the root; the same files make the same bytes."""
    write_zip({name: folder / name for name in sorted(_names(folder))}, out)
    return out


@contextlib.contextmanager
def open_bundle(path: Path) -> Iterator[Path]:
    """The folder of a bundle, with generate.py in it. path: a zip, which is unpacked while it is used, a folder or the script.

    Raises MissingModelError if there is nothing, UsageError for a file of another kind, BadFileError for a damaged zip.
    """
    if not path.exists():
        raise MissingModelError(f"There is no track 2 bundle {path}.", "Make one: ddkit pack --track 2")
    if path.is_dir() or path.name == SCRIPT:
        yield _with_script(path if path.is_dir() else path.parent, path)
        return
    if path.suffix != ".zip":
        raise UsageError(f"{path} is not a track 2 bundle.", "Name a bundle's zip or folder, or its generate.py.")
    with tempfile.TemporaryDirectory(prefix="ddkit-bundle-") as temporary:
        yield _with_script(unpack(path, Path(temporary)), path)


@contextlib.contextmanager
def open_generators(paths: Sequence[Path], dataset: str | None = None) -> Iterator[list[GeneratorFiles]]:
    """The bundles at these paths, opened as `open_bundle` does, for `ddkit.evaluation.job.evaluate_files`.

    dataset: None takes every dataset that a bundle has a model for. Raises UsageError if a bundle does not name any.
    """
    with contextlib.ExitStack() as stack:
        generators = []
        for path in paths:
            folder = stack.enter_context(open_bundle(path))
            names = [dataset] if dataset else datasets_of(folder)
            if not names:
                raise UsageError(f"{path} does not say which datasets it is for.", "Add --dataset NAME.")
            generators += [
                GeneratorFiles(path, folder, folder / SCRIPT, name, read_bundle_settings(folder, name)) for name in names
            ]
        yield generators


def read_bundle_settings(folder: Path, dataset: str) -> dict[str, Any]:
    """The sampling settings of a bundle for that dataset; empty for a bundle that another program made."""
    path = folder / "models" / dataset / "entry.json"
    return dict(read_json(path)) if path.is_file() else {}


def scripts() -> dict[str, Path]:
    """The stand-alone scripts by name, from the source checkout or from where the package's data was installed."""
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))  # pip may fall back to the latter
    installed = [Path(sysconfig.get_path("data", scheme)) / "share" / "ddkit" for scheme in schemes]
    places = [Path(__file__).parents[2] / "submission", *installed]
    for place in (place / "track2" for place in places):
        found = {name: place / name for name in _SCRIPTS}
        if all(path.is_file() for path in found.values()):
            shared = {"denoiser.py": uvit, "linear_plan.py": linear_plan, "container.py": container}
            return found | {name: Path(str(module.__file__)) for name, module in shared.items()}
    raise MissingModelError(
        f"The scripts of the track 2 bundle were not found in {', '.join(map(str, places))}.",
        "Run ddkit from a checkout: pip install -e .",
    )


def requirements() -> list[str]:
    """The packages that the bundle needs, in the versions that are installed here, with which it was tested."""
    # Local labels, such as "+cpu", name builds that the package index does not have.
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]


@dataclass(frozen=True)
class RoundingCost:
    """The effect of storing weights as float16 on images: differences of pixels, in steps of 1/255."""

    mean: float
    largest: int
    images: int


@torch.no_grad()
def rounding_cost(model: BundleModel, *, images: int = 32) -> RoundingCost:
    """Sample the same images with the weights as they are and rounded to float16, without mode guidance, and compare them."""
    original, rounded = load_model(model.folder), load_model(model.folder)
    for network in (rounded.denoiser, rounded.autoencoder):
        for parameter in network.parameters():
            parameter.copy_(parameter.half())
    classes = len(original.facts.class_names)
    labels, indices = torch.arange(images) % classes, torch.arange(images) // classes
    config = replace(model.settings.sampling, mode_guidance=0.0, batch_size=images, compile=False)
    samplers = (Sampler(each, config, "cpu") for each in (original, rounded))
    first, second = (torch.cat([*sampler.images(labels, indices)]) for sampler in samplers)
    difference = (first.int() - second.int()).abs()
    return RoundingCost(float(difference.float().mean()), int(difference.max()), images)


def _with_script(folder: Path, path: Path) -> Path:
    """The folder of the script: this one, or the only one in it that has it, as when a folder was zipped."""
    found = [place for place in (folder, *sorted(folder.iterdir())) if (place / SCRIPT).is_file()]
    if not found or (found[0] != folder and len(found) > 1):
        raise BadFileError(
            f"{path} does not contain {SCRIPT}.", "Name a bundle that ddkit pack --track 2 made, or one of the same layout."
        )
    return found[0]


def _add_model(model: BundleModel, folder: Path, progress: Listener) -> ModelFacts:
    """Write a model's folder: its parts without what only ddkit reads, its sampler, classifier and modes, and entry.json."""
    loaded, settings = load_model(model.folder, dataset=model.dataset), model.settings
    require_present_dataset(loaded.facts, model.folder)
    sampling = settings.sampling
    require_label_dropout(loaded.facts, sampling.guidance)
    make_plan(sampling.sampler, loaded.facts.prediction, sampling.steps, mode_guidance=sampling.mode_guidance)  # or refused
    for part in ("vae", DENOISER_PART):
        _copy_part(model.folder / part, folder / part, half=settings.half)
    make_scheduler(sampling.sampler, loaded.facts.prediction).save_config(folder / "scheduler")
    modes = 0
    if settings.has_classifier or sampling.mode_guidance:
        try:
            real = open_dataset(model.dataset, "train", progress=progress)
        except DDKitError as error:
            needs = "The bundle's classifier and modes come from these images; with --keep 1 --mode-guidance 0 it has neither."
            raise type(error)(error.message, f"{error.remedy} {needs}".strip()) from error
        modes = _add_classifier_and_modes(model, loaded, real, folder, progress)
    write_json(folder / "entry.json", _entry(model, modes))
    return loaded.facts


def _copy_part(source: Path, target: Path, *, half: bool) -> None:
    """Copy a part's configuration and weights. half: as float16."""
    target.mkdir(parents=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    if half:
        weights = load_file(source / WEIGHTS_FILE)
        halved = {name: w.half() if w.dtype == torch.float32 else w for name, w in weights.items()}
        save_safetensors(halved, target / WEIGHTS_FILE)
    else:
        shutil.copyfile(source / WEIGHTS_FILE, target / WEIGHTS_FILE)


def _add_classifier_and_modes(model: BundleModel, loaded: Model, real: ImageSet, folder: Path, progress: Listener) -> int:
    """Write those of the two that the settings ask for; returns the number of modes of a class. real: the training images."""
    device, spec = resolve_device("auto"), dataset_spec(model.dataset)  # the device need not be the bundle's
    if model.settings.has_classifier:
        network = convnet_features(real, spec, CLASSIFIER, device=device, progress=progress).network.cpu()
        (folder / "classifier").mkdir()
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_safetensors(weights, folder / "classifier" / "classifier.safetensors")
        write_json(folder / "classifier" / "config.json", {"image_size": network.image_size})
    if model.settings.sampling.mode_guidance:
        count = min(len(real) // spec.num_classes, _MODES)
        sha256 = train_sha256(model.dataset)
        modes = find_modes(model.folder, loaded, real, count, dataset_sha256=sha256, device=device, progress=progress)
        save_safetensors({"modes": modes.half()}, folder / MODES_FILE)
        return count
    return 0


def _entry(model: BundleModel, modes: int) -> dict[str, Any]:
    spec, settings = dataset_spec(model.dataset), model.settings
    names = ("sampler", "steps", "guidance", "guidance_interval", "mode_guidance", "precision")
    return {
        "dataset": spec.name,
        "model_sha256": model_hash(model.folder),
        "num_classes": spec.num_classes,
        "image_size": spec.image_size,
        "mean": spec.mean,
        "std": spec.std,
        **{name: getattr(settings.sampling, name) for name in names},
        "modes": modes,
        "device": settings.device,
        "images_per_class": settings.images_per_class,
        "keep": settings.keep,
        "pixels": True,  # generate.py has the option --pixels
    }


def _readme(models: Sequence[BundleModel], facts: Mapping[str, ModelFacts]) -> str:
    rows = ["| dataset | images | mean | std | sampling | training steps of the model |", "|---|---|---|---|---|---|"]
    for model in models:
        spec = dataset_spec(model.dataset)
        numbers = [", ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std)]
        rows.append(
            f"| {spec.name} | {spec.num_classes} classes, {spec.image_size} x {spec.image_size} | {numbers[0]} | "
            f"{numbers[1]} | {model.settings} | {facts[model.dataset].steps:,} |"
        )
    template = string.Template((scripts()[SCRIPT].parent / "README.md").read_text(encoding="utf-8"))
    text = template.substitute(datasets="\n".join(rows), python=".".join(platform.python_version_tuple()[:2]))
    return text if "cifar100" in facts else text.replace("--dataset cifar100", f"--dataset {models[0].dataset}")


def _names(folder: Path) -> list[str]:
    """All files below the folder, as paths from there with forward slashes; what running it leaves is left out."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [path.as_posix() for path in files if "__pycache__" not in path.parts]
