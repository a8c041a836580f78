"""The generator of an entry: how fast it samples, and its training. This imports diffusers, which takes seconds."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from ddkit.challenge import DatasetSpec
from ddkit.data.store import class_names
from ddkit.entering.recipe import SetRecipe
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.config import GeneratorConfig, SamplingSettings
from ddkit.generator.model_facts import ModelFacts
from ddkit.generator.model_folder import Model
from ddkit.generator.networks import build_denoiser
from ddkit.generator.sampling import Sampler
from ddkit.generator.training.plan import plan_training, require_memory
from ddkit.generator.training.records import read_records
from ddkit.generator.training.run_folder import METRICS_FILE
from ddkit.generator.training.stages import AutoencoderStage
from ddkit.generator.training.train import TrainingData, train
from ddkit.runtime.progress import Listener

_SAMPLED, _SAMPLED_ON_CPU = 256, 16  # images


def sampling_speed(config: GeneratorConfig, spec: DatasetSpec, settings: SamplingSettings, device: torch.device) -> float:
    """Images a second of an untrained generator, which samples as fast as a trained one; mode guidance costs no time."""
    shape = config.autoencoder.latent_shape(spec.image_size)
    facts = ModelFacts(
        spec.name, class_names(spec.name), spec.image_size, config.objective.prediction, "", 0, 0, "", label_dropout=0.1
    )
    model = Model(
        build_denoiser(config.denoiser, shape, spec.num_classes, seed=0).eval(),
        build_autoencoder(config.autoencoder, spec.image_size, seed=0).eval(),
        facts,
    )
    count = _SAMPLED_ON_CPU if device.type == "cpu" else _SAMPLED
    sampler = Sampler(model, dataclasses.replace(settings, mode_guidance=0.0, batch_size=count), device)
    labels = torch.arange(count) % spec.num_classes
    for _ in range(1 if device.type == "cpu" else 2):  # before its first batch a GPU loads libraries
        began = time.monotonic()
        list(sampler.images(labels, torch.arange(count)))
        seconds = time.monotonic() - began
    return count / seconds


def train_generator(
    each: SetRecipe, seed: int, folder: Path, seconds: float | None, device: str, progress: Listener
) -> SetRecipe:
    """Train the generator of a set in `folder`, or continue its training.

    seconds: of training, None for the recipe's steps. Returns the set's recipe with the steps and the precision of the
    training that is there now.
    """
    data = TrainingData.open(each.dataset, progress=progress)
    settings = {
        "seed": seed,
        "steps": each.train_steps,
        "precision": each.train_precision or None,
        "compile": each.compile,
        "autoencoder_optimizer.steps": each.autoencoder_steps,
    }
    request = plan_training(
        data, settings, preset_name=each.preset, folder=folder, seconds=seconds, device=device, save_every_seconds=60
    )
    require_memory(data, request)
    model = train(data, request, progress=progress)
    steps = [r["step"] for r in read_records(folder / METRICS_FILE) if r["stage"] == AutoencoderStage.name]
    return dataclasses.replace(
        each,
        train_steps=model.facts.steps,
        autoencoder_steps=max(steps, default=None),
        train_precision=request.config.precision,
    )
