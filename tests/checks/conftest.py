"""Real images: ten training images of each class straight from the archives, and whole stores prepared once."""

import functools
import io
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@functools.cache
def _first_images(path: Path, per_class: int) -> torch.Tensor:
    with zipfile.ZipFile(path) as archive:
        members = defaultdict(list)
        for name in sorted(archive.namelist()):
            _, split, label, *_ = (*name.split("/"), "", "")  # a class of CIFAR-100 is called "train"
            if split == "train" and name.endswith((".webp", ".JPEG")):
                members[label].append(name)
        chosen = [name for label in sorted(members) for name in members[label][:per_class]]
        pictures = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in chosen]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


@pytest.fixture
def cifar100_images(cifar100_zip) -> torch.Tensor:
    """(1000, 3, 32, 32) uint8, class by class."""
    return _first_images(cifar100_zip, 10).clone()


@pytest.fixture
def tinyimagenet_images(tinyimagenet_zip) -> torch.Tensor:
    """(2000, 3, 64, 64) uint8, class by class."""
    return _first_images(tinyimagenet_zip, 10).clone()
