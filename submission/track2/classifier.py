"""The network that says which class each sample shows: the challenge's ConvNet, trained on real images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sampling import upload

WIDTH, BLOCKS = 128, 3
IMAGES_AT_ONCE = 256
IMAGES_AT_ONCE_ON_CPU = 16  # whose maps stay in a core's caches, which takes half the time


class Classifier:
    """Call it with pixels to get the probability that it gives to each class.

    folder: holds config.json with the side of its images, and classifier.safetensors. entry: the model folder's entry.json.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], device: str) -> None:
        self._side = json.loads((folder / "config.json").read_text(encoding="utf-8"))["image_size"]
        self._network = ConvNet(entry["num_classes"], self._side).to(device)
        self._network.load_state_dict(load_file(folder / "classifier.safetensors"))
        self._mean, self._std = (torch.tensor(entry[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) uint8 on the CPU -> (n, classes) float16 in [0, 1] on the CPU."""
        at_once = IMAGES_AT_ONCE_ON_CPU if self._mean.device.type == "cpu" else IMAGES_AT_ONCE
        logits = torch.cat([self._logits(some) for some in pixels.split(at_once)])
        return logits.softmax(1).half().cpu()

    def _logits(self, pixels: Tensor) -> Tensor:
        images = (upload(pixels, self._mean.device).float() / 255 - self._mean) / self._std
        if images.shape[-1] != self._side:
            size = (self._side, self._side)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        return self._network(images)


class ConvNet(nn.Module):
    """Three blocks of convolution, instance norm, ReLU and average pooling, then one linear layer."""

    def __init__(self, num_classes: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block in range(BLOCKS):
            channels = WIDTH if block else 3
            layers += [nn.Conv2d(channels, WIDTH, 3, padding=1), nn.GroupNorm(WIDTH, WIDTH), nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(WIDTH * (side // 2**BLOCKS) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))
