"""The averaged weights of the training loop; the loop itself is faced by test_training.py."""

import pytest
import torch
from torch import nn

from ddkit.generator.training.trainer import averaging


def averaged(averages, count, values):
    """What the averages of parameters are that take these values, one step after the other."""
    parameters = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(count)]
    ema = averages(parameters)
    for step in values:
        with torch.no_grad():
            for parameter, value in zip(parameters, step, strict=True):
                parameter.fill_(value)
        ema.step(parameters)
    return [parameter.item() for parameter in ema.shadow_params]


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_profiles_width_is_the_share_of_the_training_that_was_asked_for(width):
    steps = 3000
    # The averages of t and of t^2 are the profile's first two moments.
    values = ((float(t), float(t) ** 2) for t in range(1, steps + 1))
    mean, square = averaged(lambda parameters: averaging(parameters, width, None), 2, values)
    assert (square - mean**2) ** 0.5 / steps == pytest.approx(width, rel=0.03)


def test_one_decay_at_every_step_is_the_plain_recursion_from_the_first_step_on():
    values = [3.0, -1.0, 4.0, 10.0]
    expected = values[0]
    (found,) = averaged(lambda parameters: averaging(parameters, 0.1, 0.9), 1, [(value,) for value in values])
    for value in values[1:]:
        expected = 0.9 * expected + 0.1 * value
    assert found == pytest.approx(expected)
