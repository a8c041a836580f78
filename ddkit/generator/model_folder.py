"""The model folder: written and read in diffusers' format, with a JSON of ddkit's own facts.

    model_index.json  vae/  transformer/  scheduler/  ddkit.json

Each part takes its place by one rename, ddkit.json last, so that a kill leaves a folder that loads. The parts load with
diffusers as well: `AutoencoderKL.from_pretrained(folder, subfolder="vae")`, `UViT.from_pretrained(folder,
subfolder="transformer")`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddkit.errors import BadFileError, MissingModelError, UsageError
from ddkit.generator.model_facts import DENOISER_PART, FACTS_FILE, INDEX_FILE, WEIGHTS_FILE, ModelFacts, read_facts
from ddkit.generator.networks import null_class
from ddkit.generator.samplers import make_scheduler
from ddkit.generator.uvit import UViT
from ddkit.runtime.files import atomic_folder, read_json, write_json

_DENOISERS: Mapping[str, type[ModelMixin]] = {kind.__name__: kind for kind in (UViT, DiTTransformer2DModel)}


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
        """The model on the device, to which its networks themselves are moved."""
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
            f"Give a model of '{dataset}' with --model, or name '{facts.dataset}' as the dataset.",
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


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Read an autoencoder's folder onto the CPU. Raises what `load_model` raises."""
    return _load_part(folder, {"AutoencoderKL": AutoencoderKL})


def _save_part(part: Any, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        try:
            part.save_pretrained(temporary)
        except SafetensorError as error:  # such as a full disk
            raise BadFileError(f"{folder} cannot be written: {error}.", "Free some space, or choose another folder.") from error


def _load_part(folder: Path, kinds: Mapping[str, type[ModelMixin]]) -> ModelMixin:
    """Build a part from its config.json and load its weights, every key of which must fit."""
    config_path, weights_path = folder / "config.json", folder / WEIGHTS_FILE
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
