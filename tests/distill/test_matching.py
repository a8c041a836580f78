"""The losses of feature matching, compared with the same computed in another way."""

import pytest
import torch

from ddkit.distill.matching import dm_loss, frepo_loss
from ddkit.network import embedding
from ddkit.network.networks import build_network

CLASSES, RIDGE = 3, 0.3


@pytest.fixture
def network():
    return build_network("convnet", CLASSES, 16, seed=0)


@pytest.fixture
def embed(network):
    return embedding.build_embedder(network, 32)


def draw(count, seed):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def gradient(value, images):
    return torch.autograd.grad(value, images)[0]


def assert_same_gradients(found, expected):
    # A ReLU whose input rounds to the other side of zero passes another gradient: few values may differ.
    wrong = (found - expected).abs() > 1e-2 * expected.abs().max()
    assert expected.abs().max() > 0 and wrong.float().mean() < 0.01


def test_dm_loss_is_the_sum_of_the_classes_distances(network, embed):
    images, real = draw(6, 1).requires_grad_(), draw(12, 2)
    found = dm_loss(embed, images, real, CLASSES)
    ours, theirs = network.embed(images).chunk(CLASSES), network.embed(real).detach().chunk(CLASSES)
    expected = sum(((a.mean(0) - b.mean(0)) ** 2).sum() for a, b in zip(ours, theirs, strict=True))
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert_same_gradients(gradient(found, images), gradient(expected, images))


def test_frepo_loss_is_that_of_ridge_regression_solved_for_weights(network, embed):
    images, real = draw(6, 1).requires_grad_(), draw(12, 2)
    found = frepo_loss(embed, images, real, CLASSES, RIDGE)
    ours, theirs = network.embed(images).double(), network.embed(real).double().detach()
    strength = RIDGE * ours.square().sum(1).mean()
    classes = torch.eye(CLASSES).double() - 1 / CLASSES
    within = ours.t() @ ours + strength * torch.eye(ours.shape[1])  # the weights' own normal equations
    weights = torch.linalg.solve(within, ours.t() @ classes.repeat_interleave(2, 0))
    errors = (theirs @ weights - classes.repeat_interleave(4, 0)).square().sum(1)
    expected = 70 / 3 * errors.sum() / 4
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert_same_gradients(gradient(found, images), gradient(expected, images))


def test_frepo_loss_of_the_real_images_themselves_is_almost_zero(embed):
    real = draw(12, 2)
    assert frepo_loss(embed, real, real, CLASSES, 1e-4) < 0.01
    assert frepo_loss(embed, real, draw(12, 3), CLASSES, 1e-4) > 1
