"""A linear classifier of the real images that is fitted in seconds, to judge which class an image shows.

It sees histograms of oriented gradients (Dalal and Triggs 2005) and of colors, at 32 pixels for any image size, and is
a linear discriminant analysis with a shrunk covariance. It is far from the best classifier, but the average over ten
images tells most classes of CIFAR-100 apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddkit.data.store import ImageSet, dataset_spec, load_dataset, train_sha256
from ddkit.errors import BadDataError
from ddkit.runtime.cached import cached_tensors
from ddkit.runtime.files import cache_folder
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.threads import cores_for, parallel_map

_CACHE_FOLDER = "_checks"  # no dataset can have this name
_VERSION = 2  # of the features and the fit; a classifier of another version is not read
_SIDE = 32  # pixels at which features are computed
_CELL = 4  # pixels of a gradient histogram's cell
_ORIENTATIONS = 8
_COLOR_LEVELS = 4  # per channel
_VALUE_RANGE = (-0.25, 1.25)  # optimized images leave [0, 1]; beyond this a value says no more
_BATCH = 64  # small enough for the processor's cache
_CHUNK = 960  # images that are degraded and described at once; a multiple of the degradations' period
_IMAGES_PER_CLASS = 100
_IMAGES_AT_LEAST = 2000
_HELD_OUT = 0.1
_SHRINKAGE = 0.3
_SEED = 2024
_TEMPERATURES = torch.logspace(-1, 2, 61)


@dataclass(frozen=True)
class ClassModel:
    """A linear classifier on `image_features`, with calibrated probabilities.

    weight: (D, C) float32. bias: (C,) float32.
    real_gain: mean log-probability of the right class, in nats above guessing.
    real_information: `class_information` in nats.
    Both describe held-out real images, half of them degraded; a set is compared with them.
    """

    weight: Tensor
    bias: Tensor
    real_gain: float
    real_information: float

    def log_probabilities(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) float in units of [0, 1] -> (N, C) log-probabilities."""
        return torch.log_softmax(image_features(images) @ self.weight + self.bias, dim=1)


def image_features(images: Tensor) -> Tensor:
    """Colors and edges of (N, 3, S, S) float images in units of [0, 1], as (N, 1024) float32."""
    return torch.cat(list(parallel_map(_batch_features, images.split(_BATCH), cores_for(images.device))))


def class_model(name: str, *, progress: Listener = ignore) -> ClassModel:
    """The classifier of a prepared dataset. It is fitted on first use and kept in the cache.

    Raises MissingDataError or UsageError if the dataset is not prepared, BadDataError if a class has too few images.
    """
    path = cache_folder() / _CACHE_FOLDER / f"{name}-{train_sha256(name)[:16]}-v{_VERSION}.safetensors"

    def fitted() -> dict[str, Tensor]:
        model = fit_class_model(load_dataset(name, "train"), dataset_spec(name).num_classes, name, progress=progress)
        measures = torch.tensor([model.real_gain, model.real_information])
        return {"weight": model.weight, "bias": model.bias, "measures": measures}

    kept = cached_tensors(path, ("weight", "bias", "measures"), f"the classifier of {name}", fitted)
    gain, information = kept["measures"].tolist()
    # Copied out of the mapped file, which another process may replace or damage.
    return ClassModel(kept["weight"].clone(), kept["bias"].clone(), gain, information)


def fit_class_model(real: ImageSet, num_classes: int, name: str, *, progress: Listener = ignore) -> ClassModel:
    """Fit on some images of each class, half of them degraded as weak generators and optimizers degrade theirs.

    name: of the dataset, for the progress. Raises BadDataError if a class has fewer than two images.
    """
    per_class = max(_IMAGES_PER_CLASS, _IMAGES_AT_LEAST // num_classes)
    fit_rows, held_rows = _choose_rows(real.labels, num_classes, per_class)
    chunks = [*fit_rows.split(_CHUNK), *held_rows.split(_CHUNK)]
    total = len(fit_rows) + len(held_rows)
    task = f"fitting a classifier on real images of {name}, once"
    progress(Progress(task, 0, total, "images"))

    def describe(numbered: tuple[int, Tensor]) -> Tensor:
        number, rows = numbered
        return _degraded_features(real.images[rows], number)

    described: list[Tensor] = []
    for part in parallel_map(describe, list(enumerate(chunks)), cores_for(torch.device("cpu"))):
        described.append(part)
        progress(Progress(task, sum(map(len, described)), total, "images"))
    features, held_features = torch.cat(described).split([len(fit_rows), len(held_rows)])
    weight, bias = _discriminant(features, real.labels[fit_rows], num_classes)
    held_labels = real.labels[held_rows]
    logits = held_features @ weight + bias
    # The divisor of logits that makes held-out images most probable (Guo et al. 2017).
    losses = torch.stack([F.cross_entropy(logits / temperature, held_labels) for temperature in _TEMPERATURES])
    temperature = _TEMPERATURES[losses.argmin()]
    logp = torch.log_softmax(logits / temperature, dim=1)
    gain = logp.gather(1, held_labels[:, None]).mean() + math.log(num_classes)
    return ClassModel(weight / temperature, bias / temperature, float(gain), class_information(logp))


def class_variety(logp: Tensor) -> float:
    """The entropy of the mean of (N, C) predicted probabilities, in nats: log C if all classes are predicted alike often."""
    mean = torch.logsumexp(logp, dim=0) - math.log(len(logp))
    return float(-(mean.exp() * mean).sum())


def class_information(logp: Tensor) -> float:
    """How much (N, C) log-probabilities tell of different classes: H(mean p) - mean H(p), in nats."""
    return class_variety(logp) + float((logp.exp() * logp).sum(dim=1).mean())


def _batch_features(images: Tensor) -> Tensor:
    images = _resized(images.clamp(*_VALUE_RANGE))
    layout = F.avg_pool2d(images, _CELL).flatten(1)
    return torch.cat([layout, _edge_features(images), _color_features(images)], dim=1)


def _resized(images: Tensor) -> Tensor:
    return images if images.shape[-1] == _SIDE else F.interpolate(images, size=_SIDE, mode="area")


def _edge_features(images: Tensor) -> Tensor:
    """Histograms of gradient orientations in cells of 4 and 8 pixels, and the cells' energy."""
    smooth = 0.5 * (images + F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1))
    padded = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    squared, strongest = (across**2 + down**2).max(dim=1, keepdim=True)  # for each pixel the channel with the clearest edge
    across, down = across.gather(1, strongest), down.gather(1, strongest)
    magnitude = squared.sqrt()
    angles = (torch.arange(_ORIENTATIONS) * math.pi / _ORIENTATIONS).view(1, -1, 1, 1)
    # An edge counts for the nearest orientations: soft bins without an arctangent.
    along = (across * angles.cos()).addcmul_(down, angles.sin()).abs_()
    along.sub_(magnitude, alpha=math.cos(math.pi / _ORIENTATIONS)).clamp_min_(0)
    fine = F.avg_pool2d(along, _CELL)
    coarse = F.avg_pool2d(fine, 2)
    energy = F.avg_pool2d((fine**2).sum(dim=1, keepdim=True), 3, 1, 1, count_include_pad=False).sqrt()
    coarse_energy = (coarse**2).sum(dim=1, keepdim=True).sqrt()
    floor = 0.003  # of energy: flat cells stay quiet
    parts = ((fine / (energy + floor)).sqrt(), (coarse / (coarse_energy + floor)).sqrt(), (energy + 1e-3).log())
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _color_features(images: Tensor) -> Tensor:
    """Square roots of the joint color histograms of the whole image and of its center."""
    small = F.avg_pool2d(images, 2).clamp(0, 1)
    levels = torch.linspace(0, 1, _COLOR_LEVELS).view(1, 1, -1, 1, 1)
    shares = (1 - (small[:, :, None] - levels).abs() * (_COLOR_LEVELS - 1)).clamp_min(0)
    edge = small.shape[-1] // 4
    center = shares[..., edge:-edge, edge:-edge]
    return torch.cat([_joint_histogram(shares), _joint_histogram(center)], dim=1).sqrt()


def _joint_histogram(shares: Tensor) -> Tensor:
    """(N, 3, L, H, W) membership of each level -> (N, L ** 3) joint frequencies."""
    red, green, blue = shares.flatten(3).unbind(dim=1)
    pairs = (red[:, :, None] * green[:, None]).flatten(1, 2)
    return (pairs @ blue.mT).flatten(1) / blue.shape[-1]


def _choose_rows(labels: Tensor, num_classes: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to calibrate on, the latter a tenth and at least one of each class."""
    fit, held = [], []
    for label in range(num_classes):
        rows = (labels == label).nonzero().flatten()[:per_class]
        if len(rows) < 2:
            raise BadDataError(f"Class {label} has {len(rows)} training images; the comparison needs two or more.")
        count = max(1, int(len(rows) * _HELD_OUT))
        fit.append(rows[:-count])
        held.append(rows[-count:])
    return torch.cat(fit), torch.cat(held)


def _degraded_features(images: Tensor, chunk: int) -> Tensor:
    """`image_features` of (N, 3, S, S) uint8 images: every other one blurred, noisy, noisier, or of low contrast, in turn.

    chunk: number of the chunk, which seeds the noise.
    """
    generator = torch.Generator().manual_seed(_SEED + chunk)
    side = images.shape[-1]
    pixels = torch.cat([_resized(batch.float() / 255) for batch in images.split(_BATCH)])
    small = F.interpolate(pixels[1::8], size=max(side // 3, 1), mode="area")
    pixels[1::8] = F.interpolate(small, size=(_SIDE, _SIDE), mode="bilinear")
    for start, noise in ((3, 0.2), (5, 0.4)):
        chosen = pixels[start::8]
        # Resizing averages the noise of (side / 32)^2 pixels.
        pixels[start::8] = chosen + torch.randn(chosen.shape, generator=generator) * (noise * min(1, _SIDE / side))
    pixels[7::8] = (pixels[7::8] - 0.5) * 0.3 + 0.5
    # A third is mirrored, because the direction in which an animal looks is not a property of its class.
    pixels[::3] = pixels[::3].flip(-1)
    return torch.cat([_batch_features(batch) for batch in pixels.split(_BATCH)])


def _discriminant(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis with equal priors: weight (D, C) and bias (C,) on unstandardized features."""
    mean, scale = features.mean(dim=0), features.std(dim=0) + 1e-3
    features = (features - mean) / scale
    counts = torch.bincount(labels, minlength=num_classes)[:, None]
    centers = torch.zeros(num_classes, features.shape[1]).index_add_(0, labels, features) / counts
    residual = features - centers[labels]
    covariance = residual.mT @ residual / len(residual)
    ridge = _SHRINKAGE * covariance.diagonal().mean()
    covariance = (1 - _SHRINKAGE) * covariance + ridge * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance, centers.mT)
    bias = -0.5 * (centers * weight.mT).sum(dim=1)
    weight = weight / scale[:, None]
    return weight, bias - mean @ weight
