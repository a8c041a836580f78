"""The influence of a sample on training, which influence guidance raises while the sample is drawn.

Source: Chen et al. 2025, "Influence-Guided Diffusion for Dataset Distillation" (IGD), ICLR 2025, equation 7. The influence of
an image on its class is the mean, over checkpoints of one training on real images, of the cosine similarity between the
gradient of the image's loss and the mean gradient of the losses of the class's real images.

These differ from the paper:
- The gradients are those of the last layer: outer products, whose cosines take one pass through the network. Those of all
  layers would need second derivatives.
- The checkpoints are those after 1, 2 and 4 epochs. The paper keeps a checkpoint if the cosines between its class gradients
  and those of the last one kept are below 0.7; for the last layer alone they never are.
- The network is the challenge's ConvNet at 32 pixels at most, trained on up to 10,000 images, which takes about a minute
  on a CPU. The paper's has six blocks and is trained for 50 epochs on all images.
- Deviation guidance (equation 8: away from the most similar earlier sample of the class) is left out, because an image would
  depend on all earlier ones. Mode guidance, which can be added, spreads the samples of a class without that.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddkit.challenge import DatasetSpec
from ddkit.data.images import normalize, resize
from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.network.convnet import ConvNet
from ddkit.network.embedding import Embedder, build_embedder
from ddkit.network.networks import OFFICIAL_NETWORK, build_network
from ddkit.network.parameters import flat_parameters, load_flat_parameters
from ddkit.network.training import TrainingRun, TrainingSettings
from ddkit.runtime.cached import cache_key, cached_tensors
from ddkit.runtime.device import upload
from ddkit.runtime.files import cache_folder
from ddkit.runtime.progress import Listener, Progress, ignore

_CACHE_FOLDER = "_influence"  # a dataset cannot have this name
_VERSION = 2  # counts changes to what is computed
_SIDE, _SIDE_MULTIPLE = 32, 8  # pixels; larger images are reduced, as the gradients grow with the number of pixels
_BATCH_SIZE = 64  # as for the features of ddkit.metrics
_IMAGES_AT_ONCE = 250
_IMAGES, _SEED = 10_000, 0  # of the training


class Influence:
    """Checkpoints of a network, and what the real images of each class would change in the last layer of each.

    networks: K of them, of `spec`'s dataset. gradients: (K, C, C, F + 1); [k, c] is the mean gradient of the cross-entropy of
    class c's images with respect to the classifier's weight and bias, side by side, in network k.
    """

    def __init__(self, networks: list[ConvNet], gradients: Tensor, spec: DatasetSpec, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._networks = [network.to(self._device).requires_grad_(False).eval() for network in networks]
        self._gradients = gradients
        self._spec = spec

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """(n, 3, S, S) float around [0, 1] -> (n,) float32 in [-1, 1], with gradients to the images.

        labels: (n,) int64 on the CPU, so that a GPU is not waited for.
        """
        inputs = resize(normalize(images, self._spec), self._networks[0].image_size)
        found = []
        for network, of_classes in zip(self._networks, self._gradients, strict=True):
            embedding = network.embed(inputs).float()
            with torch.autocast(self._device.type, enabled=False):
                found.append(gradient_similarity(embedding, network.classifier(embedding), labels, of_classes))
        return torch.stack(found).mean(dim=0)


def gradient_similarity(embedding: Tensor, logits: Tensor, labels: Tensor, gradients: Tensor) -> Tensor:
    """(n,) float32 in [-1, 1]: the cosine of each image's gradient in a linear layer and that of its class.

    embedding: (n, F), the layer's input. logits: (n, C), its output. labels: (n,) int64 on the CPU. gradients:
    (C, C, F + 1), those of each class. The cross-entropy's gradient is the outer product of (softmax - one-hot) and
    (embedding, 1), so its inner product with a matrix and its norm follow without computing it.
    """
    order = labels.argsort(stable=True)
    present, counts = labels.unique(return_counts=True)
    ordered, sizes = upload(order, embedding.device), counts.tolist()
    by_class = zip(present.tolist(), embedding[ordered].split(sizes), logits[ordered].split(sizes), strict=True)
    found = []
    for label, some, of_some in by_class:
        errors, inputs = _factors(some, of_some, label)
        of_class = upload(gradients[label], embedding.device).float()
        product = ((errors @ of_class) * inputs).sum(dim=1)
        found.append(product / (errors.norm(dim=1) * inputs.norm(dim=1) * of_class.norm()).clamp_min(1e-20))
    return torch.cat(found)[upload(order.argsort(), embedding.device)]


def find_influence(
    dataset: ImageSet,
    spec: DatasetSpec,
    *,
    dataset_sha256: str,
    epochs: int = 4,
    device: torch.device | str = "cpu",
    progress: Listener = ignore,
) -> Influence:
    """The influence on a network that is trained on a dataset's real images, once; then it is kept in the cache.

    dataset: the training split, of which at most 10,000 images are taken, as many of each class. dataset_sha256: its hash.
    epochs: of the training; the networks after 1, 2, 4, ... of them are the checkpoints.
    The cache takes 2 K C^2 (F + 1) bytes, 41 MB a checkpoint for CIFAR-100.
    Raises UsageError for a class without images.
    """
    device = torch.device(device)
    side = min(_SIDE, spec.image_size // _SIDE_MULTIPLE * _SIDE_MULTIPLE)
    network = build_network(OFFICIAL_NETWORK, spec.num_classes, side, seed=_SEED)
    assert isinstance(network, ConvNet)

    def train() -> dict[str, Tensor]:
        rows = _balanced(dataset.labels, spec)
        pixels = resize(normalize(upload(dataset.images[rows], device), spec), side)
        trained = copy.deepcopy(network).to(device)
        return _checkpoints(trained, pixels, dataset.labels[rows], epochs, progress)

    key = cache_key((_VERSION, dataset_sha256, spec.mean, spec.std, _IMAGES, epochs, _SEED))
    path, what = cache_folder() / _CACHE_FOLDER / f"{spec.name}-{key}.safetensors", f"the influence of {spec.name}'s images"
    kept = cached_tensors(path, ("parameters", "gradients"), what, train)
    networks = [copy.deepcopy(network).to_empty(device=device) for _ in kept["parameters"]]
    for checkpoint, parameters in zip(networks, kept["parameters"], strict=True):
        load_flat_parameters(checkpoint, parameters)
    return Influence(networks, kept["gradients"], spec, device)


def _checkpoints(network: ConvNet, pixels: Tensor, labels: Tensor, epochs: int, progress: Listener) -> dict[str, Tensor]:
    """The parameters, (K, P) float32, of each checkpoint of a training, and its gradients, (K, C, C, F + 1) bfloat16.

    network, pixels: on the device. labels: on the CPU.
    """
    settings = TrainingSettings(epochs - 1, min(_BATCH_SIZE, len(pixels)), augment=False)
    labels_there = upload(labels, pixels.device)
    run = TrainingRun(network, pixels, labels_there, settings, torch.Generator().manual_seed(_SEED))
    parameters, gradients = [], []
    total = epochs * len(labels)
    task = "Training the network of influence guidance (once)"
    progress(Progress(task, 0, total, "images"))
    while not run.finished:
        run.epoch()
        if run.epochs_done.bit_count() == 1:  # a power of two
            present = copy.deepcopy(network).eval()  # the embedder may stop its gradients
            embed = build_embedder(present, settings.batch_size)
            # A GPU is waited for, because the run's own stream would not wait with its next step for the copy.
            parameters.append(flat_parameters(present).cpu())
            # Half the size; rounding hardly turns so long a vector.
            gradients.append(class_gradients(embed, present.classifier, pixels, labels).bfloat16())
        progress(Progress(task, run.epochs_done * len(labels), total, "images"))
    run.close()
    return {"parameters": torch.stack(parameters), "gradients": torch.stack(gradients)}


@torch.no_grad()
def class_gradients(embed: Embedder, classifier: nn.Linear, pixels: Tensor, labels: Tensor) -> Tensor:
    """(C, C, F + 1) float32: [c] is the mean gradient of the cross-entropy of class c's images in the linear layer.

    embed: makes the layer's input. pixels: (N, 3, S, S), normalized. labels: (N,) int64 on the CPU, at least one of each
    class.
    """
    classes = classifier.out_features
    means = torch.zeros(classes, classes, classifier.in_features + 1, device=pixels.device)
    for label in range(classes):
        rows = (labels == label).nonzero()[:, 0]
        for part in rows.split(_IMAGES_AT_ONCE):
            embedding = embed(pixels[upload(part, pixels.device)])
            errors, inputs = _factors(embedding, classifier(embedding), label)
            means[label] += errors.T @ inputs / len(rows)
    return means


def _factors(embedding: Tensor, logits: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """The factors of the gradients of images of a class: (n, C), softmax minus one-hot, and (n, F + 1), the embedding and 1."""
    target = torch.zeros(logits.shape[1], device=logits.device)
    target[label] = 1
    errors = logits.float().softmax(dim=1) - target
    return errors, F.pad(embedding.float(), (0, 1), value=1.0)


def _balanced(labels: Tensor, spec: DatasetSpec) -> Tensor:
    """Rows of the images to train on, as many of each class and at least one, drawn at random and in the store's order."""
    generator = torch.Generator().manual_seed(_SEED)
    each = max(1, _IMAGES // spec.num_classes)
    chosen = []
    for label in range(spec.num_classes):
        rows = (labels == label).nonzero()[:, 0]
        if not len(rows):
            raise UsageError(f"Influence guidance needs training images of every class, and {spec.name} has none of {label}.")
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:each]])
    return torch.cat(chosen).sort().values
