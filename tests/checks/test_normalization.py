import pytest
import torch
import torch.nn.functional as F

from ddkit.challenge import CIFAR100, TINYIMAGENET
from ddkit.checks.normalization import normalization_findings
from ddkit.data.images import denormalize, normalize, to_uint8

CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pictures(spec=CIFAR100, count=60):
    """Smooth random uint8 images with the mean and spread of the dataset's own."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 4, 4, generator=random)
    smooth = F.interpolate(coarse, size=spec.image_size, mode="bilinear")
    smooth = (smooth - smooth.mean((0, 2, 3), keepdim=True)) / smooth.std((0, 2, 3), keepdim=True)
    return to_uint8(denormalize(smooth, spec))


def with_constants(images, mean, std):
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return (unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def found(images, spec=CIFAR100):
    return {finding.code: finding.level for finding in normalization_findings(images, spec, "set.pt")}


@pytest.mark.parametrize("spec", [CIFAR100, TINYIMAGENET])
def test_the_right_constants_are_recognized_without_real_images(spec):
    assert found(normalize(pictures(spec), spec), spec) == {"N010": "info"}


@pytest.mark.parametrize(
    ("mean", "std", "code"),
    [
        ((0, 0, 0), (1, 1, 1), "N001"),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "N002"),
        ((0, 0, 0), (1 / 255, 1 / 255, 1 / 255), "N003"),
        (*CIFAR10, "N004"),
        (*IMAGENET, "N004"),
        (CIFAR100.mean[::-1], CIFAR100.std[::-1], "N006"),
    ],
)
@pytest.mark.parametrize("eight_bit", [True, False])
def test_other_constants_are_named_for_8_bit_and_for_clipped_images(mean, std, code, eight_bit):
    images = pictures() if eight_bit else (pictures().float() / 255 * 1.001 - 0.0005).clamp(0, 1)
    assert found(with_constants(images, mean, std)) == {code: "error"}


def test_the_message_gives_the_evidence_and_the_right_constants():
    [finding] = normalization_findings(with_constants(pictures(), *CIFAR10), CIFAR100, "set.pt")
    assert "CIFAR-10" in finding.message and "100.0% of the values" in finding.message
    assert "0.5071, 0.4866, 0.4409" in finding.message


@pytest.mark.parametrize(("mean", "std", "code"), [((0, 0, 0), (1, 1, 1), "N001"), (*CIFAR10, "N004")])
def test_moments_tell_where_values_are_neither_8_bit_nor_clipped(mean, std, code):
    noise = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert found(with_constants(denormalize(noise, CIFAR100), mean, std)) == {code: "warning"}


def test_values_of_no_known_scale_are_warned_of():
    assert found(normalize(pictures(), CIFAR100) * 40 + 3.3) == {"N009": "warning"}


def test_another_rounding_of_the_constants_is_no_fault():
    images = with_constants(pictures(), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert found(images) == {"N005": "info"}


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_optimized_sets_of_any_contrast_draw_no_alarm(strength):
    random = torch.Generator().manual_seed(2)
    images = normalize(pictures(), CIFAR100) * strength
    assert found(images + 0.5 * torch.randn(images.shape, generator=random)) == {}


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_channels_last_that_were_only_reshaped(noise):
    images = normalize(pictures(), CIFAR100)
    images += noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    squeezed = images.permute(0, 2, 3, 1).reshape(images.shape)
    assert found(squeezed) == {"N007": "error"}


def test_noisy_images_that_were_never_normalized():
    images = pictures().float() / 255
    images += 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    assert found(images) == {"N001": "warning"}
    assert found(normalize(images, CIFAR100)) == {}
