"""Each augmentation against pairs recorded from the official code, and the draws against the protocol's ranges."""

import math

import pytest
import torch
from torch.nn import functional as F

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


def plain_sample(images, matrices):
    return F.grid_sample(images, F.affine_grid(matrices, images.shape, align_corners=False), align_corners=False)


def plain_scale(images, sx, sy):
    return plain_sample(images, torch.stack([torch.tensor([[x, 0, 0], [0, y, 0]]) for x, y in zip(sx, sy, strict=True)]))


def plain_rotate(images, theta):
    cos, sin = torch.cos(theta), torch.sin(theta)
    return plain_sample(images, torch.stack([torch.tensor([[c, -s, 0], [s, c, 0]]) for c, s in zip(cos, sin, strict=True)]))


def plain_flip(images, flipped):
    return torch.stack([image.flip(2) if mirror else image for image, mirror in zip(images, flipped, strict=True)])


def plain_brightness(images, uniform):
    return torch.stack([image + (u - 0.5) for image, u in zip(images, uniform, strict=True)])


def plain_saturation(images, uniform):
    means = images.mean(dim=1, keepdim=True)
    return torch.stack([(image - m) * (2 * u) + m for image, m, u in zip(images, means, uniform, strict=True)])


def plain_contrast(images, uniform):
    means = images.mean(dim=(1, 2, 3))
    return torch.stack([(image - m) * (u + 0.5) + m for image, m, u in zip(images, means, uniform, strict=True)])


def plain_crop(images, tx, ty):
    output = torch.zeros_like(images)
    size = images.shape[-1]
    for n, (x, y) in enumerate(zip(tx.tolist(), ty.tolist(), strict=True)):
        for i in range(max(0, -x), min(size, size - x)):
            for j in range(max(0, -y), min(size, size - y)):
                output[n, :, i, j] = images[n, :, i + x, j + y]
    return output


def plain_cutout(images, ox, oy):
    output = images.clone()
    size = images.shape[-1]
    side = int(size * 0.5 + 0.5)
    for n, (x, y) in enumerate(zip(ox.tolist(), oy.tolist(), strict=True)):
        for i in range(x - side // 2, x + side - side // 2):
            for j in range(y - side // 2, y + side - side // 2):
                output[n, :, min(max(i, 0), size - 1), min(max(j, 0), size - 1)] = 0
    return output


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("operation", PARAMETERS)
def test_operation_agrees_with_the_recording_of_the_official_code(augment_golden, size, operation):
    golden = augment_golden(size)
    if f"{operation}.output" not in golden:
        pytest.skip(f"{operation} at {size} pixels is only in the full recording")
    arguments = [golden[f"{operation}.{name}"] for name in PARAMETERS[operation]]
    output = getattr(augment, operation)(golden["input"], *arguments)
    # PyTorch's sampling grid is rounded differently by processors of different kinds, and so is the official code's.
    bound = 4e-5 if operation in ("scale", "rotate") and size == 64 else 1e-5
    torch.testing.assert_close(output, golden[f"{operation}.output"], atol=bound, rtol=0)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("operation", PARAMETERS)
def test_operation_agrees_with_the_protocols_formula_on_the_same_machine(size, operation):
    images = random_images(4, size)
    generator = torch.Generator().manual_seed(1)
    strategy = "color" if operation in ("brightness", "saturation", "contrast") else operation
    arguments = augment.draw(strategy, len(images), size, generator)[: len(PARAMETERS[operation])]
    output = getattr(augment, operation)(images, *arguments)
    plain = globals()[f"plain_{operation}"](images, *arguments)
    torch.testing.assert_close(output, plain, atol=1e-6, rtol=0)


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
