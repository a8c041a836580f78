"""Recognizes the challenge's own test sets by their pixels and labels.

`official_tests.npz` holds ten numbers of each official test image, in the order of the classes: the means of its four
quadrants over all channels, those of its three channels over all pixels, and the three values of the pixel at row 10/64 and
column 13/64 of the image's side. A test set is official if all of this holds:

1. It has as many images of each class as the official one.
2. In each class its images can be paired with the official ones so that in every pair all seven means differ by at most
   3 of 255. One changed or exchanged image, or two exchanged labels, are found.
3. Over all pairs, the values of the single pixels differ by at most 1.9 on average, and by 1.5 when signs count. This finds
   test sets that were shifted, blurred, made brighter by two steps or compressed again with visible losses.
4. Floats lie within 0.05 of whole numbers once the dataset's constants are taken back: other constants are found.

The bounds come from decoding Tiny ImageNet's 10,000 test images in four ways with libjpeg-turbo (exact or fast transform,
smooth or plain upsampling of colors): compared with Pillow's pixels, means differ by up to 3, single pixels by 1.5 on
average, and by 1.3 where signs count. The single pixel lies inside of a JPEG block, where decoders differ least.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddkit.challenge import BATCH_SIZE, DATASETS

_FILE = Path(__file__).with_name("official_tests.npz")
_MEANS = 7  # the first so many numbers of an image
_LARGEST_DIFFERENCE_OF_MEANS = 3.0
_LARGEST_MEAN_DIFFERENCE = 1.9
_LARGEST_MEAN_SIGNED_DIFFERENCE = 1.5


def fingerprint(pixels: Tensor, labels: Tensor) -> np.ndarray:
    """(N, 10) uint8: the numbers of each image that the module's text names, in the order of the classes.

    pixels: (N, 3, S, S) uint8. labels: (N,) int64. The file was written with
    `np.savez_compressed(path, cifar100=fingerprint(pixels, labels), tinyimagenet=...)`.
    """
    side = pixels.shape[-1]
    middle, row, column = side // 2, 10 * side // 64, 13 * side // 64
    numbers = []
    for rows in labels.argsort(stable=True).split(BATCH_SIZE):
        images = pixels[rows].cpu().float()
        quadrants = images.mean(dim=1).unflatten(1, (2, middle)).unflatten(3, (2, middle)).mean(dim=(2, 4))
        numbers.append(torch.cat([quadrants.flatten(1), images.mean(dim=(2, 3)), images[:, :, row, column]], dim=1))
    return torch.cat(numbers).round().to(torch.uint8).numpy()


def is_official(dataset: str, pixels: Tensor, labels: Tensor) -> bool:
    """True if these are the challenge's test images of `dataset` ("cifar100" or "tinyimagenet"), in any order.

    pixels: (N, 3, S, S) uint8. labels: (N,) int64. See the module's text for what counts as the same.
    """
    with np.load(_FILE) as file:
        official = file[dataset].astype(np.float32)
    num_classes = DATASETS[dataset].num_classes
    per_class = len(official) // num_classes
    if labels.bincount(minlength=num_classes).tolist() != [per_class] * num_classes:
        return False
    differences = []
    for rows, theirs in zip(labels.argsort(stable=True).split(per_class), np.split(official, num_classes), strict=True):
        ours = fingerprint(pixels[rows], labels[rows]).astype(np.float32)
        distances = np.abs(ours[:, None, :_MEANS] - theirs[None, :, :_MEANS]).max(axis=2)
        differ = distances > _LARGEST_DIFFERENCE_OF_MEANS
        first, second = linear_sum_assignment(np.where(differ, 1e6, distances))
        if differ[first, second].any():
            return False
        differences.append(ours[first, _MEANS:] - theirs[second, _MEANS:])
    single = np.concatenate(differences)
    signed = np.abs(single.mean(axis=0)).max()
    return bool(np.abs(single).mean() <= _LARGEST_MEAN_DIFFERENCE and signed <= _LARGEST_MEAN_SIGNED_DIFFERENCE)
