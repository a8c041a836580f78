from __future__ import annotations

import pytest
import torch

from ddkit.errors import ComputeError
from ddkit.metrics.frechet import frechet_distance


def draws(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_set_has_no_distance_to_itself():
    features = draws(200, 8)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_a_shift_counts_with_its_squared_length():
    features = draws(300, 5)
    shift = torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0])
    assert frechet_distance(features, features + shift) == pytest.approx(25, abs=1e-4)


def test_in_one_dimension_it_is_the_difference_of_means_and_deviations():
    a, b = draws(500, 1), 3 * draws(400, 1, seed=1) + 2
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-4)


def test_fewer_images_than_dimensions_still_give_a_finite_number():
    assert 0 < frechet_distance(draws(10, 64), draws(10, 64, seed=1)) < 1000


def test_values_that_are_no_numbers_are_refused():
    broken = draws(10, 4)
    broken[3, 2] = torch.nan
    with pytest.raises(ComputeError, match="NaN or infinite"):
        frechet_distance(draws(10, 4), broken)
