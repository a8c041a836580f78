import dataclasses

import pytest
import torch

from ddkit.challenge import CIFAR100, TINYIMAGENET
from ddkit.data.images import denormalize, normalize, normalize_, to_uint8


@pytest.mark.parametrize("spec", [CIFAR100, TINYIMAGENET])
def test_pixels_normalized_in_place_are_the_same_bits_and_come_back(spec):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    values = pixels.float()
    assert normalize_(values, spec) is values
    assert torch.equal(values, normalize(pixels, spec))
    assert torch.equal(to_uint8(denormalize(values, spec)), pixels)
    expected = (200 / 255 - spec.mean[1]) / spec.std[1]
    assert values[0, 1].flatten()[200].item() == pytest.approx(expected, abs=1e-5)


def test_values_beyond_black_and_white_are_clamped():
    assert to_uint8(torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.7])).tolist() == [0, 0, 128, 255, 255]


def test_images_normalized_first_in_inference_mode_can_have_gradients_later():
    spec = dataclasses.replace(CIFAR100, mean=(0.123, 0.456, 0.789))
    with torch.inference_mode():
        normalize(torch.zeros(1, 3, 4, 4), spec)
    images = torch.zeros(1, 3, 4, 4, requires_grad=True)
    (normalize(images, spec) * images).sum().backward()
    assert images.grad.isfinite().all()
