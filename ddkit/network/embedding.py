"""Embeddings by the challenge's network, with gradients to the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ddkit.challenge import NETWORK_WIDTH
from ddkit.network.autotune import choose_plan
from ddkit.network.convnet import ConvNet
from ddkit.network.winograd import FeatureMaps, WinogradEngine

Embedder = Callable[[Tensor], Tensor]
_LARGEST_MAP = 2**27  # floats of the first block's output, of which half a dozen as large are kept: 512 MiB each


def build_embedder(network: ConvNet, batch_size: int, precision: str = "float32") -> Embedder:
    """A function (N, 3, S, S) -> (N, F) float32 that computes what `network.embed` does.

    Gradients flow to the images and never to the network's parameters, whose present values count in each call.
    batch_size: images in a usual call. On a CPU the evaluation's fast engine computes it, where that one works.
    precision: "float32", "bfloat16" or "auto". "auto" takes bfloat16 on a CPU that has instructions for it and on which
    it measured faster, and float32 otherwise; results of the two precisions differ by about a hundredth.
    """
    device = next(network.parameters()).device.type
    if device == "cpu":
        plan = choose_plan(network, precision, batch_size)
        if plan.kind == "winograd":
            return _EngineEmbedder(WinogradEngine(network, plan))
        precision = plan.precision
    network.requires_grad_(False)

    def embed(images: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            return network.embed(images).float()

    def embed_in_parts(images: Tensor) -> Tensor:
        at_once = max(1, _LARGEST_MAP // (NETWORK_WIDTH * images.shape[-1] ** 2))
        if len(images) <= at_once:
            return embed(images)
        # The backward pass computes the activations again instead of keeping them (gradient checkpointing).
        return torch.cat([checkpoint(embed, part, use_reentrant=False) for part in images.split(at_once)])

    return embed_in_parts


class _EngineEmbedder:
    """Embeds with an engine and keeps one set of feature maps for the next call.

    The maps of a thousand images of 32 px take 160 MB, and allocating so much memory for each call would be slow.
    """

    def __init__(self, engine: WinogradEngine) -> None:
        self.engine = engine
        self._spare: FeatureMaps | None = None

    def __call__(self, images: Tensor) -> Tensor:
        return _ThroughEngine.apply(images, self)

    def take_maps(self, images: Tensor) -> FeatureMaps:
        """Feature maps for as many images as these; they belong to the caller until `give_back`."""
        maps, self._spare = self._spare, None
        return maps if maps and maps.fit(images) else FeatureMaps(len(images), images.shape[-1])

    def give_back(self, maps: FeatureMaps) -> None:
        self._spare = maps


class _ThroughEngine(torch.autograd.Function):
    """The engine's forward and backward pass, with the feature maps that it keeps between the two."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, embedder: _EngineEmbedder) -> Tensor:
        ctx.embedder = embedder
        ctx.save_for_backward(images)
        ctx.maps = embedder.take_maps(images) if images.requires_grad else None
        return embedder.engine.embed(images, ctx.maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, embedding_gradients: Tensor) -> tuple[Tensor, None]:
        (images,) = ctx.saved_tensors
        embedder = ctx.embedder
        maps, ctx.maps = ctx.maps, None  # the backward pass overwrites them
        if maps is None:
            maps = embedder.take_maps(images)
            embedder.engine.embed(images, maps)
        gradients = embedder.engine.image_gradients(images, embedding_gradients, maps)
        embedder.give_back(maps)
        return gradients, None
