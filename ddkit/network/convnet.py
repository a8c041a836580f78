"""The challenge's fixed network."""

from __future__ import annotations

from torch import Tensor, nn

from ddkit.challenge import NETWORK_DEPTH, NETWORK_WIDTH
from ddkit.errors import UsageError

_SHRINK = 2**NETWORK_DEPTH  # every block halves the side


class ConvNet(nn.Module):
    """Three blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, then one linear layer.

    state_dict keys are those of the official network (PROTOCOL.md): `features.{0,1,4,5,8,9}.{weight,bias}` and
    `classifier.{weight,bias}`; PyTorch's default initialization. Depth and width are the same for every image size.
    Raises UsageError unless `image_size` is a positive multiple of 8.
    """

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        if image_size < _SHRINK or image_size % _SHRINK:
            raise UsageError(
                f"The network needs images whose side is a multiple of {_SHRINK} pixels, got {image_size}.",
                "Prepare the dataset with another --image-size.",
            )
        self.num_classes = num_classes
        self.image_size = image_size
        layers: list[nn.Module] = []
        channels = 3
        for _ in range(NETWORK_DEPTH):
            layers += [
                nn.Conv2d(channels, NETWORK_WIDTH, kernel_size=3, padding=1),
                # One group per channel is instance norm, here with an affine map as in the official network.
                nn.GroupNorm(NETWORK_WIDTH, NETWORK_WIDTH),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
            channels = NETWORK_WIDTH
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(NETWORK_WIDTH * (image_size // _SHRINK) ** 2, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalized float -> (N, 128 * (S / 8)^2), the flattened map before the linear layer."""
        return self.features(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) normalized float -> (N, num_classes) logits."""
        return self.classifier(self.embed(images))
