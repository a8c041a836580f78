"""Embeddings and their gradients with respect to the images: by the fast engine the same as by autograd."""

import pytest
import torch

from ddkit.network import autotune
from ddkit.network.embedding import build_embedder
from ddkit.network.networks import build_network

MANY = 32  # images in a usual call, for which an engine is chosen


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("size, n", [(16, 5), (32, 7), (48, 3), (24, 2)])
def test_values_and_gradients_are_autograds(size, n):
    network = build_network("convnet", 10, size, seed=0)
    embed = build_embedder(network, MANY)
    shares = []
    for seed in (1, 2, 3):
        images = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        expected = network.embed(images)
        towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad(expected, images, towards)

        embedding = embed(images)
        torch.testing.assert_close(embedding, expected, atol=1e-4, rtol=0)
        embedding.backward(towards)
        # A ReLU whose input rounds to the other side of zero passes another gradient: few values may differ. Of one in a
        # late block those are a twentieth, on some processors in one of these draws, and all together still little.
        difference = images.grad - gradient
        assert difference.norm() < 0.02 * gradient.norm()
        shares.append((difference.abs() > 1e-3 * gradient.abs().max()).float().mean().item())
    assert sorted(shares)[1] < 0.01
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
@pytest.mark.parametrize("size, n", [(16, 5), (24, 2), (32, 7), (64, 3)])
def test_in_bfloat16_values_and_gradients_stay_within_its_bounds(size, n, precision):
    network = build_network("convnet", 10, size, seed=0)
    images = torch.randn(n, 3, size, size, generator=seeded(1), requires_grad=True)
    expected = network.embed(images)
    towards = torch.randn(expected.shape, generator=seeded(2))
    (gradient,) = torch.autograd.grad(expected, images, towards)
    embedding = build_embedder(network, MANY, precision)(images)
    assert embedding.dtype == torch.float32
    embedding.backward(towards)
    assert (embedding - expected).norm() < 0.03 * expected.norm()
    # Much more than rounding, by autograd under autocast a tenth already, as ReLUs whose inputs round to the other side of
    # zero pass another gradient.
    assert (images.grad - gradient).norm() < 0.25 * gradient.norm()


@pytest.mark.slow
def test_bfloat16_is_not_float32():
    network = build_network("convnet", 10, 16, seed=0)
    images = torch.randn(4, 3, 16, 16, generator=seeded(1))
    exact, rounded = (build_embedder(network, MANY, precision)(images) for precision in ("float32", "bfloat16"))
    assert (rounded - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.slow
def test_auto_takes_float32_on_a_processor_without_bfloat16_instructions(monkeypatch):
    monkeypatch.setattr(autotune, "has_bfloat16", lambda device: False)
    network = build_network("convnet", 10, 16, seed=0)
    images = torch.randn(4, 3, 16, 16, generator=seeded(1))
    assert autotune.choose_plan(network, "auto", MANY).precision == "float32"
    automatic = build_embedder(network, MANY, "auto")(images)
    torch.testing.assert_close(automatic, network.embed(images), atol=1e-4, rtol=0)


def test_a_network_trained_on_is_seen_as_it_now_is():
    network = build_network("convnet", 10, 16, seed=0)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    embed = build_embedder(network, MANY)
    before = embed(images)
    with torch.no_grad():
        network.features[9].bias += 1
    torch.testing.assert_close(embed(images), network.embed(images), atol=1e-4, rtol=0)
    assert not torch.allclose(embed(images), before)


def test_the_backward_pass_can_be_run_twice():
    network = build_network("convnet", 10, 16, seed=0)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    embedding = build_embedder(network, MANY)(images)
    first, second = (torch.autograd.grad(embedding.sum(), images, retain_graph=True)[0] for _ in range(2))
    assert first.abs().max() > 0
    assert torch.equal(first, second)


def test_calls_whose_backward_passes_come_later_do_not_disturb_each_other():
    embed = build_embedder(build_network("convnet", 10, 16, seed=0), MANY)
    draws = torch.Generator().manual_seed(1)
    sets = [torch.randn(n, 3, 16, 16, generator=draws, requires_grad=True) for n in (3, 3, 5)]
    alone = [torch.autograd.grad(embed(images).sum(), images)[0] for images in sets]
    embedded = [embed(images) for images in sets]
    for images, embedding, expected in zip(sets, embedded, alone, strict=True):
        assert torch.equal(torch.autograd.grad(embedding.sum(), images)[0], expected)
