"""The U-ViT and its alternatives: shapes, conditioning, seeds, and that its file stands alone."""

import ast
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

from ddkit.generator import linear_plan, uvit
from ddkit.generator.config import ARCHITECTURES
from ddkit.generator.networks import build_denoiser, null_class, predict
from ddkit.generator.uvit import Block, TanhGELU, UViT, timestep_embedding


def noisy(count=3):
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("module", [uvit, linear_plan])
def test_bundled_file_imports_only_torch_and_diffusers(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "diffusers"}


def test_patching_and_unpatching_are_the_identity():
    network = UViT(sample_size=4, in_channels=2, num_classes=3, hidden_size=16, depth=3, num_heads=2)
    assert torch.equal(network._from_patches(network._to_patches(noisy())), noisy())


def test_untrained_uvit_outputs_zeros():
    network = UViT(sample_size=4, in_channels=2, num_classes=3, hidden_size=16, depth=3, num_heads=2)
    assert torch.equal(predict(network, noisy(), torch.rand(3), torch.tensor([0, 1, 3])), torch.zeros(3, 2, 4, 4))


def test_first_half_reaches_the_second_by_long_skip_connections(make_model):
    network, times, labels = make_model().denoiser, torch.full((3,), 500.0), torch.tensor([0, 1, 2])
    network.block_middle.forward = torch.zeros_like
    first, second = (predict(network, sample, times, labels) for sample in (noisy(), -noisy()))
    assert not torch.allclose(first, second, atol=1e-5)


def test_timestep_embedding_has_cosines_and_sines_of_falling_frequency():
    embedded = timestep_embedding(torch.tensor([0.0, 2.0]), 4)
    assert embedded[0].tolist() == [1, 1, 0, 0]
    expected = [math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]
    assert embedded[1].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestEveryArchitecture:
    def test_output_depends_on_time_class_and_null_class(self, make_model, architecture):
        network = make_model(architecture).denoiser
        assert null_class(network) == 3
        times, labels = torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 1, 2])
        answer = predict(network, noisy(), times, labels)
        assert answer.shape == (3, 2, 4, 4)
        for other in (
            predict(network, noisy(), times + 50, labels),
            predict(network, noisy(), times, torch.tensor([1, 2, 0])),
            predict(network, noisy(), times, torch.full((3,), 3)),
        ):
            assert not torch.allclose(answer, other, atol=1e-5)

    def test_images_of_a_batch_are_independent(self, make_model, architecture):
        network = make_model(architecture).denoiser
        times, labels = torch.tensor([10.0, 500.0, 900.0]), torch.tensor([0, 1, 2])
        together = predict(network, noisy(), times, labels)
        alone = predict(network, noisy()[1:2], times[1:2], labels[1:2])
        assert torch.allclose(together[1:2], alone, atol=1e-5)

    def test_weights_depend_on_the_seed_alone(self, config, architecture):
        config = dataclasses.replace(config.denoiser, architecture=architecture)
        torch.manual_seed(1)
        first = build_denoiser(config, (2, 4, 4), 3, seed=5).state_dict()
        torch.manual_seed(2)
        again = build_denoiser(config, (2, 4, 4), 3, seed=5).state_dict()
        other = build_denoiser(config, (2, 4, 4), 3, seed=6).state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_training_mode_draws_no_random_numbers(self, make_model, architecture):
        """Labels are dropped by the training's own generator, not by the networks."""
        network = make_model(architecture).denoiser.train()
        times, labels = torch.full((64,), 300.0), torch.zeros(64, dtype=torch.int64)
        answer = predict(network, noisy(1).expand(64, -1, -1, -1), times, labels)
        assert torch.allclose(answer, answer[:1].expand_as(answer), atol=1e-5)


@pytest.mark.slow
def test_gelu_is_the_same_compiled_and_not():
    values = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    traced = torch.export.export(TanhGELU(), (values,)).module()(values)
    plain = torch.nn.functional.gelu(values, approximate="tanh")
    assert torch.equal(TanhGELU()(values), plain)
    assert not torch.equal(traced, plain)  # the other formula it was
    assert torch.allclose(traced, plain, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tokens", "kernel"),
    [(torch.float32, 6, False), (torch.float32, 40, True), (torch.bfloat16, 6, False), (torch.bfloat16, 40, False)],
)
@pytest.mark.slow
def test_attention_is_the_same_compiled_and_not(dtype, tokens, kernel):
    torch.manual_seed(0)
    block = Block(hidden_size=32, num_heads=2, mlp_ratio=2.0).to(dtype)
    with torch.no_grad():
        block.query_key_value.weight *= 4  # so that attention is not even
    x = torch.randn(3, tokens, 32).to(dtype).requires_grad_()
    traced = torch.export.export(block, (x,))
    assert any("scaled_dot_product" in str(node.target) for node in traced.graph.nodes) == kernel
    gradients = []
    for way in (block, traced.module()):
        answer = way(x)
        gradients.append((answer, *torch.autograd.grad(answer.float().square().sum(), x)))
    for plain, other in zip(*gradients, strict=True):
        error = (plain.float() - other.float()).norm() / plain.float().norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
