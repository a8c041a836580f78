"""Image features that need no download: those of the official ConvNet, trained on the real images.

The network's normalization removes each channel's mean from every map, so that averages over whole maps hold almost no
information; the features here are averages over the four quarters of the last maps.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.challenge import NETWORK_WIDTH, DatasetSpec
from ddkit.data.images import normalize, resize
from ddkit.data.store import ImageSet
from ddkit.errors import BadFileError, UsageError, require_positive
from ddkit.network.autotune import choose_plan
from ddkit.network.convnet import ConvNet
from ddkit.network.embedding import build_embedder
from ddkit.network.networks import OFFICIAL_NETWORK, build_network
from ddkit.network.plan import PRECISIONS
from ddkit.network.training import TrainingRun, TrainingSettings
from ddkit.runtime.cached import cache_key, cached_tensors
from ddkit.runtime.device import upload
from ddkit.runtime.files import cache_folder
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.tensor_files import UnloadableError, load_restricted, save_torch

_QUARTERS = 2  # along each side of the last map
_SIDE_OF_SETTINGS = 32  # pixels; of larger images fewer are used, see FeatureSettings
_LARGEST_SIDE = 64  # pixels; larger images are reduced to it
_SIDE_MULTIPLE = 8  # the network halves the side three times
_IMAGES_AT_ONCE = 250
_SECONDS_BETWEEN_SAVES = 30.0  # of a training's state, between two epochs
_STATE_VERSION = 1
_CACHE_FOLDER = "_features"  # a dataset cannot have this name


@dataclass(frozen=True)
class FeatureSettings:
    """Settings of the feature network's training. Features of different settings are not comparable.

    images: how many are drawn at random from a training set of 32 px; of larger images fewer, in proportion to the side,
        so that training takes minutes on a CPU.
    precision: in which the network is trained and features are computed: "float32", "bfloat16" or "auto", which takes
        the faster of the two on a CPU and float32 on other devices.
    """

    images: int = 10_000
    epochs: int = 8
    batch_size: int = 64  # smaller than the protocol's, for more steps in few epochs
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "images", "epochs", "batch_size")
        if self.precision not in ("auto", *PRECISIONS):
            raise UsageError(f"Unknown precision '{self.precision}'.", f"Known: auto, {', '.join(PRECISIONS)}.")


# A network that labels images has to be right more often than one whose features are compared.
CLASSIFIER = FeatureSettings(images=50_000, epochs=6)


class ConvNetFeatures:
    """Features of images; call it with images. `num_features` is the number of features.

    network: trained on real images of `spec`'s dataset, on the device on which features are computed.
    precision: in which they are computed, "float32" or "bfloat16". Features of different precisions are not comparable.
    """

    num_features = NETWORK_WIDTH * _QUARTERS**2

    def __init__(self, network: ConvNet, spec: DatasetSpec, precision: str = "float32") -> None:
        self.network, self.precision = network.eval(), precision
        self._spec = spec
        self._device = next(network.parameters()).device
        self._embed = build_embedder(network, _IMAGES_AT_ONCE, precision)

    def __call__(self, images: Tensor, progress: Listener = ignore) -> Tensor:
        """(N, 3, S, S) uint8, or float in [0, 1] -> (N, 512) float32 on the CPU. A GPU is waited for once."""
        features = [torch.empty(0, self.num_features, device=self._device)]
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            features.append(self._features_and_logits(images[start : start + _IMAGES_AT_ONCE])[0])
            done = min(start + _IMAGES_AT_ONCE, len(images))
            progress(Progress("Computing features", done, len(images), "images"))
        return torch.cat(features).cpu()

    def with_confidence(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features as by a call, and (N,) float32 in [0, 1]: the probability that the network gives to each label.

        images: (N, 3, S, S) uint8, or float in [0, 1]. labels: (N,) int64.
        """
        parts = [self._features_and_logits(batch) for batch in images.split(_IMAGES_AT_ONCE)]
        features, logits = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
        return features, logits.softmax(1).gather(1, labels[:, None])[:, 0]

    @torch.no_grad()
    def _features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Those of one batch, on the network's device."""
        batch = resize(normalize(upload(images, self._device), self._spec), self.network.image_size)
        embedding = self._embed(batch)
        logits = self.network.classifier(embedding)
        maps = embedding.view(len(batch), NETWORK_WIDTH, *[self.network.image_size // _SIDE_MULTIPLE] * 2)
        return F.adaptive_avg_pool2d(maps, _QUARTERS).flatten(1).float(), logits.float()


def convnet_features(
    dataset: ImageSet,
    spec: DatasetSpec,
    settings: FeatureSettings = FeatureSettings(),
    *,
    device: str | torch.device = "cpu",
    progress: Listener = ignore,
) -> ConvNetFeatures:
    """Features learned from a dataset's real training images; the network is trained once and kept in the cache.

    dataset: the training split. The cached network belongs to the pixels and labels that it was trained on and to the
    settings; for other images under the same name another one is trained. That takes minutes on a CPU.
    """
    images, labels = _training_images(dataset, spec, settings)
    settings = resolve_precision(settings, spec, device)
    network = _untrained(spec, settings, device)

    path = _cache_path(images, labels, spec, settings)

    def train() -> dict[str, Tensor]:
        _train(network, images, labels, spec, settings, path.with_suffix(".state"), progress)
        return network.state_dict()

    weights = cached_tensors(path, network.state_dict(), f"the feature network of {spec.name}", train)
    with contextlib.suppress(OSError):  # a cache that may not be written
        path.with_suffix(".state").unlink(missing_ok=True)
    network.load_state_dict(weights)
    return ConvNetFeatures(network, spec, settings.precision)


def is_cached(
    dataset: ImageSet,
    spec: DatasetSpec,
    settings: FeatureSettings = FeatureSettings(),
    *,
    device: str | torch.device = "cpu",
) -> bool:
    """True if `convnet_features` would find its network trained."""
    settings = resolve_precision(settings, spec, device)
    return _cache_path(*_training_images(dataset, spec, settings), spec, settings).is_file()


def resolve_precision(settings: FeatureSettings, spec: DatasetSpec, device: str | torch.device) -> FeatureSettings:
    """These settings with the precision that "auto" means on this device; measured there once."""
    network = _untrained(spec, settings, device)
    return replace(settings, precision=choose_plan(network, settings.precision, settings.batch_size).precision)


def _untrained(spec: DatasetSpec, settings: FeatureSettings, device: str | torch.device) -> ConvNet:
    network = build_network(OFFICIAL_NETWORK, spec.num_classes, _side(spec.image_size), seed=settings.seed)
    assert isinstance(network, ConvNet)
    return network.to(device)


def _train(
    network: ConvNet,
    images: Tensor,
    labels: Tensor,
    spec: DatasetSpec,
    settings: FeatureSettings,
    state: Path,
    progress: Listener,
) -> None:
    """Train the network; killed, the next training of it continues from the file `state`, written between epochs."""
    device = next(network.parameters()).device
    run = TrainingRun(
        network,
        resize(normalize(images.to(device), spec), network.image_size),
        labels.to(device),
        # Without augmentation, which would slow learning down; in so few epochs the images are not memorized.
        TrainingSettings(settings.epochs - 1, settings.batch_size, augment=False, precision=settings.precision),
        torch.Generator().manual_seed(settings.seed),
    )
    task = "Training a classifier on real images (once)"
    with contextlib.suppress(OSError, UnloadableError):
        saved_state = load_restricted(state)
        if isinstance(saved_state, dict) and saved_state.get("version") == _STATE_VERSION:
            run.load_state_dict(saved_state["training"])
    progress(Progress(task, run.epochs_done * len(images), settings.epochs * len(images), "images"))
    saved = time.monotonic()
    while not run.finished:
        losses = run.epoch()
        figures = {"loss": sum(losses) / len(losses)}
        progress(Progress(task, run.epochs_done * len(images), settings.epochs * len(images), "images", figures))
        if time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES:
            with contextlib.suppress(BadFileError):  # a cache that may not be written
                save_torch({"version": _STATE_VERSION, "training": run.state_dict()}, state)
            saved = time.monotonic()
    run.close()


def training_images(spec: DatasetSpec, settings: FeatureSettings, available: int) -> int:
    """The number of images that the network is trained on, out of so many."""
    side = max(_side(spec.image_size), _SIDE_OF_SETTINGS)
    return min(available, max(1, settings.images * _SIDE_OF_SETTINGS // side))


def _training_images(dataset: ImageSet, spec: DatasetSpec, settings: FeatureSettings) -> tuple[Tensor, Tensor]:
    """The images that the network is trained on, uint8, and their labels, in the store's order."""
    available = len(dataset)
    count = training_images(spec, settings, available)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(settings.seed))
    chosen = order[:count].sort().values  # so that the store is read sequentially
    return dataset.images[chosen], dataset.labels[chosen]


def _side(image_size: int) -> int:
    return min(_LARGEST_SIDE, image_size // _SIDE_MULTIPLE * _SIDE_MULTIPLE)


def _cache_path(images: Tensor, labels: Tensor, spec: DatasetSpec, settings: FeatureSettings) -> Path:
    names = asdict(settings)
    if settings.precision == "float32":
        del names["precision"]  # as before there was another, so that networks of that time are found
    made_of = (spec.mean, spec.std, sorted(names.items()))
    key = cache_key(made_of, (*images.split(_IMAGES_AT_ONCE), labels))
    return cache_folder() / _CACHE_FOLDER / f"{spec.name}-{key}.safetensors"
