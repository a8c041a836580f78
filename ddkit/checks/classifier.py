"""Which class an image looks like, by cheap means: colors, edges and a linear classifier fitted on real images.

Histograms of oriented gradients (Dalal and Triggs 2005) and of colors, at 32 pixels whatever the image size, and
linear discriminant analysis with a shrunk covariance. Far from the best classifier there is, but it is fitted in
seconds, and the average over ten images tells most classes of CIFAR-100 apart.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ddkit.data.store import ImageSet, dataset_spec, load_dataset, store_hash
from ddkit.errors import BadDataError, BadFileError
from ddkit.runtime.files import cache_folder
from ddkit.runtime.tensor_files import save_safetensors

log = logging.getLogger(__name__)

_CACHE_FOLDER = "_checks"  # no dataset can have this name
_VERSION = 1  # of features and fit; a classifier of another version is not read
_SIDE = 32  # pixels that features are computed at
_CELL = 4  # pixels of a gradient histogram's cell
_ORIENTATIONS = 8
_COLOR_LEVELS = 4  # per channel
_VALUE_RANGE = (-0.25, 1.25)  # optimized images leave [0, 1]; beyond this a value says no more
_BATCH = 64  # whose intermediate values stay in the cache
_IMAGES_PER_CLASS = 100
_IMAGES_AT_LEAST = 2000
_HELD_OUT = 0.1
_SHRINKAGE = 0.3
_SEED = 2024
_TEMPERATURES = torch.logspace(-1, 2, 61)


@dataclass(frozen=True)
class ClassModel:
    """A linear classifier on `image_features`, with calibrated probabilities.

    weight: (D, C), bias: (C,), float32. real_gain: mean log-probability of the right class above that of guessing,
    real_information: `class_information`; both of held-out real
    images of which half are degraded, and what a set is measured against.
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
    return torch.cat([_batch_features(batch) for batch in images.split(_BATCH)])


def class_model(name: str) -> ClassModel:
    """The classifier of a prepared dataset: fitted on first use, then read from the cache.

    Raises MissingDataError or UsageError where the dataset is not prepared, BadDataError where a class has too few images.
    """
    path = cache_folder() / _CACHE_FOLDER / f"{name}-{store_hash(name, 'train')[:16]}-v{_VERSION}.safetensors"
    if (model := _read(path)) is None:
        spec = dataset_spec(name)
        model = fit_class_model(load_dataset(name, "train"), spec.num_classes)
        try:
            _write(model, path)
        except BadFileError as error:  # a cache that is shared and not ours to write costs the fitting each time, no more
            log.info("The classifier is not kept: %s", error)
    return model


def fit_class_model(real: ImageSet, num_classes: int) -> ClassModel:
    """Fit on some images of each class, half of them degraded as weak generators and optimizers degrade theirs.

    Raises BadDataError where a class has fewer than two images.
    """
    per_class = max(_IMAGES_PER_CLASS, _IMAGES_AT_LEAST // num_classes)
    fit_rows, held_rows = _choose_rows(real.labels, num_classes, per_class)
    generator = torch.Generator().manual_seed(_SEED)
    features = image_features(_half_degraded(real.images[fit_rows], generator))
    weight, bias = _discriminant(features, real.labels[fit_rows], num_classes)
    held_labels = real.labels[held_rows]
    logits = image_features(_half_degraded(real.images[held_rows], generator)) @ weight + bias
    temperature = _temperature(logits, held_labels)
    logp = torch.log_softmax(logits / temperature, dim=1)
    gain = logp.gather(1, held_labels[:, None]).mean() + math.log(num_classes)
    return ClassModel(weight / temperature, bias / temperature, float(gain), class_information(logp))


def class_information(logp: Tensor) -> float:
    """How much the predicted class differs between images: H(mean p) - mean H(p) in nats, of (N, C) log p."""
    mean = torch.logsumexp(logp, dim=0) - math.log(len(logp))
    return float(-(mean.exp() * mean).sum() + (logp.exp() * logp).sum(dim=1).mean())


def _batch_features(images: Tensor) -> Tensor:
    images = images.clamp(*_VALUE_RANGE)
    if images.shape[-1] != _SIDE:
        images = F.interpolate(images, size=_SIDE, mode="area")
    layout = F.avg_pool2d(images, _CELL).flatten(1)
    return torch.cat([layout, _edge_features(images), _color_features(images)], dim=1)


def _edge_features(images: Tensor) -> Tensor:
    """Histograms of gradient orientations in cells of 4 and 8 pixels, and the cells' energy."""
    smooth = 0.5 * (images + F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1))
    padded = F.pad(smooth, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    squared = across**2 + down**2
    strongest = squared.argmax(dim=1, keepdim=True)  # the channel with the clearest edge, pixel by pixel
    across, down = across.gather(1, strongest), down.gather(1, strongest)
    magnitude = squared.gather(1, strongest).sqrt()
    angles = (torch.arange(_ORIENTATIONS) * math.pi / _ORIENTATIONS).view(1, -1, 1, 1)
    along = (across * angles.cos() + down * angles.sin()).abs()
    # An edge counts for the orientations within half a turn's share of its own: soft bins without an arctangent.
    fine = F.avg_pool2d((along - math.cos(math.pi / _ORIENTATIONS) * magnitude).clamp_min(0), _CELL)
    coarse = F.avg_pool2d(fine, 2)
    energy = F.avg_pool2d((fine**2).sum(dim=1, keepdim=True), 3, 1, 1, count_include_pad=False).sqrt()
    coarse_energy = (coarse**2).sum(dim=1, keepdim=True).sqrt()
    floor = 0.003  # of energy: flat cells stay quiet
    parts = ((fine / (energy + floor)).sqrt(), (coarse / (coarse_energy + floor)).sqrt(), (energy + 1e-3).log())
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _color_features(images: Tensor) -> Tensor:
    """Square roots of joint color histograms, of the whole image and of its center."""
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
            raise BadDataError(f"Class {label} has {len(rows)} training images; comparing needs two or more.")
        count = max(1, int(len(rows) * _HELD_OUT))
        fit.append(rows[:-count])
        held.append(rows[-count:])
    return torch.cat(fit), torch.cat(held)


def _half_degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 -> float in units of [0, 1]; every other image blurred, noisy, noisier, or of low contrast, in turn."""
    images = images.float() / 255
    side = images.shape[-1]
    small = F.interpolate(images[1::8], size=max(side // 3, 1), mode="area")
    images[1::8] = F.interpolate(small, size=(side, side), mode="bilinear")
    for start, noise in ((3, 0.2), (5, 0.4)):
        chosen = images[start::8]
        images[start::8] = chosen + torch.randn(chosen.shape, generator=generator) * noise
    images[7::8] = (images[7::8] - 0.5) * 0.3 + 0.5
    # Mirrored in part, as which way an animal looks is no property of its class.
    images[::3] = images[::3].flip(-1)
    return images


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


def _temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """The divisor of logits that makes held-out images most probable (Guo et al. 2017)."""
    losses = torch.stack([F.cross_entropy(logits / temperature, labels) for temperature in _TEMPERATURES])
    return _TEMPERATURES[losses.argmin()]


def _read(path: Path) -> ClassModel | None:
    """The cached classifier, or None where there is none that can be read."""
    import safetensors.torch

    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None
    if set(tensors) != {"weight", "bias", "measures"}:
        return None
    gain, information = tensors["measures"].tolist()
    return ClassModel(tensors["weight"], tensors["bias"], gain, information)


def _write(model: ClassModel, path: Path) -> None:
    measures = torch.tensor([model.real_gain, model.real_information])
    tensors = {"weight": model.weight.contiguous(), "bias": model.bias.contiguous(), "measures": measures}
    save_safetensors(tensors, path)
