"""The model folder: written and read in diffusers' format, with what ddkit must know of it beside.

    model_index.json  vae/  transformer/ or unet/  scheduler/  ddkit.json

Each part takes its place by one rename, ddkit.json last, so that a kill leaves a folder that loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddkit import __version__
from ddkit.errors import BadFile, MissingModel, UsageError
from ddkit.files import read_json, replacing_folder, sha256_of, write_json
from ddkit.generator.denoiser import UViT
from ddkit.generator.objective import BETA_SCHEDULES, TIME_SCALE

FACTS_FILE = "ddkit.json"
INDEX_FILE = "model_index.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
FORMAT_VERSION = 1

_DENOISERS: Mapping[str, type[ModelMixin]] = {
    kind.__name__: kind for kind in (UViT, UNet2DModel, DiTTransformer2DModel)
}


@dataclass(frozen=True)
class ModelFacts:
    """What ddkit.json says of a model.

    prediction: of the objective it was trained with. steps: of denoiser training. metrics: measured on it, by name.
    dataset_sha256: of the prepared training split.
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
    ddkit_version: str = __version__
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class Model:
    """A trained generator in memory: everything that sampling needs."""

    denoiser: ModelMixin
    autoencoder: AutoencoderKL
    facts: ModelFacts

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, s, s)."""
        return (self.denoiser.config.in_channels, self.denoiser.config.sample_size, self.denoiser.config.sample_size)

    def to(self, device: torch.device | str) -> Model:
        """The same model, moved there."""
        return dataclasses.replace(self, denoiser=self.denoiser.to(device), autoencoder=self.autoencoder.to(device))


def base_scheduler(prediction: str) -> SchedulerMixin:
    """The scheduler a model folder names; other samplers are made from its config."""
    if prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIME_SCALE)
    return DDIMScheduler(
        num_train_timesteps=TIME_SCALE,
        beta_schedule=BETA_SCHEDULES[prediction],
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def save_autoencoder(autoencoder: AutoencoderKL, folder: Path) -> None:
    """Write `<folder>/vae`."""
    _save_part(autoencoder, folder / "vae")


def save_model(model: Model, folder: Path) -> None:
    """Write or replace all of a model folder. Nothing else in it is touched. Raises BadFile."""
    part = denoiser_part(model.denoiser)
    scheduler = base_scheduler(model.facts.prediction)
    save_autoencoder(model.autoencoder, folder)
    _save_part(scheduler, folder / "scheduler")
    _save_part(model.denoiser, folder / part)
    index = {
        "_class_name": "LatentClassPipeline",
        "_diffusers_version": model.denoiser.config.get("_diffusers_version", ""),
        part: [type(model.denoiser).__module__ if isinstance(model.denoiser, UViT) else "diffusers",
               type(model.denoiser).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    write_json(folder / INDEX_FILE, index)
    write_json(folder / FACTS_FILE, dataclasses.asdict(model.facts))


def load_model(folder: Path, *, dataset: str | None = None) -> Model:
    """Read a model folder onto the CPU.

    dataset: the one it must be of. Raises MissingModel where a file is missing, BadFile where one is damaged or
    does not fit, UsageError where the model is of another dataset.
    """
    facts = read_facts(folder)
    if dataset is not None and facts.dataset != dataset:
        raise UsageError(
            f"The model in {folder} is of '{facts.dataset}', not of '{dataset}'.",
            f"Give a model of '{dataset}' with --model, or ask for --dataset {facts.dataset}.",
        )
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    denoiser = _load_part(folder / part, _DENOISERS)
    autoencoder = load_autoencoder(folder / "vae")
    return Model(denoiser.eval(), autoencoder.eval(), facts)


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Read an autoencoder's folder onto the CPU. Raises what `load_model` raises."""
    return _load_part(folder, {"AutoencoderKL": AutoencoderKL})


def read_facts(folder: Path) -> ModelFacts:
    """What a model folder's ddkit.json says. Raises MissingModel where there is none, BadFile where it is foreign."""
    path = folder / FACTS_FILE
    if not path.is_file():
        raise MissingModel(f"{folder} is no model folder of ddkit: it has no {FACTS_FILE}.", "Make one: ddkit train")
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT_VERSION:
        raise BadFile(f"{path} is not of this version of ddkit.", "Train the model again.")
    try:
        return ModelFacts(**{**value, "class_names": tuple(value["class_names"])})
    except (TypeError, KeyError) as error:
        raise BadFile(f"{path} is not complete: {error}.", "Train the model again.") from error


def model_hash(folder: Path) -> str:
    """Hexadecimal SHA-256 over the hashes of both parts' weights: names exactly this model."""
    import hashlib

    parts = [folder / part / WEIGHTS_FILE for part in ("vae", "transformer", "unet")]
    return hashlib.sha256("".join(sha256_of(path) for path in parts if path.is_file()).encode()).hexdigest()


def denoiser_part(denoiser: ModelMixin) -> str:
    """The folder diffusers keeps such a network in."""
    return "unet" if isinstance(denoiser, UNet2DModel) else "transformer"


def _save_part(part: Any, folder: Path) -> None:
    with replacing_folder(folder) as temporary:
        part.save_pretrained(temporary)


def _load_part(folder: Path, kinds: Mapping[str, type[ModelMixin]]) -> ModelMixin:
    """Build a part from its config.json and load its weights, every key of which must fit."""
    config_path, weights_path = folder / "config.json", folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise MissingModel(f"{path} is missing.", "Train the model again, or give another folder.")
    config = read_json(config_path)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in kinds:
        raise BadFile(f"{config_path} describes a {name}, not one of {', '.join(kinds)}.", "Give a model of ddkit's.")
    try:
        network = kinds[name].from_config(config)
        network.load_state_dict(load_file(weights_path))
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadFile(f"{weights_path} does not fit its config.json: {reason}", "The folder is damaged.") from error
    return network
