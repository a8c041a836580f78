"""Images per second: diffusers' plain loop and ddkit's sampling, with the same model, steps, guidance and batch.

    python tools/bench_sampling.py [--model FOLDER | --preset NAME --image-size N --classes N]
        [--steps N] [--guidance W] [--sampler NAME] [--batch-size N] [--batches N] [--precision NAME] [--no-compile]
        [--cpu-time] [--device NAME]

Without --model the weights are random, because speed does not depend on them. All make the same images from the same
noise in turn, after a batch each to warm up; the median batch of each counts. With --precision bfloat16 diffusers' loop
runs in both precisions, and the ratio is to the faster one. The largest difference of a pixel to its images in float32
is printed as well, in steps of 1/255. --cpu-time measures CPU seconds, which other work on the machine does not stretch;
waiting threads count, so give it one (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ddkit.data.images import to_uint8
from ddkit.generator.autoencoder import build_autoencoder, decode
from ddkit.generator.config import SAMPLERS
from ddkit.generator.linear_plan import set_steps
from ddkit.generator.model_facts import ModelFacts
from ddkit.generator.model_folder import Model, load_model
from ddkit.generator.networks import build_denoiser, null_class, predict
from ddkit.generator.presets import preset
from ddkit.generator.samplers import make_scheduler
from ddkit.generator.sampling import Sampler, SamplingSettings
from ddkit.runtime.device import describe_device, resolve_device
from ddkit.runtime.seeds import generator_for


def random_model(name: str, image_size: int, classes: int) -> Model:
    """A preset's model with random weights, none of whose layers returns zeros."""
    config = preset(name).config(image_size)
    autoencoder = build_autoencoder(config.autoencoder, image_size, seed=0)
    denoiser = build_denoiser(config.denoiser, config.autoencoder.latent_shape(image_size), classes, seed=0)
    generator = generator_for("cpu", "bench")
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    facts = ModelFacts("bench", tuple(map(str, range(classes))), image_size, config.objective.prediction, name, 0, 0, "")
    return Model(denoiser.eval(), autoencoder.eval(), facts)


def plain(model: Model, config: SamplingSettings, device: torch.device, precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """diffusers' loop, as in its own pipelines."""
    scheduler = make_scheduler(config.sampler, model.facts.prediction)
    model = model.to(device)

    @torch.inference_mode()
    def make(labels: Tensor, noise: Tensor) -> Tensor:
        set_steps(scheduler, config.steps)
        labels, point = labels.to(device), noise.to(device)
        both = torch.cat([labels, torch.full_like(labels, null_class(model.denoiser))])
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for time_step in scheduler.timesteps:
                times = time_step.to(device).expand(len(both))
                with_class, without = predict(model.denoiser, torch.cat([point, point]), times, both).chunk(2)
                output = without + config.guidance * (with_class - without)
                point = scheduler.step(output, time_step, point, return_dict=False)[0]
            latents = point / model.autoencoder.config.scaling_factor
            images = decode(model.autoencoder, latents, model.facts.image_size)
        return to_uint8((images.float() / 2 + 0.5).clamp(0, 1)).cpu()

    return make


def fast(model: Model, config: SamplingSettings, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """ddkit's sampler."""
    sampler = Sampler(model, config, device)
    return lambda labels, noise: sampler.from_noise(noise, labels, torch.arange(len(labels)))


def measure(
    make: Callable[[Tensor, Tensor], Tensor], labels: Tensor, noise: Tensor, clock: Callable[[], float]
) -> tuple[float, Tensor]:
    """Seconds for one batch, including its copy to the CPU, and its images."""
    began = clock()
    images = make(labels, noise)
    return clock() - began, images


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpm++")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    options = parse()
    device = resolve_device(options.device)
    model = load_model(options.model) if options.model else random_model(
        options.preset, options.image_size, options.classes
    )  # fmt: skip
    config = SamplingSettings(
        options.sampler,
        options.steps,
        options.guidance,
        batch_size=options.batch_size,
        precision=options.precision,
        compile=not options.no_compile,
    )
    labels = torch.arange(options.batch_size) % len(model.facts.class_names)
    ways = {
        f"diffusers, {precision}": plain(model, config, device, precision)
        for precision in dict.fromkeys(("float32", config.precision))
    }
    ways["ddkit"] = fast(model, config, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    images = {}
    for batch in range(options.batches + 1):
        noise = torch.randn(len(labels), *model.latent_shape, generator=generator_for("cpu", "bench", batch))
        for name, way in ways.items():
            taken, images[name] = measure(way, labels, noise, time.process_time if options.cpu_time else time.perf_counter)
            if batch > 0:
                seconds[name].append(taken)
    speeds = {name: options.batch_size / statistics.median(taken) for name, taken in seconds.items()}
    difference = (images["diffusers, float32"].int() - images["ddkit"].int()).abs().max().item()
    fastest = max(speed for name, speed in speeds.items() if name != "ddkit")
    unit = ", per second of a core" if options.cpu_time else ""
    print(f"{describe_device(device)}; {config.sampler}, {config.steps} steps, guidance {config.guidance:g}, "
          f"batches of {options.batch_size}, {config.precision}, torch {torch.__version__}{unit}")  # fmt: skip
    for name, speed in speeds.items():
        print(f"{name:>19}: {speed:10.1f} images/s")
    print(f"{'ratio':>19}: {speeds['ddkit'] / fastest:10.2f}    largest difference of a pixel: {difference}")


if __name__ == "__main__":
    main()
