import pytest
import torch
import torch.nn.functional as F

from ddkit.challenge import CIFAR100, TINYIMAGENET
from ddkit.checks.normalization import judge_normalization
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
    verdict = judge_normalization(images, spec)
    return {verdict.finding.code: verdict.finding.level} if verdict else {}


@pytest.mark.parametrize("spec", [CIFAR100, TINYIMAGENET])
def test_right_constants_are_recognized_without_real_images(spec):
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


def test_message_gives_the_evidence_and_the_right_constants():
    finding = judge_normalization(with_constants(pictures(), *CIFAR10), CIFAR100).finding
    assert "CIFAR-10" in finding.message and "100.0% of the values" in finding.message
    assert "0.5071, 0.4866, 0.4409" in finding.message


@pytest.mark.parametrize(("mean", "std", "code"), [((0, 0, 0), (1, 1, 1), "N001"), (*CIFAR10, "N004")])
def test_moments_tell_constants_of_values_that_are_neither_8_bit_nor_clipped(mean, std, code):
    noise = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert found(with_constants(denormalize(noise, CIFAR100), mean, std)) == {code: "warning"}


def test_values_of_no_known_scale_are_warned_of():
    images = normalize(pictures(), CIFAR100)
    assert found(images * 40 + 3.3) == {"N004": "error"}
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert found((images + noise) * 40 + 3.3) == {"N009": "warning"}


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
        ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_another_rounding_of_the_constants_is_a_remark(mean, std):
    assert found(with_constants(pictures(), mean, std)) == {"N005": "info"}


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_optimized_sets_of_any_contrast_draw_no_alarm(strength):
    random = torch.Generator().manual_seed(2)
    images = normalize(pictures(), CIFAR100) * strength
    assert found(images + 0.5 * torch.randn(images.shape, generator=random)) == {}


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_reshaped_channels_last_images_are_n007(noise):
    images = normalize(pictures(), CIFAR100)
    images += noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    squeezed = images.permute(0, 2, 3, 1).reshape(images.shape)
    assert found(squeezed) == {"N007": "error"}


def test_noisy_images_without_normalization_are_a_warning():
    images = pictures().float() / 255
    images += 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    assert found(images) == {"N001": "warning"}
    assert found(normalize(images, CIFAR100)) == {}


C100, TINY = CIFAR100.mean, TINYIMAGENET.mean
ONES, ZEROS = (1.0,) * 3, (0.0,) * 3
# How 8-bit pixels in units of [0, 1] became values, as (x - mean) / std, and what must be found.
WRONG_8_BIT = {
    "half deviations": (CIFAR100, (0.5071, 0.4867, 0.4408), (0.2009, 0.1984, 0.2023), "N004"),
    "half deviations, other rounding": (CIFAR100, (0.5070, 0.4865, 0.4409), (0.2011, 0.1987, 0.2025), "N004"),
    "CIFAR-10": (CIFAR100, *CIFAR10, "N004"),
    "CIFAR-10, pixel deviations": (CIFAR100, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "N004"),
    "CIFAR-10, three digits": (CIFAR100, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262), "N004"),
    "CLIP": (CIFAR100, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "N004"),
    "SVHN": (CIFAR100, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), "N004"),
    "no list": (CIFAR100, (0.4321, 0.5432, 0.3217), (0.2123, 0.3087, 0.1955), "N004"),
    "no list, wide": (CIFAR100, (0.9, 0.1, -0.3), (1.7, 0.033, 0.4), "N004"),
    "one deviation wrong": (CIFAR100, C100, (0.2673, 0.2564, 0.2662), "N004"),
    "mean only": (CIFAR100, C100, ONES, "N004"),
    "deviation only": (CIFAR100, ZEROS, CIFAR100.std, "N004"),
    "variance": (CIFAR100, C100, tuple(s * s for s in CIFAR100.std), "N004"),
    "twice": (CIFAR100, tuple(m + s * m for m, s in zip(*CIFAR10, strict=True)), tuple(s * s for s in CIFAR10[1]), "N004"),
    "[-1, 1], then right": (CIFAR100, tuple(0.5 + 0.5 * m for m in C100), tuple(0.5 * s for s in CIFAR100.std), "N004"),
    "pixels in [0, 255]": (CIFAR100, tuple(m / 255 for m in C100), tuple(s / 255 for s in CIFAR100.std), "N004"),
    "divided by 255 twice": (CIFAR100, tuple(255 * m for m in C100), tuple(255 * s for s in CIFAR100.std), "N004"),
    "red for all": (CIFAR100, (C100[0],) * 3, (CIFAR100.std[0],) * 3, "N004"),
    "BGR constants": (CIFAR100, C100[::-1], CIFAR100.std[::-1], "N006"),
    "gray constants": (CIFAR100, (0.481,) * 3, (0.239,) * 3, "N004"),
    "[0, 1]": (CIFAR100, ZEROS, ONES, "N001"),
    "[0, 255]": (CIFAR100, ZEROS, (1 / 255,) * 3, "N003"),
    "[0, 65025]": (CIFAR100, ZEROS, (1 / 65025,) * 3, "N004"),
    "tiny, own": (TINYIMAGENET, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), "N004"),
    "tiny, own pixel deviations": (TINYIMAGENET, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), "N004"),
    "tiny, [-1, 1]": (TINYIMAGENET, (0.5,) * 3, (0.5,) * 3, "N002"),
    "tiny, CIFAR-100": (TINYIMAGENET, C100, CIFAR100.std, "N004"),
    "tiny, mean only": (TINYIMAGENET, TINY, ONES, "N004"),
    "tiny, no list": (TINYIMAGENET, (0.47, 0.449, 0.4), (0.229, 0.224, 0.225), "N004"),
    "tiny, blue for all": (TINYIMAGENET, (TINY[2],) * 3, (TINYIMAGENET.std[2],) * 3, "N004"),
}


def converted(images, message):
    """What the message's own command makes of the tensor."""
    return eval(message.split("Convert the file's tensor: ")[1], {"tensor": images, "torch": torch})  # noqa: S307


@pytest.mark.slow
@pytest.mark.parametrize("variant", WRONG_8_BIT)
def test_any_wrong_constants_of_real_images_are_solved_and_can_be_converted(variant, request):
    spec, mean, std, code = WRONG_8_BIT[variant]
    pixels = request.getfixturevalue(f"{spec.name}_images")
    pixels = pixels[:: spec.image_size // 32]  # of larger images fewer tell as much
    images = with_constants(pixels, mean, std)
    finding = judge_normalization(images, spec).finding
    assert (finding.level, finding.code) == ("error", code)
    right = converted(images, finding.message)
    torch.testing.assert_close(right, normalize(pixels, spec), rtol=0, atol=1e-3)
    assert found(right, spec) == {"N010": "info"}


@pytest.mark.slow
def test_constants_of_real_images_are_found_in_half_precision_and_with_values_changed(cifar100_images):
    images = with_constants(cifar100_images, (0.4321, 0.5432, 0.3217), (0.2123, 0.3087, 0.1955))
    half = judge_normalization(images.half().float(), CIFAR100).finding
    assert half.code == "N004" and "mean 0.4321, 0.5432, 0.3217 and std 0.2123, 0.3087, 0.1955" in half.message
    images[::200] = 0  # five blank images
    assert found(images) == {"N004": "error"}
    assert found(normalize(cifar100_images, CIFAR100).half().float()) == {"N010": "info"}


@pytest.mark.slow
def test_bgr_images_with_bgr_constants_are_flipped_back(cifar100_images):
    right = normalize(cifar100_images, CIFAR100)
    finding = judge_normalization(right.flip(1), CIFAR100).finding
    assert finding.code == "N006"
    assert torch.equal(converted(right.flip(1), finding.message), right)


@pytest.mark.slow
@pytest.mark.parametrize("contrast", [0.3, 0.7, 1.4, 2.5])
def test_a_change_of_contrast_of_real_images_is_a_remark(cifar100_images, contrast):
    unit = cifar100_images.float() / 255
    assert found(normalize((unit - 0.5) * contrast + 0.5, CIFAR100)) == {"N011": "info"}
    assert found(normalize(unit, CIFAR100) * contrast) == {"N011": "info"}


def whiten(images, epsilons):
    """Published whitening, as kornia's ZCAWhitening.fit and forward do it, once for each epsilon."""
    flat = images.flatten(1)
    centered = flat - flat.mean(dim=0, keepdim=True)
    # The products of images have the same nonzero eigenvalues as those of pixels, and there are fewer.
    variances, vectors = torch.linalg.eigh(centered @ centered.T / (len(flat) - 1))
    projected = vectors.T @ centered
    for epsilon in epsilons:
        yield (vectors @ (projected / (variances.clamp_min(0) + epsilon).sqrt()[:, None])).view_as(images)


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [False, True])
def test_whitened_real_images_are_found_at_any_strength_and_scale(cifar100_images, normalized):
    images = normalize(cifar100_images, CIFAR100) if normalized else cifar100_images.float() / 255
    strong, middle, weak = whiten(images, (1e-3, 0.01, 0.1))
    for whitened in (2.5 * weak, strong / strong.std()) if normalized else (strong, middle, weak):
        assert found(whitened) == {"N012": "error"}


@pytest.mark.slow
@pytest.mark.parametrize("change", ["blurred", "noisy", "contrast", "flat colors removed"])
def test_pictures_that_are_not_whitened_draw_no_such_alarm(cifar100_images, change):
    images = normalize(cifar100_images, CIFAR100)
    random = torch.Generator().manual_seed(0)
    changed = {
        "blurred": lambda: F.avg_pool2d(images, 3, 1, 1),
        "noisy": lambda: images + 1.5 * torch.randn(images.shape, generator=random),
        "contrast": lambda: 2 * images + 0.3 * torch.randn(images.shape, generator=random),
        "flat colors removed": lambda: images - images.mean(dim=(2, 3), keepdim=True),
    }[change]()
    assert "N012" not in found(changed)


def test_noise_is_not_called_whitened():
    assert found(torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))) == {}
