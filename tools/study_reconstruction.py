"""What does the autoencoder cost? Train official networks on real images, and on the same images encoded and decoded.

    python tools/study_reconstruction.py cifar100 --model runs/cifar100 [FOLDER ...] [--per-class N] [--rounds N]
        [--epochs-setting E] [--state FOLDER]

Samples can teach no more than the autoencoder keeps of real images. Round r starts from the same weights and draws the
same shuffles and augmentations for all, so they are compared round by round. The loss is given in points of accuracy,
real minus reconstructed. Finished rounds are kept in --state, so the study continues when run again, also with more
rounds or more autoencoders.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from ddkit.data.images import normalize, to_uint8
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.errors import DDKitError
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, evaluate_source
from ddkit.evaluation.reference import TestSet, as_test_set
from ddkit.evaluation.sources import FixedSet
from ddkit.generator.autoencoder import decode, encode, images_at_once, pixels_per_latent, psnr, to_signed
from ddkit.generator.model_folder import load_autoencoder
from ddkit.runtime.device import describe_device, resolve_device
from ddkit.sets.distilled import class_labels
from ddkit.sets.select import choose
from ddkit.statistics import compare, sample_std

Accuracies = tuple[float, ...]


@torch.inference_mode()
def reconstruct(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 -> the same, encoded to the posterior's means and decoded."""
    size = images.shape[-1]
    side = size // pixels_per_latent(autoencoder)
    parts = [
        decode(autoencoder, encode(autoencoder, to_signed(part), side), size) / 2 + 0.5
        for part in images.split(images_at_once(autoencoder, side))
    ]
    return to_uint8(torch.cat(parts))


def evaluate(images: Tensor, test_set: TestSet, options: argparse.Namespace) -> Accuracies:
    """(N, 3, S, S) uint8, class by class -> a fraction for each round; finished rounds are read back."""
    spec = test_set.spec
    source = FixedSet(normalize(images, spec), class_labels(spec.num_classes, options.per_class))
    settings = EvaluationSettings(
        rounds=options.rounds, epochs_setting=options.epochs_setting, seed=options.seed, device=options.device
    )
    return evaluate_source(source, test_set, settings, state=StateFolder(options.state)).accuracies


def row(name: str, of_pixels: str, accuracies: Accuracies, lost: str) -> str:
    """A row of the table."""
    mean, std = sum(accuracies) / len(accuracies), sample_std(accuracies)
    spread = "" if std is None else f" ± {100 * std:.2f}"
    return f"| {name} | {of_pixels} | {len(accuracies)} | {100 * mean:.2f}{spread} | {lost} |"


def lost_points(real: Accuracies, reconstructed: Accuracies) -> str:
    """The mean difference in points, with its 95 % interval if there are two rounds or more."""
    if len(real) < 2:
        return f"{100 * (real[0] - reconstructed[0]):.2f}"
    found = compare(real, reconstructed, paired=True)
    low, high = (100 * bound for bound in found.interval)
    return f"{100 * found.difference:.2f} ({low:.2f} to {high:.2f})"


def study(options: argparse.Namespace) -> None:
    """Evaluate, and print a row as soon as it is known."""
    spec = dataset_spec(options.dataset)
    train, test_set = load_dataset(options.dataset, "train"), as_test_set(load_dataset(options.dataset, "test"), spec)
    rows = choose("random", train.labels, options.per_class, spec.num_classes, seed=options.seed)
    images = train.images[rows]
    print("| images | PSNR, dB | rounds | accuracy, % | points lost (95 % interval) |\n|---|---|---|---|---|", flush=True)
    real = evaluate(images, test_set, options)
    print(row("real", "-", real, "-"), flush=True)
    for folder in options.model:
        autoencoder = load_autoencoder(folder / "vae").eval()
        made = reconstruct(autoencoder, images)
        error = F.mse_loss(to_signed(made), to_signed(images)).item()
        channels, side = autoencoder.config.latent_channels, spec.image_size // pixels_per_latent(autoencoder)
        name = f"{folder}: latents {channels} x {side} x {side}"
        accuracies = evaluate(made, test_set, options)
        print(row(name, f"{psnr(error):.2f}", accuracies, lost_points(real, accuracies)), flush=True)
    print(f"\n{options.per_class} images a class, E = {options.epochs_setting}, "
          f"{describe_device(resolve_device(options.device))}")  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="folders with a `vae` in them")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs-setting", type=int, default=30, help="E; E + 1 epochs run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--state", type=Path, default=Path("runs/study-reconstruction"), help="where rounds are kept")
    return parser.parse_args(arguments)


def main() -> None:
    try:
        study(parse())
    except DDKitError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
