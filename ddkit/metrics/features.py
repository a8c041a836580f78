"""Features that need no download: what an official ConvNet, trained on the real images, sees in a picture.

The network's normalization takes each channel's mean out of every map, so that averages over a whole map say
almost nothing; averages over its four quarters do, and are the features here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.challenge import NETWORK_WIDTH, DatasetSpec
from ddkit.data.images import normalize
from ddkit.data.store import ImageSet
from ddkit.errors import BadFileError, UsageError, require_positive
from ddkit.network.convnet import ConvNet
from ddkit.network.embedding import build_embedder
from ddkit.network.networks import OFFICIAL_NETWORK, build_network
from ddkit.network.training import TrainingRun, TrainingSettings
from ddkit.runtime.files import cache_folder
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.tensor_files import save_safetensors

log = logging.getLogger(__name__)

_QUARTERS = 2  # along each side of the last map
_SIDE_OF_SETTINGS = 32  # pixels; larger images are fewer, see FeatureSettings
_LARGEST_SIDE = 64  # pixels; larger images are reduced to it
_SIDE_MULTIPLE = 8  # the network halves the side three times
_IMAGES_AT_ONCE = 250
_CACHE_FOLDER = "_features"  # no dataset can have this name


@dataclass(frozen=True)
class FeatureSettings:
    """How the feature network is trained. Features of different settings are not comparable.

    images: drawn at random from the training set, of 32 px; of larger ones fewer, in proportion to the side,
        so that the cost stays within minutes on a CPU.
    """

    images: int = 10_000
    epochs: int = 8
    batch_size: int = 64  # smaller than the protocol's: few epochs need many steps
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "images", "epochs", "batch_size")

    def images_for(self, side: int, available: int) -> int:
        """How many images of that side are trained on."""
        return min(available, max(1, self.images * _SIDE_OF_SETTINGS // max(side, _SIDE_OF_SETTINGS)))


class ReferenceFeatures:
    """Turns images into features. Call it; `num_features` is their size.

    network: trained on real images of `spec`'s dataset, on the device where features are to be computed.
    """

    num_features = NETWORK_WIDTH * _QUARTERS**2

    def __init__(self, network: ConvNet, spec: DatasetSpec) -> None:
        self._network = network.eval()
        self._spec = spec
        self._device = next(network.parameters()).device
        self._embed = build_embedder(network, _IMAGES_AT_ONCE)

    def __call__(self, images: Tensor, progress: Listener = ignore) -> Tensor:
        """(N, 3, S, S) uint8, or float in [0, 1] -> (N, 512) float32 on the CPU."""
        features = []
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            features.append(self._of_batch(images[start : start + _IMAGES_AT_ONCE]))
            done = min(start + _IMAGES_AT_ONCE, len(images))
            progress(Progress("Computing features", done, len(images), "images"))
        return torch.cat(features) if features else torch.empty(0, self.num_features)

    def with_confidence(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features as by a call, and (N,) float32 in [0, 1]: the probability that the network gives to each label.

        images: (N, 3, S, S) uint8, or float in [0, 1]. labels: (N,) int64.
        """
        parts = [self._look(images[start : start + _IMAGES_AT_ONCE]) for start in range(0, len(images), _IMAGES_AT_ONCE)]
        features, logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return features, logits.softmax(1).gather(1, labels[:, None])[:, 0]

    def _of_batch(self, images: Tensor) -> Tensor:
        return self._look(images)[0]

    @torch.no_grad()
    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of one batch, on the CPU."""
        batch = _resized(normalize(images.to(self._device), self._spec), self._network.image_size)
        embedding = self._embed(batch)
        logits = self._network.classifier(embedding)
        maps = embedding.view(len(batch), NETWORK_WIDTH, *[self._network.image_size // _SIDE_MULTIPLE] * 2)
        return F.adaptive_avg_pool2d(maps, _QUARTERS).flatten(1).float().cpu(), logits.float().cpu()


def reference_features(
    dataset: ImageSet,
    spec: DatasetSpec,
    settings: FeatureSettings = FeatureSettings(),
    *,
    device: str | torch.device = "cpu",
    progress: Listener = ignore,
) -> ReferenceFeatures:
    """The features of a dataset's real training images; trains their network once and keeps it in the cache.

    dataset: the training split. The cached network belongs to the very pixels and labels it was trained on and
    to the settings: another store under the same name trains another one. Takes minutes on a CPU the first time.
    """
    side = _side(spec.image_size)
    chosen = _choose(len(dataset), settings.images_for(side, len(dataset)), settings.seed)
    images, labels = dataset.images[chosen], dataset.labels[chosen]
    network = build_network(OFFICIAL_NETWORK, len(dataset.class_names), side, seed=settings.seed)
    path = _cache_path(images, labels, spec, settings)
    if not _load(network, path):
        log.info("Training the feature network on %d real images, kept in %s", len(images), path)
        _train(network.to(device), images, labels, spec, settings, progress)
        try:
            _save(network, path)
        except BadFileError as error:  # a cache that is shared and not ours to write costs the training each time, no more
            log.info("The feature network is not kept: %s", error)
    return ReferenceFeatures(network.to(device), spec)


def is_cached(dataset: ImageSet, spec: DatasetSpec, settings: FeatureSettings = FeatureSettings()) -> bool:
    """Whether `reference_features` would find its network trained."""
    chosen = _choose(len(dataset), settings.images_for(_side(spec.image_size), len(dataset)), settings.seed)
    return _cache_path(dataset.images[chosen], dataset.labels[chosen], spec, settings).is_file()


def _train(
    network: ConvNet,
    images: Tensor,
    labels: Tensor,
    spec: DatasetSpec,
    settings: FeatureSettings,
    progress: Listener,
) -> None:
    device = next(network.parameters()).device
    run = TrainingRun(
        network,
        _resized(normalize(images.to(device), spec), network.image_size),
        labels.to(device),
        # No augmentation: over so few epochs nothing is learnt by heart, and it would slow learning down.
        TrainingSettings(settings.epochs - 1, settings.batch_size, augment=False),
        torch.Generator().manual_seed(settings.seed),
    )
    task = "Training the feature network (once)"
    progress(Progress(task, 0, settings.epochs * len(images), "images"))
    while not run.finished:
        losses = run.epoch()
        figures = {"loss": sum(losses) / len(losses)}
        progress(Progress(task, run.epochs_done * len(images), settings.epochs * len(images), "images", figures))


def _choose(available: int, count: int, seed: int) -> Tensor:
    """Indices of `count` images, in the store's order so that reading it is sequential."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _side(image_size: int) -> int:
    if image_size < _SIDE_MULTIPLE:
        raise UsageError(f"Images of {image_size} pixels are too small for features.")
    return min(_LARGEST_SIDE, image_size // _SIDE_MULTIPLE * _SIDE_MULTIPLE)


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def _cache_path(images: Tensor, labels: Tensor, spec: DatasetSpec, settings: FeatureSettings) -> Path:
    digest = hashlib.sha256(repr((spec.mean, spec.std, sorted(asdict(settings).items()))).encode())
    for part in _blocks(images):
        digest.update(part)
    digest.update(labels.contiguous().numpy().tobytes())
    return cache_folder() / _CACHE_FOLDER / f"{spec.name}-{digest.hexdigest()[:20]}.safetensors"


def _blocks(images: Tensor) -> Iterator[memoryview]:
    for block in images.split(_IMAGES_AT_ONCE):
        yield block.contiguous().numpy().data


def _load(network: ConvNet, path: Path) -> bool:
    """Fill the network from the cache; False where there is nothing usable, which is then made anew."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError, RuntimeError):
        return False
    return True


def _save(network: ConvNet, path: Path) -> None:
    save_safetensors({key: value.cpu().contiguous() for key, value in network.state_dict().items()}, path)
