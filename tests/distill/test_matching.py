"""What a refinement makes smaller, against the same worked out another way."""

import pytest
import torch

from ddkit.distill.matching import distance_of_attention, mean_embedding_distance, misclassification, ridge_regression_loss
from ddkit.network import embedding
from ddkit.network.networks import build_network

pytestmark = pytest.mark.usefixtures("measured_before")

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


def test_the_distance_of_means_is_that_of_each_class(network, embed):
    images, real = draw(6, 1).requires_grad_(), draw(12, 2)
    found, _ = mean_embedding_distance(embed, images, real, CLASSES)
    ours, theirs = network.embed(images).chunk(CLASSES), network.embed(real).detach().chunk(CLASSES)
    expected = sum(((a.mean(0) - b.mean(0)) ** 2).sum() for a, b in zip(ours, theirs, strict=True))
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert_same_gradients(gradient(found, images), gradient(expected, images))


def test_attention_is_where_the_fourth_powers_of_each_block_but_the_last_lie(network, embed, monkeypatch):
    monkeypatch.setattr(embedding, "_LARGEST_MAP", 5 * 128 * 16**2)  # of six and twelve images: parts of unequal size
    images, real, weight = draw(6, 1).requires_grad_(), draw(12, 2), 7.0

    def looked_at(seen):
        maps = []
        for block in range(2):
            seen = network.features[4 * block : 4 * block + 3](seen)
            attention = (seen**4).sum(1).flatten(1)
            maps.append(attention / attention.square().sum(1, keepdim=True).sqrt())
            seen = network.features[4 * block + 3](seen)
        return torch.cat(maps, 1)

    found, seen = distance_of_attention(network, images, real, CLASSES, weight)
    of_means, expected_seen = mean_embedding_distance(embed, images, real, CLASSES)
    ours, theirs = looked_at(images).chunk(CLASSES), looked_at(real).chunk(CLASSES)
    expected = of_means + weight * sum(((a.mean(0) - b.mean(0)) ** 2).sum() for a, b in zip(ours, theirs, strict=True))
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert torch.allclose(seen, expected_seen, atol=1e-4)
    assert_same_gradients(gradient(found, images), gradient(expected, images))


def test_the_regression_is_the_ridge_regression_of_weights(network, embed):
    images, real = draw(6, 1).requires_grad_(), draw(12, 2)
    found, _ = ridge_regression_loss(embed, images, real, CLASSES, RIDGE)
    ours, theirs = network.embed(images).double(), network.embed(real).double().detach()
    strength = RIDGE * ours.square().sum(1).mean()
    classes = torch.eye(CLASSES).double() - 1 / CLASSES
    within = ours.t() @ ours + strength * torch.eye(ours.shape[1])  # the weights' own normal equations
    weights = torch.linalg.solve(within, ours.t() @ classes.repeat_interleave(2, 0))
    errors = (theirs @ weights - classes.repeat_interleave(4, 0)).square().sum(1)
    expected = 70 / 3 * errors.sum() / 4
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert_same_gradients(gradient(found, images), gradient(expected, images))


def test_a_regression_on_the_real_images_themselves_is_almost_right(embed):
    real = draw(12, 2)
    assert ridge_regression_loss(embed, real, real, CLASSES, 1e-4)[0] < 0.01
    assert ridge_regression_loss(embed, real, draw(12, 3), CLASSES, 1e-4)[0] > 1


def test_misclassification_is_the_summed_cross_entropy_of_the_networks_own_layer(network):
    images, labels = draw(6, 1), torch.arange(CLASSES).repeat_interleave(2)
    embedding = network.embed(images).detach().requires_grad_()
    found = misclassification(network, embedding, labels)
    told = network(images).softmax(1)[torch.arange(6), labels]
    assert found.item() == pytest.approx(-told.log().sum().item(), rel=1e-4)
    assert gradient(found, embedding).abs().max() > 0
