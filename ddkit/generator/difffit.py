"""DiffFit: fine-tuning a denoiser by its biases, norms, class embedding and a few added factors.

Source: Xie et al. 2023, arXiv 2304.06648, section 3.2; which layers have factors as in the public code of
arXiv 2311.15529: what attention reads, and what attention and the two-layer network add, in the first half of the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from ddkit.errors import UsageError
from ddkit.generator.uvit import UViT

_FACTOR_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0"),  # attention of diffusers
    "ff.net.2",  # two-layer network of diffusers
    *("query_key_value", "attention_out", "mlp.2"),  # UViT
    "conv2",  # residual blocks of the U-Net
)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers of a network are trained, of how many."""

    trainable: int
    total: int

    @property
    def fraction(self) -> float:
        """Trainable of all, 0 to 1."""
        return self.trainable / self.total


class Scaled(nn.Module):
    """A layer whose output channels are each multiplied by a factor of their own, one at first."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones_like(layer.weight.flatten(1)[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        """What the layer takes -> what it gives, scaled."""
        return self.layer(x) * self._along(self.layer.weight.ndim - 1)

    @torch.no_grad()
    def merged(self) -> nn.Linear | nn.Conv2d:
        """The layer with the factors in its weights: the same function."""
        self.layer.weight.mul_(self._along(self.layer.weight.ndim))
        if self.layer.bias is not None:
            self.layer.bias.mul_(self.scale)
        return self.layer

    def _along(self, dimensions: int) -> Tensor:
        """The factors shaped to multiply the first of so many dimensions, or a linear layer's output."""
        return self.scale if dimensions == 1 else self.scale.view(-1, *[1] * (dimensions - 1))


def apply_difffit(denoiser: nn.Module) -> ParameterCounts:
    """Prepare a denoiser for DiffFit, in place; what it computes stays the same.

    Its state dictionary is another one until `merge_difffit`.
    denoiser: a UViT, a UNet2DModel or a DiTTransformer2DModel. Raises UsageError for any other network.
    """
    for block in _first_half(denoiser):
        for name in _factor_layers(block):
            block.set_submodule(name, Scaled(block.get_submodule(name)))
    denoiser.requires_grad_(False)
    for parameter in _tuned(denoiser):
        parameter.requires_grad_(True)
    return count_parameters(denoiser)


def merge_difffit(denoiser: nn.Module) -> nn.Module:
    """Fold the factors into the weights and undo `share_conditioning`, in place; what is computed stays the same.

    Returns the denoiser, now as plain as it was built, all of its parameters trainable.
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
    """A copy on the CPU for keeping, as `merge_difffit` makes it; the denoiser itself can be trained on."""
    # Copied straight to where it stays, it takes no memory beside what is trained.
    on_cpu: dict[int, Tensor] = {id(buffer): _copied(buffer) for buffer in denoiser.buffers()}
    for parameter in denoiser.parameters():
        on_cpu[id(parameter)] = nn.Parameter(_copied(parameter), requires_grad=parameter.requires_grad)
    return merge_difffit(copy.deepcopy(denoiser, on_cpu))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def share_conditioning(denoiser: nn.Module) -> bool:
    """Let all blocks of a DiTTransformer2DModel use one embedding of time and class, where they all have the same.

    diffusers gives each block a copy of what is one layer in the model as published: of DiT-XL/2 DiffFit would train
    28 class embeddings, 4.4 % of all parameters in place of 0.26 %. Returns whether it is shared now.
    """
    if not isinstance(denoiser, DiTTransformer2DModel):
        return False
    first, *others = (block.norm1 for block in denoiser.transformer_blocks)
    if not all(_are_equal(first.emb, other.emb) for other in others):
        return False
    for other in others:
        other.emb = first.emb
    return True


def count_parameters(network: nn.Module) -> ParameterCounts:
    """Shared parameters count once."""
    parameters = list(network.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCounts(trainable, sum(parameter.numel() for parameter in parameters))


def _first_half(denoiser: nn.Module) -> Sequence[nn.Module]:
    if isinstance(denoiser, DiTTransformer2DModel):
        return denoiser.transformer_blocks[: len(denoiser.transformer_blocks) // 2]
    if isinstance(denoiser, UViT):
        return denoiser.blocks_in
    if isinstance(denoiser, UNet2DModel):
        return denoiser.down_blocks
    raise UsageError(
        f"DiffFit does not know the blocks of a {type(denoiser).__name__}.", "Tune all of it instead, with --full."
    )


def _factor_layers(block: nn.Module) -> list[str]:
    """Names of the layers within a block that get factors."""
    layers = (name for name, module in block.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    return [name for name in layers if f".{name}".endswith(tuple(f".{ending}" for ending in _FACTOR_LAYERS))]


def _tuned(denoiser: nn.Module) -> Iterator[nn.Parameter]:
    """Biases, norms, class embeddings (these networks have no other embeddings) and factors."""
    for module in denoiser.modules():
        whole = isinstance(module, (*_NORMS, nn.Embedding))
        for name, parameter in module.named_parameters(recurse=False):
            if whole or name in ("bias", "scale"):
                yield parameter


def _are_equal(first: nn.Module, other: nn.Module) -> bool:
    mine, theirs = first.state_dict(), other.state_dict()
    return first is other or (mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine))
