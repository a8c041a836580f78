"""DiffFit trains what it says and nothing else, and leaves a plain network that computes the same."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ddkit.generator.config import DenoiserConfig
from ddkit.generator.difffit import (
    Scaled,
    apply_difffit,
    count_parameters,
    merge_difffit,
    plain_copy,
    share_conditioning,
)
from ddkit.generator.networks import build_denoiser, predict

ARCHITECTURES = ("uvit", "dit")


def build(architecture, depth=None):
    depth = depth or {"uvit": 5, "dit": 4}[architecture]
    config = DenoiserConfig(architecture, hidden_size=16, depth=depth, num_heads=2, tokens_per_side=4)
    return shaken(build_denoiser(config, (3, 8, 8), 5, seed=0))


@torch.no_grad()
def shaken(network, seed=1):
    """Every trainable weight moved at random: outputs begin at zero otherwise, and are always the same."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@torch.no_grad()
def answer(network):
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(4, 3, 8, 8, generator=generator)
    return predict(network, noisy, torch.tensor([0.0, 10.0, 500.0, 999.0]), torch.tensor([0, 3, 4, 5]))


def factors(network):
    return [name for name, module in network.named_modules() if isinstance(module, Scaled)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestEveryArchitecture:
    def test_apply_difffit_keeps_the_output(self, architecture):
        network = build(architecture)
        before = answer(network)
        apply_difffit(network)
        torch.testing.assert_close(answer(network), before, atol=1e-6, rtol=0)

    def test_merge_difffit_gives_a_plain_network_with_the_same_output(self, architecture, tmp_path):
        network, plain = build(architecture), build(architecture)
        apply_difffit(network)
        shaken(network, seed=3)
        tuned = answer(network)
        merged = merge_difffit(network)
        assert merged.state_dict().keys() == plain.state_dict().keys()
        assert not torch.allclose(tuned, answer(plain), atol=1e-2)
        torch.testing.assert_close(answer(merged), tuned, atol=1e-5, rtol=0)
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(answer(type(plain).from_pretrained(tmp_path)), tuned, atol=1e-5, rtol=0)
        assert count_parameters(merged) == count_parameters(plain)

    def test_difffit_trains_only_biases_norms_class_embedding_and_factors(self, architecture):
        network = build(architecture)
        counts = apply_difffit(network)
        before = copy.deepcopy(network.state_dict())
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        noisy, labels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
        predict(network, noisy, torch.full((6,), 500.0), labels).square().sum().backward()
        optimizer.step()
        changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
        weights = {
            name
            for name in changed
            if not name.endswith((".bias", ".scale"))
            and not isinstance(owner(network, name), (nn.Embedding, nn.LayerNorm, nn.GroupNorm))
        }
        assert not weights
        assert {f"{name}.scale" for name in factors(network)} <= changed
        assert any(isinstance(owner(network, name), nn.Embedding) for name in changed)
        assert counts == count_parameters(network) and 0 < counts.trainable < counts.total / 2

    def test_apply_difffit_twice_equals_once(self, architecture):
        network = build(architecture)
        once = apply_difffit(network)
        assert apply_difffit(network) == once

    def test_plain_copy_leaves_the_network_in_training(self, architecture):
        network = build(architecture)
        counts = apply_difffit(network)
        kept = plain_copy(shaken(network))
        assert count_parameters(network) == counts and factors(network) and not factors(kept)
        torch.testing.assert_close(answer(kept), answer(network), atol=1e-5, rtol=0)


def owner(network, name):
    return network.get_submodule(name.rpartition(".")[0])


def test_only_the_first_half_of_the_blocks_has_factors():
    network = build("dit", depth=4)
    apply_difffit(network)
    assert {name.split(".")[1] for name in factors(network)} == {"0", "1"}
    assert {name.split(".", 2)[2] for name in factors(network)} == {
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2")
    }
    network = build("uvit", depth=5)
    apply_difffit(network)
    assert {name.partition(".")[0] for name in factors(network)} == {"blocks_in"}


@pytest.mark.parametrize(
    ("shared", "total", "trainable", "percent"), [(True, 675e6, 1_723_424, 0.26), (False, 750e6, 32_920_736, 4.4)]
)
@pytest.mark.slow
def test_trainable_fraction_of_dit_xl_is_the_papers(shared, total, trainable, percent):
    """DiT-XL/2, built without memory: with one embedding of time and class, as published, and with diffusers' copies."""
    with torch.device("meta"):
        network = DiTTransformer2DModel(out_channels=8)
    first, *others = network.transformer_blocks
    for block in others if shared else ():
        block.norm1.emb = first.norm1.emb
    counts = apply_difffit(network)
    assert counts.total == pytest.approx(total, rel=1e-3)
    assert counts.trainable == trainable
    assert 100 * counts.fraction == pytest.approx(percent, rel=0.03)


def test_share_conditioning_is_undone_by_merging():
    network = build("dit")
    assert not share_conditioning(network), "blocks trained from scratch have embeddings of their own"
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    before, apart = answer(network), count_parameters(network).total
    assert share_conditioning(network)
    assert count_parameters(network).total < apart
    assert torch.equal(answer(network), before)
    merge_difffit(network)
    assert count_parameters(network).total == apart
    assert torch.equal(answer(network), before)
    assert not share_conditioning(build("uvit"))
