"""DiffFit: fine-tuning a denoiser by its biases, norms, class embedding and a few added factors.

Source: Xie et al. 2023, arXiv 2304.06648, section 3.2. The layers with factors are those of the public code of
arXiv 2311.15529: the inputs of attention and the outputs of attention and of the two-layer network, in the first half of
the blocks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ddkit.generator.uvit import UViT

_FACTOR_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0"),  # attention of diffusers
    "ff.net.2",  # two-layer network of diffusers
    *("query_key_value", "attention_out", "mlp.2"),  # UViT
)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class ParameterCounts:
    """The number of a network's parameters that are trained, and of all of them."""

    trainable: int
    total: int

    @property
    def fraction(self) -> float:
        """The trainable fraction, 0 to 1."""
        return self.trainable / self.total


class Scaled(nn.Module):
    """A linear layer whose output channels are each multiplied by a learned factor, which is one at first."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones_like(layer.weight[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer with the factors in its weights: the same function."""
        self.layer.weight.mul_(self.scale[:, None])
        if self.layer.bias is not None:
            self.layer.bias.mul_(self.scale)
        return self.layer


def apply_difffit(denoiser: UViT | DiTTransformer2DModel) -> ParameterCounts:
    """Prepare a denoiser for DiffFit, in place; its output stays the same.

    Its state dictionary has other keys until `merge_difffit`.
    """
    if isinstance(denoiser, DiTTransformer2DModel):
        first_half = denoiser.transformer_blocks[: len(denoiser.transformer_blocks) // 2]
    else:
        first_half = denoiser.blocks_in
    for block in first_half:
        layers = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        for name, layer in layers:
            if f".{name}".endswith(tuple(f".{ending}" for ending in _FACTOR_LAYERS)):
                block.set_submodule(name, Scaled(layer))
    denoiser.requires_grad_(False)
    for module in denoiser.modules():
        whole = isinstance(module, (*_NORMS, nn.Embedding))  # class embeddings; these networks have no others
        for name, parameter in module.named_parameters(recurse=False):
            if whole or name in ("bias", "scale"):
                parameter.requires_grad_(True)
    return count_parameters(denoiser)


def merge_difffit(denoiser: nn.Module) -> nn.Module:
    """Fold the factors into the weights and undo `share_conditioning`, in place; the output stays the same.

    Returns the denoiser with its original layers, all of its parameters trainable.
    """
    for name, module in list(denoiser.named_modules()):
        if isinstance(module, Scaled):
            denoiser.set_submodule(name, module.merged())
    if isinstance(denoiser, DiTTransformer2DModel):
        for block in denoiser.transformer_blocks[1:]:
            if block.norm1.emb is denoiser.transformer_blocks[0].norm1.emb:
                block.norm1.emb = copy.deepcopy(block.norm1.emb)
    return denoiser.requires_grad_(True)


def plain_copy(denoiser: nn.Module) -> nn.Module:
    """A copy on the CPU as `merge_difffit` makes it; the denoiser itself stays in training."""
    on_cpu: dict[int, Tensor] = {}  # copied straight to the CPU, it takes no memory on the device
    for tensor in (*denoiser.buffers(), *denoiser.parameters()):
        copied = tensor.detach().to("cpu", copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        on_cpu[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return merge_difffit(copy.deepcopy(denoiser, on_cpu))


def share_conditioning(denoiser: nn.Module) -> bool:
    """Let all blocks of a DiTTransformer2DModel use one embedding of time and class, if all of theirs are equal.

    diffusers gives each block a copy of what is one layer in the published model. In DiT-XL/2 DiffFit would train 28
    class embeddings, 4.4 % of all parameters instead of 0.26 %. Returns whether the embedding is shared now.
    """
    if not isinstance(denoiser, DiTTransformer2DModel):
        return False
    first, *others = (block.norm1 for block in denoiser.transformer_blocks)
    mine = first.emb.state_dict()
    for theirs in (other.emb.state_dict() for other in others):
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
            return False
    for other in others:
        other.emb = first.emb
    return True


def count_parameters(network: nn.Module) -> ParameterCounts:
    """Count a network's parameters; shared ones count once."""
    parameters = list(network.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCounts(trainable, sum(parameter.numel() for parameter in parameters))
