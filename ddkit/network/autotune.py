"""Choosing the fastest engine by measuring on the machine at hand, once, and remembering what came out."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ddkit.errors import BadFileError
from ddkit.network import winograd
from ddkit.network.convnet import ConvNet
from ddkit.network.engine import build_engine
from ddkit.network.kernels import CompileError
from ddkit.network.plan import PRECISIONS, EnginePlan
from ddkit.runtime.device import cpu_flags, describe_device
from ddkit.runtime.files import cache_folder, read_json, write_json

_log = logging.getLogger(__name__)

_MEMORY = "_engines.json"  # no dataset can have this name
_REPEATS = 2
# Chunks of so many 32-pixel images are tried, and of as many pixels at other sizes; at least so many images are measured,
# as some work is done once for a batch of any size.
_CHUNKS = (4, 8, 16, 32, 64)
_LEAST_IMAGES = 32
_ENGINES = "2026-11-28"  # when they last became other or faster ones; what was remembered before is measured again
_PLAIN_CHUNK = 16
_BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}


def choose_plan(network: nn.Module, precision: str, batch_size: int) -> EnginePlan:
    """The fastest plan for training `network` on its device.

    For the official network it is measured at first use, in seconds, and remembered in the cache for this processor
    or GPU, PyTorch, number of threads, image size, batch size, precision and type of the weights.
    precision: "float32", "bfloat16", or "auto", by which a CPU with bfloat16 instructions takes the faster of the two
    and every other device float32.
    """
    weights = next(network.parameters())
    device = weights.device
    if precision == "auto" and not (type(network) is ConvNet and device.type == "cpu" and has_bfloat16()):
        precision = "float32"
    if type(network) is not ConvNet:
        return _plan_without_measuring(network, precision)
    if device.type == "cpu":
        try:
            winograd.load()
        except (CompileError, BadFileError) as error:
            _warn_once(f"Evaluating the plain way, several times slower: {error}")
            return _plan_without_measuring(network, precision)
    key = (
        f"{describe_device(device)}, torch {torch.__version__}, {network.image_size} pixels, batches of {batch_size}, "
        f"{precision}, {str(weights.dtype).removeprefix('torch.')}, engines of {_ENGINES}"
    )
    plan = _remembered(key)
    if plan is None:
        plan = fastest(network, candidates(network, precision, batch_size), batch_size)
        _remember(key, plan)
    return plan


def candidates(network: ConvNet, precision: str, batch_size: int) -> list[EnginePlan]:
    """What is worth trying for the official network on its device; the plain way is among it unless hopeless."""
    device = next(network.parameters()).device.type
    if precision == "auto":
        return [plan for choice in PRECISIONS for plan in candidates(network, choice, batch_size)]
    if device == "cuda":
        return [EnginePlan(kind, precision) for kind in ("plain", "graphed", "compiled")]
    if device != "cpu":
        return [EnginePlan("plain", precision)]
    workers = torch.get_num_threads()
    most = -(-batch_size // workers)
    chunks = sorted({min(most, max(1, chunk * 32**2 // network.image_size**2)) for chunk in _CHUNKS})
    plain = EnginePlan("plain", precision, chunks[-1])
    plans = [plain] if precision == "float32" or has_bfloat16() or not winograd.fits(network) else []
    if winograd.fits(network):
        # PyTorch's products of bfloat16 are hopeless, too, without instructions for it.
        products = ("torch", "own") if precision == "float32" or has_bfloat16() else ("own",)
        plans += [EnginePlan("winograd", precision, chunk, workers, each) for each in products for chunk in chunks]
    return plans


def fastest(network: ConvNet, plans: Sequence[EnginePlan], batch_size: int) -> EnginePlan:
    """The plan that takes least time an image, measured with copies of `network`."""
    seconds = {}
    for plan in plans if len(plans) > 1 else ():
        try:
            seconds[plan] = seconds_per_image(network, plan, batch_size)
        except RuntimeError as error:
            # Compilers for GPUs fail in many ways of their own; what works is enough.
            _log.info("%s does not work here: %s", plan, error)
        else:
            _log.info("%s: %.3f ms an image", plan, 1000 * seconds[plan])
    return min(seconds, key=seconds.__getitem__, default=plans[0])


def seconds_per_image(network: ConvNet, plan: EnginePlan, batch_size: int) -> float:
    """Of one forward and backward pass: the least of a few short measurements."""
    size, device = network.image_size, next(network.parameters()).device
    n = batch_size
    if device.type == "cpu":
        n = max(plan.chunk, _LEAST_IMAGES * 32**2 // size**2, 1) * plan.workers
    random = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=random).to(device)
    labels = torch.randint(network.num_classes, (n,), generator=random).to(device)
    engine = build_engine(copy.deepcopy(network), plan)
    least = float("inf")
    for _ in range(1 + _REPEATS):  # the first also warms up
        began = time.perf_counter()
        engine.gradients(images, labels).item()
        least = min(least, time.perf_counter() - began)
    return least / n


def smaller(plan: EnginePlan, batch_size: int) -> EnginePlan | None:
    """A plan that takes less memory, or None."""
    chunk = (plan.chunk or batch_size) // 2
    # What is recorded or compiled on a GPU takes whole batches.
    kind = plan.kind if plan.kind == "winograd" else "plain"
    return replace(plan, kind=kind, chunk=chunk) if chunk >= 1 else None


def has_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16."""
    return bool(_BFLOAT16_INSTRUCTIONS & cpu_flags())


@functools.cache
def _warn_once(text: str) -> None:
    """Not again for every network of an evaluation."""
    _log.warning("%s", text)


def _plan_without_measuring(network: nn.Module, precision: str) -> EnginePlan:
    device = next(network.parameters()).device
    across_images = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    # In chunks, a CPU's caches hold more of what is needed next.
    chunk = _PLAIN_CHUNK if device.type == "cpu" and not across_images else 0
    return EnginePlan("plain", "float32" if precision == "auto" else precision, chunk)


def _remembered(key: str) -> EnginePlan | None:
    try:
        return EnginePlan(**_memory()[key])
    except (KeyError, TypeError):
        return None


def _remember(key: str, plan: EnginePlan) -> None:
    try:
        write_json(cache_folder() / _MEMORY, {**_memory(), key: asdict(plan)})
    except BadFileError as error:
        _log.info("The choice of engine is not remembered: %s", error)


def _memory() -> dict[str, Any]:
    """All choices so far; none where the file is missing or damaged, as they can be made again."""
    try:
        known = read_json(cache_folder() / _MEMORY)
    except BadFileError:
        return {}
    return known if isinstance(known, dict) else {}
