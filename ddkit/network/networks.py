"""Networks by name: the official one, and others for cross-architecture numbers, which are not official."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddkit.errors import UsageError, did_you_mean
from ddkit.network.convnet import ConvNet

OFFICIAL_NETWORK = "convnet"
_INITIALIZING = threading.Lock()


def build_network(name: str, num_classes: int, image_size: int, *, seed: int) -> nn.Module:
    """The network `name` (one of NETWORKS) with random weights drawn from `seed`.

    The initialization is PyTorch's default; in the blocks of residual networks it is torchvision's.
    Raises UsageError that offers the nearest name if there is no such network, and for an image size that it cannot take.
    """
    if name not in NETWORKS:
        raise UsageError(f"Unknown network '{name}'.", did_you_mean(name, tuple(NETWORKS)))
    # Modules initialize themselves from the global generator, whose state is restored; one thread at a time.
    with _INITIALIZING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # which leaves those of GPUs alone
        return NETWORKS[name](num_classes, image_size)


def _instance_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels, channels)


def _resnet(blocks: list[int], pooling: bool = False) -> Callable[[int, int], nn.Module]:
    """A torchvision residual network with instance norm.

    pooling: average pooling ("AP") in place of strided convolution.
    Up to 64 pixels the stem is a 3x3 convolution of stride 1 without pooling, as in the cross-architecture tables of
    arXiv 2006.05929, arXiv 2102.08259 and later work. The last pooling is global; those papers differ there. Larger
    images have torchvision's stem, or, with pooling, that of arXiv 2205.14959 and arXiv 2311.15529: a 3x3 convolution
    and 2x2 pooling up to 128 pixels, a 7x7 convolution and 4x4 pooling above.
    """

    def build(num_classes: int, image_size: int) -> nn.Module:
        from torchvision.models.resnet import BasicBlock, ResNet

        network = ResNet(BasicBlock, blocks, num_classes=num_classes, norm_layer=_instance_norm)
        if image_size <= 64 or pooling:
            kernel, pool = (3, 1) if image_size <= 64 else (3, 2) if image_size <= 128 else (7, 4)
            network.conv1 = nn.Conv2d(3, 64, kernel, padding=kernel // 2, bias=False)
            network.maxpool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        for block in network.modules() if pooling else ():
            # Every 3x3 convolution of stride 2 gets stride 1, with pooling after its norm and ReLU; the 1x1 ones likewise.
            if isinstance(block, BasicBlock) and block.downsample is not None and block.conv1.stride != (1, 1):
                block.conv1.stride = (1, 1)
                block.conv2 = nn.Sequential(nn.AvgPool2d(2), block.conv2)
                block.downsample[0].stride = (1, 1)
                block.downsample.insert(1, nn.AvgPool2d(2))
        return network

    return build


class _AlexNet(nn.Module):
    """The small-image AlexNet of the code of arXiv 2006.05929, with instance norm, which that code does not have."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, kernel, pools in ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)):
            layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), _instance_norm(width), nn.ReLU(True)]
            layers += [nn.MaxPool2d(2)] if pools else []
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (image_size // 8) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


def _vgg11(num_classes: int, image_size: int) -> nn.Module:
    """VGG-11's convolutions from torchvision with instance norm, and one linear layer after global average pooling.

    Raises UsageError for images below 32 pixels, which its five poolings leave nothing of.
    """
    if image_size < 32:
        raise UsageError(f"vgg11 needs images of 32 pixels or more, got {image_size}.", "Choose another --network.")
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["A"], batch_norm=True)
    for place, layer in enumerate(features):
        if isinstance(layer, nn.BatchNorm2d):
            features[place] = _instance_norm(layer.num_features)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    OFFICIAL_NETWORK: ConvNet,
    "resnet18": _resnet([2, 2, 2, 2]),
    "resnet_ap10": _resnet([1, 1, 1, 1], pooling=True),
    "resnet18_ap": _resnet([2, 2, 2, 2], pooling=True),
    "alexnet": _AlexNet,
    "vgg11": _vgg11,
}
