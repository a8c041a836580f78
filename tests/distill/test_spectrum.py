"""Weighing gradients by the spectrum of pictures, against whitening worked out by the covariance itself."""

import pytest
import torch

from ddkit.distill.spectrum import Spectrum

SIDE = 6


def draw(count, seed):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def waves():
    """(S, S): the slowest first, of length one."""
    places = torch.arange(SIDE)
    rows = [torch.cos(torch.pi * k * (places + 0.5) / SIDE) for k in range(SIDE)]
    return torch.stack([row / row.norm() for row in rows])


@pytest.fixture
def pictures():
    """Uncorrelated waves: slow ones vary more than fast ones, and light and dark more than colors."""
    rows, across = waves(), torch.arange(1.0, SIDE + 1)
    amplitudes = draw(4000, 1) / (across[:, None] * across)
    colors = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
    colors = colors / colors.norm(dim=1, keepdim=True) * torch.tensor([[3.0], [1], [0.5]])
    return torch.einsum("nahw,ac,hi,wj->ncij", amplitudes, colors, rows, rows)


def test_power_1_multiplies_by_the_covariance(pictures):
    gradients = draw(5, 2)
    covariance = torch.cov(pictures.flatten(1).t(), correction=0)
    expected = (gradients.flatten(1) @ covariance).view_as(gradients) / covariance.diagonal().mean()
    found = Spectrum(pictures, 1.0).weigh(gradients)
    assert (found - expected).norm() < 0.1 * expected.norm()  # by a sample of 4,000, waves are a little correlated


def test_power_0_does_not_change_gradients(pictures):
    gradients = draw(5, 2)
    torch.testing.assert_close(Spectrum(pictures, 0.0).weigh(gradients), gradients)


def test_half_the_power_applied_twice_is_the_whole_power(pictures):
    gradients = draw(5, 2)
    half, whole = Spectrum(pictures, 0.5), Spectrum(pictures, 1.0)
    torch.testing.assert_close(half.weigh(half.weigh(gradients)), whole.weigh(gradients))


def test_each_image_is_weighted_independently(pictures):
    gradients, spectrum = draw(5, 2), Spectrum(pictures, 0.25)
    torch.testing.assert_close(spectrum.weigh(gradients)[2:3], spectrum.weigh(gradients[2:3]))


@pytest.mark.parametrize("pictures", [torch.ones(1, 3, SIDE, SIDE), draw(1, 1).expand(4, -1, -1, -1)], ids=["flat", "alike"])
def test_identical_images_do_not_change_gradients(pictures):
    gradients = draw(5, 2)
    torch.testing.assert_close(Spectrum(pictures, 0.25).weigh(gradients), gradients)


def test_frequencies_that_no_image_has_keep_a_small_weight():
    gray = draw(50, 1)[:, :1].expand(-1, 3, -1, -1)
    gradients = torch.zeros(1, 3, SIDE, SIDE)
    gradients[0, 0], gradients[0, 1] = 1.0, -1.0
    weighed = Spectrum(gray, 0.25).weigh(gradients)
    assert 0 < weighed.norm() < 0.2 * gradients.norm()
    torch.testing.assert_close(weighed / weighed.norm(), gradients / gradients.norm(), atol=1e-3, rtol=0)
