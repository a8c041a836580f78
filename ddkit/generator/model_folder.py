"""The model folder: written and read in diffusers' format, with a JSON of ddkit's own facts.

    model_index.json  vae/  transformer/  scheduler/  ddkit.json

Each part takes its place by one rename, ddkit.json last, so that a kill leaves a folder that loads. The parts load with
diffusers as well: `AutoencoderKL.from_pretrained(folder, subfolder="vae")`, `UViT.from_pretrained(folder,
subfolder="transformer")`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddkit import __version__
from ddkit.errors import BadFileError, MissingModelError, UsageError
from ddkit.generator.networks import null_class
from ddkit.generator.samplers import make_scheduler
from ddkit.generator.uvit import UViT
from ddkit.runtime.files import atomic_folder, read_json, sha256_of, write_json
from ddkit.runtime.hub import download, is_hub_id
from ddkit.runtime.records import read_record

FACTS_FILE = "ddkit.json"
INDEX_FILE = "model_index.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
FORMAT_VERSION = 1

DENOISER_PART = "transformer"
PARTS = ("vae", DENOISER_PART, "scheduler")

_DENOISERS: Mapping[str, type[ModelMixin]] = {kind.__name__: kind for kind in (UViT, DiTTransformer2DModel)}


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model, as ddkit.json holds them.

    prediction: what the denoiser predicts, as in ObjectiveConfig. steps: steps of denoiser training.
    dataset_sha256: hash of the prepared training split. metrics: scores of the model by name.
    label_dropout: as in ObjectiveConfig; None when an earlier version wrote the file.
    """

    dataset: str
    class_names: tuple[str, ...]
    image_size: int
    prediction: str
    preset: str
    steps: int
    images_seen: int
    dataset_sha256: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    label_dropout: float | None = None
    ddkit_version: str = __version__
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class Model:
    """A trained generator in memory."""

    denoiser: ModelMixin
    autoencoder: AutoencoderKL
    facts: ModelFacts

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, s, s)."""
        return (self.denoiser.config.in_channels, self.denoiser.config.sample_size, self.denoiser.config.sample_size)

    def to(self, device: torch.device | str) -> Model:
        """The same model, moved to that device."""
        return dataclasses.replace(self, denoiser=self.denoiser.to(device), autoencoder=self.autoencoder.to(device))


def save_autoencoder(autoencoder: AutoencoderKL, folder: Path) -> None:
    """Write `<folder>/vae`."""
    _save_part(autoencoder, folder / "vae")


def save_model(model: Model, folder: Path) -> None:
    """Write or replace all of a model folder. Nothing else in it is touched. Raises BadFileError."""
    scheduler = make_scheduler("ddim", model.facts.prediction)
    save_autoencoder(model.autoencoder, folder)
    _save_part(scheduler, folder / "scheduler")
    _save_part(model.denoiser, folder / DENOISER_PART)
    kind = type(model.denoiser)
    index = {
        "_class_name": "DiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "image_size": model.facts.image_size,
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        # diffusers imports what is not its own from the module named here.
        DENOISER_PART: [kind.__module__ if kind is UViT else "diffusers", kind.__name__],
    }
    write_json(folder / INDEX_FILE, index)
    write_json(folder / FACTS_FILE, dataclasses.asdict(model.facts))


def load_model(folder: Path, *, dataset: str | None = None) -> Model:
    """Read a model folder onto the CPU.

    dataset: the dataset that the model must have been trained on. Raises MissingModelError when a file is missing,
    BadFileError when one is damaged or does not fit the others, UsageError when the model is for another dataset.
    """
    facts = read_facts(folder, dataset=dataset)
    if dataset is not None and facts.dataset != dataset:
        raise UsageError(
            f"The model in {folder} was trained on '{facts.dataset}', not on '{dataset}'.",
            f"Give a model of '{dataset}' with --model, or ask for --dataset {facts.dataset}.",
        )
    denoiser = _load_part(folder / DENOISER_PART, _DENOISERS)
    autoencoder = load_autoencoder(folder / "vae")
    # Parts that are each whole can still belong to different models.
    remedy = "Put the model's own part back, or train it again."
    part, known = folder / DENOISER_PART, len(facts.class_names)
    if (classes := null_class(denoiser)) != known:
        raise BadFileError(f"{part} knows {classes} classes, but {FACTS_FILE} lists {known}.", remedy)
    if (channels := denoiser.config.in_channels) != (decoded := autoencoder.config.latent_channels):
        raise BadFileError(f"{part} makes latents of {channels} channels, but the autoencoder decodes {decoded}.", remedy)
    return Model(denoiser.eval(), autoencoder.eval(), facts)


def find_model(source: str | os.PathLike[str]) -> Path:
    """The folder of a model: `source` itself, or where the hub's generator of that id is downloaded to.

    Raises MissingModelError when it cannot be downloaded or the hub holds something else under that id.
    """
    folder, hub_id = Path(source).expanduser(), os.fspath(source)
    if folder.is_dir() or not is_hub_id(hub_id):
        return folder
    # The facts come first: nobody should wait for the weights of something else.
    if not has_model(download(hub_id, "model", [FACTS_FILE])):
        raise MissingModelError(
            f"'{hub_id}' on the hub is not a generator of ddkit: it has no {FACTS_FILE}.",
            f"Give the id of one that `ddkit push` uploaded, or start from another: ddkit train --init {hub_id}",
        )
    parts = [f"{part}/*.{ending}" for part in PARTS for ending in ("json", "safetensors")]
    return download(hub_id, "model", [FACTS_FILE, INDEX_FILE, *parts])


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Read an autoencoder's folder onto the CPU. Raises what `load_model` raises."""
    return _load_part(folder, {"AutoencoderKL": AutoencoderKL})


def has_model(folder: Path) -> bool:
    """Return whether a folder holds a complete model: ddkit.json is written last."""
    return (folder / FACTS_FILE).is_file()


def read_facts(folder: Path, *, dataset: str | None = None) -> ModelFacts:
    """Read a model folder's ddkit.json. dataset: its name, if known, for the advice in an error.

    Raises MissingModelError when there is none, BadFileError when it is not ours.
    """
    path = folder / FACTS_FILE
    if not path.is_file():
        reason = f"{FACTS_FILE} is missing" if folder.is_dir() else "there is no such folder"
        raise MissingModelError(
            f"{folder} does not hold a complete model: {reason}.",
            f"Train one, or continue its training: ddkit train --dataset {dataset or 'NAME'}",
        )
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT_VERSION:
        raise BadFileError(f"{path} was not written by this version of ddkit.", "Train the model again.")
    try:
        return read_record(ModelFacts, value)
    except BadFileError as error:
        raise BadFileError(f"{path} is not complete: {error}.", "Train the model again.") from error


def model_hash(folder: Path) -> str:
    """Hexadecimal SHA-256 over the hashes of both networks' weights, which identifies this model."""
    parts = [folder / part / WEIGHTS_FILE for part in ("vae", DENOISER_PART)]
    return hashlib.sha256("".join(sha256_of(path) for path in parts if path.is_file()).encode()).hexdigest()


def _save_part(part: Any, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        try:
            part.save_pretrained(temporary)
        except SafetensorError as error:  # such as a full disk
            raise BadFileError(f"{folder} cannot be written: {error}.", "Free some space, or choose another folder.") from error


def _load_part(folder: Path, kinds: Mapping[str, type[ModelMixin]]) -> ModelMixin:
    """Build a part from its config.json and load its weights, every key of which must fit."""
    config_path, weights_path = folder / "config.json", folder / WEIGHTS_FILE
    if (folder.parent / "unet").is_dir() and not folder.exists():
        raise BadFileError(
            f"{folder.parent} holds a U-Net, which this version of ddkit does not read.",
            "Train the model again; the architecture uvit is faster and better.",
        )
    for path in (config_path, weights_path):
        if not path.is_file():
            raise MissingModelError(f"{path} is missing.", "Train the model again, or give another folder.")
    config = read_json(config_path)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in kinds:
        raise BadFileError(
            f"{config_path} describes a {name}, but ddkit reads {' or '.join(kinds)}.", "Give a model that ddkit trained."
        )
    try:
        network = kinds[name].from_config(config)
        network.load_state_dict(load_file(weights_path))
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadFileError(f"{weights_path} does not fit its config.json: {reason}", "The folder is damaged.") from error
    return network
