"""The model folder: written and read in diffusers' format, with what ddkit must know of it beside.

    model_index.json  vae/  transformer/ or unet/  scheduler/  ddkit.json

Each part takes its place by one rename, ddkit.json last, so that a kill leaves a folder that loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddkit import __version__
from ddkit.errors import BadFileError, MissingModelError, UsageError
from ddkit.generator.autoencoder import decode, pixels_per_latent
from ddkit.generator.networks import null_class, predict
from ddkit.generator.samplers import make_scheduler, set_steps
from ddkit.generator.uvit import UViT
from ddkit.runtime.files import atomic_folder, read_json, sha256_of, write_json

FACTS_FILE = "ddkit.json"
INDEX_FILE = "model_index.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
FORMAT_VERSION = 1

_DENOISERS: Mapping[str, type[ModelMixin]] = {kind.__name__: kind for kind in (UViT, UNet2DModel, DiTTransformer2DModel)}


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


def save_autoencoder(autoencoder: AutoencoderKL, folder: Path) -> None:
    """Write `<folder>/vae`."""
    _save_part(autoencoder, folder / "vae")


def save_model(model: Model, folder: Path) -> None:
    """Write or replace all of a model folder. Nothing else in it is touched. Raises BadFileError."""
    part = denoiser_part(model.denoiser)
    scheduler = make_scheduler("ddim", model.facts.prediction)
    save_autoencoder(model.autoencoder, folder)
    _save_part(scheduler, folder / "scheduler")
    _save_part(model.denoiser, folder / part)
    kind = type(model.denoiser)
    index = {
        "_class_name": LatentClassPipeline.__name__,
        "_diffusers_version": diffusers.__version__,
        "image_size": model.facts.image_size,
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        # diffusers imports what is not its own from the module named here.
        part: [kind.__module__ if kind is UViT else "diffusers", kind.__name__],
    }
    write_json(folder / INDEX_FILE, index)
    write_json(folder / FACTS_FILE, dataclasses.asdict(model.facts))


def load_model(folder: Path, *, dataset: str | None = None) -> Model:
    """Read a model folder onto the CPU.

    dataset: the one it must be of. Raises MissingModelError where a file is missing, BadFileError where one is damaged or
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
    _refuse_strangers(folder, part, denoiser, autoencoder, facts)
    return Model(denoiser.eval(), autoencoder.eval(), facts)


def _refuse_strangers(folder: Path, part: str, denoiser: ModelMixin, autoencoder: AutoencoderKL, facts: ModelFacts) -> None:
    """Raise BadFileError where parts, each whole, are of different models."""
    remedy = "Put the model's own part back, or train it again."
    if (classes := null_class(denoiser)) != len(facts.class_names):
        raise BadFileError(f"{folder / part} knows {classes} classes, {FACTS_FILE} beside it {len(facts.class_names)}.", remedy)
    if (channels := denoiser.config.in_channels) != autoencoder.config.latent_channels:
        raise BadFileError(
            f"{folder / part} makes latents of {channels} channels; the autoencoder beside it decodes "
            f"{autoencoder.config.latent_channels}.",
            remedy,
        )


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Read an autoencoder's folder onto the CPU. Raises what `load_model` raises."""
    return _load_part(folder, {"AutoencoderKL": AutoencoderKL})


def has_model(folder: Path) -> bool:
    """Whether a folder holds a whole model of ours: ddkit.json is written last."""
    return (folder / FACTS_FILE).is_file()


def read_facts(folder: Path) -> ModelFacts:
    """What a model folder's ddkit.json says. Raises MissingModelError where there is none, BadFileError where it is foreign."""
    path = folder / FACTS_FILE
    if not path.is_file():
        raise MissingModelError(
            f"{folder} holds no whole model of ddkit's: it has no {FACTS_FILE}.",
            "Train one, or go on with its training: ddkit train --dataset NAME",
        )
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT_VERSION:
        raise BadFileError(f"{path} is not of this version of ddkit.", "Train the model again.")
    try:
        return ModelFacts(**{**value, "class_names": tuple(value["class_names"])})
    except (TypeError, KeyError) as error:
        raise BadFileError(f"{path} is not complete: {error}.", "Train the model again.") from error


def model_hash(folder: Path) -> str:
    """Hexadecimal SHA-256 over the hashes of both parts' weights: names exactly this model."""
    import hashlib

    parts = [folder / part / WEIGHTS_FILE for part in ("vae", "transformer", "unet")]
    return hashlib.sha256("".join(sha256_of(path) for path in parts if path.is_file()).encode()).hexdigest()


def denoiser_part(denoiser: ModelMixin) -> str:
    """The folder diffusers keeps such a network in."""
    return "unet" if isinstance(denoiser, UNet2DModel) else "transformer"


def _save_part(part: Any, folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        try:
            part.save_pretrained(temporary)
        except SafetensorError as error:  # of a full disk, for one
            raise BadFileError(
                f"{folder} cannot be written: {error}.", "Free some space there, or choose another place."
            ) from error


def _load_part(folder: Path, kinds: Mapping[str, type[ModelMixin]]) -> ModelMixin:
    """Build a part from its config.json and load its weights, every key of which must fit."""
    config_path, weights_path = folder / "config.json", folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise MissingModelError(f"{path} is missing.", "Train the model again, or give another folder.")
    config = read_json(config_path)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in kinds:
        raise BadFileError(f"{config_path} describes a {name}, not one of {', '.join(kinds)}.", "Give a model of ddkit's.")
    try:
        network = kinds[name].from_config(config)
        network.load_state_dict(load_file(weights_path))
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadFileError(f"{weights_path} does not fit its config.json: {reason}", "The folder is damaged.") from error
    return network


class LatentClassPipeline(DiffusionPipeline):
    """A model folder as a diffusers pipeline: images of classes by diffusers' own plain loop.

    LatentClassPipeline.from_pretrained("runs/cifar100")(class_labels=[0, 0, 1]).images
    image_size: of the images that come out; None for what the autoencoder makes.
    For speed, and for images that do not depend on the batch, use `ddkit.generator.sampling`.
    """

    _optional_components: ClassVar[list[str]] = ["transformer", "unet"]  # one of them is there

    def __init__(
        self,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        transformer: ModelMixin | None = None,
        unet: UNet2DModel | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler, transformer=transformer, unet=unet)
        self.register_to_config(image_size=image_size)

    @property
    def denoiser(self) -> ModelMixin:
        """The network that removes noise."""
        return self.transformer if self.unet is None else self.unet

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One image for each label.

        guidance_scale: 1 is none. latents: noise of one's own, (N, C, s, s); drawn by `generator` where None.
        output_type: "pil", "np" or "pt", which is (N, 3, S, S) in [0, 1].
        """
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        if latents is None:
            config = self.denoiser.config
            shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(shape, generator=generator, device=labels.device, dtype=self.denoiser.dtype)
        both = torch.cat([labels, torch.full_like(labels, null_class(self.denoiser))])
        set_steps(self.scheduler, num_inference_steps)
        for time in self.progress_bar(self.scheduler.timesteps):
            times = time.to(labels.device).expand(len(both))
            with_class, without = predict(self.denoiser, torch.cat([latents, latents]), times, both).chunk(2)
            output = without + guidance_scale * (with_class - without)
            latents = self.scheduler.step(output, time, latents, return_dict=False)[0]
        image_size = self.config.image_size or latents.shape[-1] * pixels_per_latent(self.vae)
        images = decode(self.vae, latents / self.vae.config.scaling_factor, image_size)
        images = (images / 2 + 0.5).clamp(0, 1)
        return ImagePipelineOutput(_as_output(images, output_type))


def _as_output(images: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).float().cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array
