"""Training a generator: the autoencoder, the latents, the denoiser, the model folder; each once, each resumable."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL

from ddkit import __version__
from ddkit.data.store import ImageSet
from ddkit.errors import MissingModel, UsageError
from ddkit.files import read_json, sha256_of, write_json
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.engine import Engine, Limits, StepRecord, as_json_line
from ddkit.generator.latents import LatentSet, cached_latents
from ddkit.generator.networks import build_denoiser
from ddkit.generator.pipeline import WEIGHTS_FILE, Model, ModelFacts, load_autoencoder, save_autoencoder, save_model
from ddkit.generator.presets import GeneratorConfig, differences, from_json, to_json
from ddkit.generator.seeds import derived_seed
from ddkit.generator.stages import AutoencoderStage, DenoiserStage
from ddkit.progress import Listener, ignore

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
AUTOENCODER_SHARE = 0.15  # of a training time given in seconds


@dataclass(frozen=True)
class TrainingData:
    """What is trained on. name: of the dataset. sha256: of its prepared training split."""

    name: str
    images: ImageSet
    sha256: str

    @property
    def image_size(self) -> int:
        return self.images.images.shape[-1]


@dataclass(frozen=True)
class TrainingRequest:
    """How to train: the configuration and the limits of this call, which may grow from call to call.

    preset: the name the configuration came from, for the records.
    seconds: of training in all, both stages; the autoencoder takes up to AUTOENCODER_SHARE of it. None: the
    configuration's steps.
    """

    config: GeneratorConfig
    preset: str = ""
    seconds: float | None = None
    device: torch.device = torch.device("cpu")
    save_every_seconds: float = 300.0


def train(data: TrainingData, request: TrainingRequest, folder: Path, *, progress: Listener = ignore) -> Model:
    """Train a generator in `folder`, going on from what is there; returns the model, which is also written there.

    Raises UsageError where the folder holds a training with other settings (each is listed), Interrupted and
    ComputeError as `Engine.run` does.
    """
    _claim(folder, data, request)
    with _accelerator(request) as accelerator:
        run = _Run(data, request, folder, accelerator, progress)
        autoencoder = run.autoencoder()
        latents = run.latents(autoencoder)
        return run.denoiser(autoencoder, latents)


class _Run:
    """One call of `train`: what its steps share."""

    def __init__(
        self, data: TrainingData, request: TrainingRequest, folder: Path, accelerator: Accelerator, progress: Listener
    ) -> None:
        self.data, self.request, self.config = data, request, request.config
        self.folder, self.accelerator, self.progress = folder, accelerator, progress
        self.latent_shape = self.config.autoencoder.latent_shape(data.image_size)

    def autoencoder(self) -> AutoencoderKL:
        """The trained autoencoder, from the folder where it is finished."""
        if (self.folder / "vae" / WEIGHTS_FILE).is_file():
            return load_autoencoder(self.folder / "vae").to(self.accelerator.device)
        seed = derived_seed("autoencoder", self.config.seed)
        network = build_autoencoder(self.config.autoencoder, self.data.image_size, seed=seed)
        stage = AutoencoderStage(self.config, network, self.data.images)
        share = None if self.request.seconds is None else AUTOENCODER_SHARE * self.request.seconds
        engine = self._engine(stage, Limits(stage.optimiser.steps, share, self.request.save_every_seconds))
        engine.run()
        with engine.ema_weights() as trained:
            if self.accelerator.is_main_process:
                save_autoencoder(trained, self.folder)
        self.accelerator.wait_for_everyone()
        return load_autoencoder(self.folder / "vae").to(self.accelerator.device)

    def latents(self, autoencoder: AutoencoderKL) -> LatentSet:
        """The training set's latents; the autoencoder's latent scale is set from them."""
        identity = f"{self.data.sha256} {sha256_of(self.folder / 'vae' / WEIGHTS_FILE)} flips={self.config.flips}"
        with self.accelerator.main_process_first():
            latents = cached_latents(
                self.folder / CHECKPOINTS / "latents.safetensors",
                autoencoder.eval(),
                self.data.images,
                flips=self.config.flips,
                identity=identity,
                progress=self.progress,
            )
        autoencoder.register_to_config(scaling_factor=1 / latents.std)
        return latents

    def denoiser(self, autoencoder: AutoencoderKL, latents: LatentSet) -> Model:
        """Train the denoiser; the model folder is written whenever a checkpoint is."""
        seed = derived_seed("denoiser", self.config.seed)
        classes = len(self.data.images.class_names)
        network = build_denoiser(self.config.denoiser, self.latent_shape, classes, seed=seed)
        stage = DenoiserStage(self.config, network, latents)
        steps = stage.optimiser.steps if self.request.seconds is None else _NO_LIMIT
        rest = None if self.request.seconds is None else (1 - AUTOENCODER_SHARE) * self.request.seconds

        def save(engine: Engine) -> None:
            with engine.ema_weights() as averaged:
                save_model(Model(averaged, autoencoder, self._facts(engine)), self.folder)

        engine = self._engine(stage, Limits(steps, rest, self.request.save_every_seconds), save)
        engine.run()
        averaged = build_denoiser(self.config.denoiser, self.latent_shape, classes, seed=seed)
        with engine.ema_weights() as trained:
            averaged.load_state_dict(trained.state_dict())
        return Model(averaged.to(self.accelerator.device).eval(), autoencoder, self._facts(engine))

    def _engine(self, stage, limits: Limits, on_save=lambda engine: None) -> Engine:
        return Engine(
            stage,
            self.accelerator,
            self.folder / CHECKPOINTS,
            limits,
            compile_network=self.config.compile,
            progress=self.progress,
            on_record=self._record,
            on_save=on_save,
        )

    def _record(self, record: StepRecord) -> None:
        with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(as_json_line(record))

    def _facts(self, engine: Engine) -> ModelFacts:
        return ModelFacts(
            dataset=self.data.name,
            class_names=self.data.images.class_names,
            image_size=self.data.image_size,
            prediction=self.config.objective.prediction,
            preset=self.request.preset,
            steps=engine.step,
            images_seen=engine.step * self.config.denoiser_optimiser.batch_size,
            dataset_sha256=self.data.sha256,
        )


_NO_LIMIT = 10**9  # steps


def read_config(folder: Path) -> GeneratorConfig | None:
    """The configuration a run folder was begun with, or None where none was."""
    path = folder / CONFIG_FILE
    return from_json(read_json(path)["config"]) if path.is_file() else None


def _claim(folder: Path, data: TrainingData, request: TrainingRequest) -> None:
    """Record the settings in a new run folder; refuse one begun with others."""
    begun = read_config(folder)
    if begun is None:
        write_json(folder / CONFIG_FILE, {
            "ddkit_version": __version__, "dataset": data.name, "preset": request.preset,
            "config": to_json(request.config),
        })  # fmt: skip
        return
    if lines := differences(without_limits(request.config), without_limits(begun)):
        raise UsageError(
            f"{folder} holds a training with other settings: {'; '.join(lines)}.",
            "Give the same settings, start over with --fresh, or choose another folder with --out.",
        )


def without_limits(config: GeneratorConfig) -> GeneratorConfig:
    """The configuration with what may differ when a training goes on, its lengths and compilation, set equal."""
    return replace(
        config,
        autoencoder_optimiser=replace(config.autoencoder_optimiser, steps=1),
        denoiser_optimiser=replace(config.denoiser_optimiser, steps=1),
        compile=False,
    )


@contextmanager
def _accelerator(request: TrainingRequest) -> Iterator[Accelerator]:
    """accelerate's view of the processes and devices of this training, forgotten afterwards."""
    if request.device.type == "cuda" and request.device.index is not None:
        torch.cuda.set_device(request.device)
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[request.config.precision]
    try:
        yield Accelerator(mixed_precision=precision, cpu=request.device.type == "cpu")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
