"""Training images per second: a plain diffusers training loop and ddkit's trainer, with the same model and batch.

    python tools/bench_training.py [--preset NAME] [--image-size N] [--classes N] [--batch-size N] [--steps N]
        [--turns N] [--images N] [--workers N] [--precision NAME] [--no-compile] [--cpu-time] [--device NAME]

The plain loop follows diffusers' own examples: images from a DataLoader whose workers flip and normalize them one by
one, an autoencoder that encodes every batch, diffusers' scheduler for the noise, mean squared error, accelerate, clipped
gradients, AdamW and diffusers' EMAModel. Both train the same denoiser of the same latents in turn, after a turn each to
warm up and to compile; the median turn of each counts. --cpu-time measures CPU seconds, which other work on the machine
does not stretch.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ddkit.data.store import ImageSet
from ddkit.generator.autoencoder import build_autoencoder, encode, to_signed
from ddkit.generator.config import PRECISIONS, GeneratorConfig, ObjectiveConfig
from ddkit.generator.networks import build_denoiser, null_class, predict
from ddkit.generator.objective import BETA_SCHEDULES
from ddkit.generator.presets import preset
from ddkit.generator.training.latents import cached_latents
from ddkit.generator.training.stages import DenoiserStage
from ddkit.generator.training.trainer import Trainer
from ddkit.runtime.device import describe_device, resolve_device

_ACCELERATE = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class FlippedImages(Dataset):
    """One image at a time, as a data set for PyTorch has it: (3, S, S) in [-1, 1], mirrored half of the time."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = to_signed(self._images.images[index])
        return pixels.flip(-1) if torch.rand(()) < 0.5 else pixels, self._images.labels[index]


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch after batch, epoch after epoch."""
    while True:
        yield from loader


class PlainLoop:
    """Training as diffusers' examples write it. Call it with a number of steps."""

    def __init__(self, config: GeneratorConfig, images: ImageSet, device: torch.device, workers: int) -> None:
        self.optimizer_config = config.denoiser_optimizer
        self.accelerator = Accelerator(mixed_precision=_ACCELERATE[config.precision], cpu=device.type == "cpu")
        self.autoencoder = build_autoencoder(config.autoencoder, images.images.shape[-1], seed=0).to(device).eval()
        self.dropout = config.objective.label_dropout
        network = build(config, images)
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.optimizer_config.learning_rate, weight_decay=0.0)
        loader = DataLoader(
            FlippedImages(images), self.optimizer_config.batch_size, shuffle=True, drop_last=True,
            num_workers=workers, persistent_workers=workers > 0,
        )  # fmt: skip
        self.network, self.optimizer, loader = self.accelerator.prepare(network, optimizer, loader)
        self.null_class = null_class(network)
        self.side = config.autoencoder.latent_shape(images.images.shape[-1])[1]
        self.scheduler = DDPMScheduler(beta_schedule=BETA_SCHEDULES["epsilon"])
        self.average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
        self.batches = endless(loader)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._step(*next(self.batches))

    def _step(self, pixels: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            clean = encode(self.autoencoder, pixels, self.side)
        noise = torch.randn_like(clean)
        times = torch.randint(0, len(self.scheduler.betas), (len(clean),), device=clean.device)
        noisy = self.scheduler.add_noise(clean, noise, times)
        dropped = torch.rand(len(labels), device=labels.device) < self.dropout
        with self.accelerator.autocast():
            output = predict(self.network, noisy, times, torch.where(dropped, self.null_class, labels))
        self.accelerator.backward(F.mse_loss(output.float(), noise))
        self.accelerator.clip_grad_norm_(self.network.parameters(), self.optimizer_config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.network.parameters())


class OurTrainer:
    """Training as `ddkit train` does. Call it with a number of steps."""

    def __init__(self, config: GeneratorConfig, images: ImageSet, device: torch.device, folder: Path) -> None:
        autoencoder = build_autoencoder(config.autoencoder, images.images.shape[-1], seed=0).to(device).eval()
        side = config.autoencoder.latent_shape(images.images.shape[-1])[1]
        latents = cached_latents(
            folder / "latents.safetensors", autoencoder, images, side, flips=config.flips, identity="bench"
        )
        accelerator = Accelerator(mixed_precision=_ACCELERATE[config.precision], cpu=device.type == "cpu")
        self.trainer = Trainer(
            DenoiserStage(config, build(config, images), latents), accelerator, folder, steps=10**6,
            compile_after=0 if config.compile else None,
        )  # fmt: skip
        # A turn ends like a training, which would write a checkpoint; they come every few minutes.
        self.trainer.save = lambda: None

    def __call__(self, steps: int) -> None:
        self.trainer.steps = self.trainer.step + steps
        self.trainer.run()


def build(config: GeneratorConfig, images: ImageSet) -> ModelMixin:
    """The denoiser that both train."""
    shape = config.autoencoder.latent_shape(images.images.shape[-1])
    return build_denoiser(config.denoiser, shape, len(images.class_names), seed=0)


def random_images(count: int, size: int, classes: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % classes, tuple(map(str, range(classes))))


def computed_seconds() -> float:
    """CPU time of this process and of those it started, so far."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def measure(train: Callable[[int], None], steps: int, clock: Callable[[], float], device: torch.device) -> float:
    """Seconds of so many steps."""
    began = clock()
    train(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, help="the preset's")
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="of random pixels, which change no speed")
    parser.add_argument("--workers", type=int, default=2, help="processes of the plain loop's DataLoader")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def configure(options: argparse.Namespace) -> GeneratorConfig:
    """The preset with the options' batch, predicting noise as diffusers' examples do, every noise level alike."""
    config = preset(options.preset).config(options.image_size)
    size = options.batch_size or config.denoiser_optimizer.batch_size
    return dataclasses.replace(
        config,
        denoiser_optimizer=dataclasses.replace(config.denoiser_optimizer, batch_size=size),
        objective=ObjectiveConfig("epsilon", min_snr_gamma=None),
        precision=options.precision,
        compile=not options.no_compile,
    )


def main() -> None:
    options = parse()
    device, config = resolve_device(options.device), configure(options)
    images = random_images(options.images, options.image_size, options.classes)
    clock = computed_seconds if options.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "diffusers": PlainLoop(config, images, device, options.workers),
            "ddkit": OurTrainer(config, images, device, Path(folder)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.turns + 1):
            for name, train in ways.items():
                taken = measure(train, options.steps, clock, device)
                if turn > 0:
                    seconds[name].append(taken)
    batch = config.denoiser_optimizer.batch_size
    speeds = {name: options.steps * batch / statistics.median(taken) for name, taken in seconds.items()}
    unit = ", per second of a core" if options.cpu_time else ""
    print(f"{describe_device(device)}; preset {options.preset}, {options.image_size} px, batches of {batch}, "
          f"{config.precision}, torch {torch.__version__}{unit}")  # fmt: skip
    for name, speed in speeds.items():
        print(f"{name:>10}: {speed:10.1f} images/s")
    print(f"{'ratio':>10}: {speeds['ddkit'] / speeds['diffusers']:10.2f}")


if __name__ == "__main__":
    main()
