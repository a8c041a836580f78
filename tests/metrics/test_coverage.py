from __future__ import annotations

import pytest
import torch

from ddkit.metrics.coverage import density_and_coverage, nearest, within_class_diversity


def draws(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_by_hand_on_a_line():
    # The fifth nearest others lie 31, 30, 28, 24, 16, 31 and 62 away. One generated at 34 lies so near to 31 and 63 only.
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0], [31.0], [63.0]])
    assert density_and_coverage(real, torch.tensor([[34.0]])) == (2 / 5, 2 / 7)


def test_the_same_distribution_is_dense_and_covered():
    density, coverage = density_and_coverage(draws(1500), draws(1500, seed=1))
    assert density == pytest.approx(1, abs=0.1)
    # Naeem et al. 2020, equation 10: 1 - 1/2^k in expectation for equal sizes.
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.02)


def test_one_image_repeated_covers_little_however_often():
    density, coverage = density_and_coverage(draws(500), torch.zeros(500, 6))
    assert density > 0.5
    assert 0 < coverage < 0.05


def test_a_far_away_set_has_neither():
    density, coverage = density_and_coverage(draws(300), draws(300, seed=1) + 100)
    assert (density, coverage) == (0, 0)


def test_diversity_is_the_mean_distance_within_classes():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    assert within_class_diversity(features, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(3.0)


def test_single_images_have_no_diversity():
    assert within_class_diversity(draws(3), torch.tensor([0, 1, 2])) is None


def test_a_copy_is_its_own_nearest_at_no_distance():
    real = draws(700)
    places = torch.tensor([3, 600, 41])
    indices, distances = nearest(real[places], real)
    assert indices.tolist() == places.tolist()
    assert distances.max() < 1e-5
    assert (nearest(real[places], real, 2)[1] > 0.1).all(), "the nearest other one"
