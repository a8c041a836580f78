"""Networks of the challenge from random seeds, and their parameters as one flat tensor, as which they are kept."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ddkit.challenge import DatasetSpec
from ddkit.network.convnet import ConvNet
from ddkit.network.networks import OFFICIAL_NETWORK, build_network
from ddkit.runtime.device import upload
from ddkit.runtime.seeds import network_seed


def random_network(spec: DatasetSpec, *seed: int | str) -> ConvNet:
    """The challenge's network with random parameters, on the CPU; the same for the same parts of a seed."""
    network = build_network(OFFICIAL_NETWORK, spec.num_classes, spec.image_size, seed=network_seed(*seed))
    return cast(ConvNet, network)


def flat_parameters(network: nn.Module) -> Tensor:
    """(P,) a copy of all parameters of a network, one after the other."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


def flat_gradients(network: nn.Module) -> Tensor:
    """(P,) the gradients of all parameters, in the order of `flat_parameters`."""
    gradients = [parameter.grad for parameter in network.parameters()]
    return torch.cat([gradient.reshape(-1) for gradient in gradients if gradient is not None])


@torch.no_grad()
def load_flat_parameters(network: nn.Module, flat: Tensor) -> None:
    """Copy (P,) parameters into the network's own memory, which its engines have recorded.

    One transfer where `flat` lies on another device.
    """
    parameters: list[Tensor] = list(network.parameters())
    flat = upload(flat, parameters[0].device)
    parts = flat.split([parameter.numel() for parameter in parameters])
    torch._foreach_copy_(parameters, [part.view_as(p) for part, p in zip(parts, parameters, strict=True)])
