"""The U-ViT denoiser. This file imports only torch and diffusers.

It must stay so: the stand-alone track 2 entry bundles this very file with the weights.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR
_FEW_TOKENS = 32


class UViT(ModelMixin, ConfigMixin):
    """A vision transformer over latents in which time, class and patches are all tokens.

    The first half of the blocks feeds the second half through long skip connections, and a 3x3 convolution
    smooths the seams between patches at the end. Source: Bao et al. 2022, arXiv 2209.12152, sections 3.1 and 3.2.

    sample_size: side of the square latents, a multiple of patch_size. in_channels: of the latents.
    num_classes: without the null class, which is the extra label `num_classes`.
    depth: odd, the middle block has no skip connection. hidden_size: a multiple of num_heads.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        num_classes: int,
        patch_size: int = 2,
        hidden_size: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.patches_per_side = sample_size // patch_size
        patch_values = in_channels * patch_size**2
        self.patch_in = nn.Linear(patch_values, hidden_size)
        self.time_in = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.class_in = nn.Embedding(num_classes + 1, hidden_size)
        self.positions = nn.Parameter(torch.zeros(1, 2 + self.patches_per_side**2, hidden_size))
        shape = (hidden_size, num_heads, mlp_ratio)
        self.blocks_in = nn.ModuleList(Block(*shape) for _ in range(depth // 2))
        self.block_middle = Block(*shape)
        self.blocks_out = nn.ModuleList(Block(*shape, skip=True) for _ in range(depth // 2))
        self.norm_out = nn.LayerNorm(hidden_size)
        self.patch_out = nn.Linear(hidden_size, patch_values)
        self.smooth = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self._initialize()

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the objective's target for noisy latents.

        sample: (N, C, S, S). timestep: (N,) or scalar, float or int, on the scale 0 to 1000.
        class_labels: (N,) int64 in [0, num_classes], the last of which is the null class.
        Returns (N, C, S, S).
        """
        time = timestep_embedding(timestep.expand(len(sample)), self.config.hidden_size).to(sample.dtype)
        x = torch.cat(
            [
                self.time_in(time).unsqueeze(1),
                self.class_in(class_labels).unsqueeze(1),
                self.patch_in(self._to_patches(sample)),
            ],
            dim=1,
        )  # (N, 2 + patches, hidden)
        x = x + self.positions
        kept = []
        for block in self.blocks_in:
            x = block(x)
            kept.append(x)
        x = self.block_middle(x)
        for block in self.blocks_out:
            x = block(x, kept.pop())
        return self.smooth(self._from_patches(self.patch_out(self.norm_out(x[:, 2:]))))

    def _to_patches(self, sample: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, patches, C * patch_size**2)."""
        return F.pixel_unshuffle(sample, self.config.patch_size).flatten(2).transpose(1, 2)

    def _from_patches(self, patches: Tensor) -> Tensor:
        """The inverse of `_to_patches`."""
        side = self.patches_per_side
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (side, side)), self.config.patch_size)

    def _initialize(self) -> None:
        """Truncated normal weights as in the paper's code; the output begins at zero, so that early training is stable."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_in.weight, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.zeros_(self.patch_out.weight)
        # The convolution begins as the identity and only learns to repair the seams.
        nn.init.dirac_(self.smooth.weight)
        if self.smooth.bias is not None:
            nn.init.zeros_(self.smooth.bias)


class Block(nn.Module):
    """Self-attention and a two-layer network, each after a layer norm and added to what came in.

    skip: also take the output of an earlier block, joined to the input by a linear layer.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, skip: bool = False) -> None:
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.num_heads = num_heads
        self.join = nn.Linear(2 * hidden_size, hidden_size) if skip else None
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, inner), TanhGELU(), nn.Linear(inner, hidden_size))

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """x, kept: (N, tokens, hidden) -> the same shape."""
        if self.join is not None and kept is not None:
            x = self.join(torch.cat([x, kept], dim=-1))
        heads = self.query_key_value(self.norm_attention(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (N, heads, tokens, hidden / heads)
        x = x + self.attention_out(_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention, each (N, heads, tokens, size) -> the same shape."""
    tokens, size = query.shape[-2:]
    # Compiled on a CPU, two plain matrix products are faster for few tokens, and in bfloat16 for all: backwards PyTorch's own
    # kernel takes seven times as long there.
    plain = torch.compiler.is_compiling() and query.device.type == "cpu"
    if not plain or (query.dtype == torch.float32 and tokens > _FEW_TOKENS):
        return F.scaled_dot_product_attention(query, key, value)
    scores = query * size**-0.5 @ key.transpose(-1, -2)
    return scores.softmax(dim=-1).to(value.dtype) @ value


class TanhGELU(nn.Module):
    """GELU approximated by tanh (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        # The same, (1 + tanh(u)) / 2 = sigmoid(2 u), which a compiler makes several times as fast on a CPU.
        return x * torch.sigmoid(x * (_GELU_LINEAR + _GELU_CUBIC * x * x))


def timestep_embedding(timestep: Tensor, size: int) -> Tensor:
    """(N,) on the scale 0 to 1000 -> (N, size) float32 of cosines and sines. Source: Vaswani et al. 2017, section 3.5."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    # The longest period is 10,000.
    angles = timestep.float().unsqueeze(1) * torch.exp(-math.log(10_000.0) / half * steps)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, size % 2))
