"""Each augmentation against pairs recorded from the official code, and the draws against the protocol's ranges."""

import math

import pytest
import torch

from ddkit.challenge import AUGMENT_STRATEGIES
from ddkit.network import augment

PARAMETERS = {
    "scale": ("sx", "sy"),
    "rotate": ("theta_rad",),
    "flip": ("flipped",),
    "brightness": ("uniform",),
    "saturation": ("uniform",),
    "contrast": ("uniform",),
    "crop": ("translation_x", "translation_y"),
    "cutout": ("offset_x", "offset_y"),
}


def random_images(n=4, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("operation", PARAMETERS)
def test_operations_agree_with_the_official_code(augment_golden, size, operation):
    golden = augment_golden(size)
    if f"{operation}.output" not in golden:
        pytest.skip(f"{operation} at {size} pixels is only in the full recording")
    arguments = [golden[f"{operation}.{name}"] for name in PARAMETERS[operation]]
    output = getattr(augment, operation)(golden["input"], *arguments)
    torch.testing.assert_close(output, golden[f"{operation}.output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [32, 64])
def test_color_is_brightness_saturation_contrast_in_this_order(augment_golden, size):
    golden = augment_golden(size)
    if "color.output" not in golden:
        pytest.skip(f"color at {size} pixels is only in the full recording")
    uniforms = [golden[f"color.uniform_{name}"] for name in ("brightness", "saturation", "contrast")]
    output = augment.apply("color", golden["input"], uniforms)
    torch.testing.assert_close(output, golden["color.output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, crop_shift, cutout_offsets", [(32, 4, 33), (64, 8, 65)])
def test_draws_lie_in_the_protocols_ranges_and_reach_their_ends(size, crop_shift, cutout_offsets):
    def drawn(strategy):
        return augment.draw(strategy, 20_000, size, torch.Generator().manual_seed(1))

    for shift in drawn("crop"):
        assert shift.unique().tolist() == list(range(-crop_shift, crop_shift + 1))
    for offset in drawn("cutout"):
        assert offset.unique().tolist() == list(range(cutout_offsets))
    for factor in drawn("scale"):
        assert factor.min() == pytest.approx(1 / 1.2, abs=1e-3) and factor.max() == pytest.approx(1.2, abs=1e-3)
    (theta,) = drawn("rotate")
    limit = math.radians(15)
    assert theta.min() == pytest.approx(-limit, abs=1e-3) and theta.max() == pytest.approx(limit, abs=1e-3)
    (flipped,) = drawn("flip")
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.02)
    for uniform in drawn("color"):
        assert 0 <= uniform.min() < 1e-3 and 1 - 1e-3 < uniform.max() < 1


def test_parameters_are_drawn_per_image_and_independently():
    sx, sy = augment.draw("scale", 100, 32, torch.Generator().manual_seed(0))
    assert len(sx.unique()) == 100
    assert not torch.equal(sx, sy)


def test_every_strategy_comes_up_equally_often():
    generator = torch.Generator().manual_seed(0)
    drawn = [augment.draw_strategy(generator) for _ in range(3000)]
    for strategy in AUGMENT_STRATEGIES:
        assert drawn.count(strategy) == pytest.approx(500, abs=100)


def test_random_augment_repeats_with_its_generator_and_leaves_its_input():
    images = random_images()
    before = images.clone()
    outputs = [
        [augment.random_augment(images, generator) for _ in range(10)]
        for generator in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert torch.equal(images, before)


def test_crop_moves_x_along_rows_and_y_along_columns():
    images = torch.arange(64.0).view(1, 1, 8, 8) + 1
    moved = augment.crop(images, torch.tensor([2]), torch.tensor([-1]))
    assert moved[0, 0, 0, 1] == images[0, 0, 2, 0]
    assert moved[0, 0, 6:].eq(0).all() and moved[0, 0, :, 0].eq(0).all()
