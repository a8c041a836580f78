"""Choosing the fastest engine by measuring on the machine at hand, once, and remembering what came out."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ddkit.errors import BadFile
from ddkit.files import cache_folder, read_json, write_json
from ddkit.protocol import winograd
from ddkit.protocol.device import cpu_flags, cpu_model
from ddkit.protocol.engine import build_engine
from ddkit.protocol.kernels import CannotCompile
from ddkit.protocol.plan import EnginePlan

_log = logging.getLogger(__name__)

_MEMORY = "engines.json"
_REPEATS = 2
# Chunks of so many 32-pixel images are tried, and of as many pixels at other sizes.
_CHUNKS = (8, 16, 32, 64)
_BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}


def choose_plan(network: nn.Module, precision: str, batch_size: int) -> EnginePlan:
    """The fastest plan for training `network` on this machine.

    For the official network on a CPU it is measured at first use, in a second or two, and remembered in the cache
    for this processor, PyTorch, number of threads, image size and precision.
    """
    if not winograd.fits(network):
        return _plan_without_measuring(network, precision)
    try:
        winograd.load()
    except (CannotCompile, BadFile) as error:
        _log.warning("Evaluating the plain way, several times slower: %s", error)
        return _plan_without_measuring(network, precision)
    key = _key(network.image_size, precision)
    plan = _remembered(key)
    if plan is None:
        plan = fastest(network, candidates(network.image_size, precision, batch_size))
        _remember(key, plan)
    return plan


def candidates(image_size: int, precision: str, batch_size: int) -> list[EnginePlan]:
    """What is worth trying for the official network on a CPU."""
    workers = torch.get_num_threads()
    most = -(-batch_size // workers)
    chunks = sorted({min(most, max(1, chunk * 32**2 // image_size**2)) for chunk in _CHUNKS})
    plans = [EnginePlan("winograd", precision, chunk, workers) for chunk in chunks]
    if precision == "float32" or has_bfloat16():
        plans.append(EnginePlan("plain", precision, chunks[-1]))
    return plans


def fastest(network: nn.Module, plans: Sequence[EnginePlan]) -> EnginePlan:
    """The plan that takes least time an image, measured with a copy of `network`."""
    if len(plans) == 1:
        return plans[0]
    seconds = {plan: seconds_per_image(network, plan) for plan in plans}
    for plan, spent in seconds.items():
        _log.info("%s: %.2f ms an image", plan, 1000 * spent)
    return min(seconds, key=seconds.__getitem__)


def seconds_per_image(network: nn.Module, plan: EnginePlan) -> float:
    """Of one forward and backward pass: the least of a few short measurements."""
    size = network.image_size
    n = max(plan.chunk, _CHUNKS[0] * 32**2 // size**2, 1) * plan.workers
    random = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=random)
    labels = torch.randint(network.num_classes, (n,), generator=random)
    engine = build_engine(copy.deepcopy(network), plan)
    least = float("inf")
    for _ in range(1 + _REPEATS):  # the first also warms up
        began = time.perf_counter()
        engine.gradients(images, labels)
        least = min(least, time.perf_counter() - began)
    return least / n


def smaller(plan: EnginePlan, batch_size: int) -> EnginePlan | None:
    """A plan that takes less memory, or None."""
    chunk = (plan.chunk or batch_size) // 2
    return replace(plan, chunk=chunk) if chunk >= 1 else None


def has_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16."""
    return bool(_BFLOAT16_INSTRUCTIONS & cpu_flags())


def _plan_without_measuring(network: nn.Module, precision: str) -> EnginePlan:
    device = next(network.parameters()).device
    across_images = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    # In chunks, a CPU's caches hold more of what is needed next.
    chunk = _CHUNKS[1] if device.type == "cpu" and not across_images else 0
    return EnginePlan("plain", precision, chunk)


def _key(image_size: int, precision: str) -> str:
    threads = torch.get_num_threads()
    return f"{cpu_model()}, torch {torch.__version__}, {threads} threads, {image_size} pixels, {precision}"


def _remembered(key: str) -> EnginePlan | None:
    try:
        return EnginePlan(**_memory()[key])
    except (KeyError, TypeError):
        return None


def _remember(key: str, plan: EnginePlan) -> None:
    try:
        write_json(cache_folder() / _MEMORY, {**_memory(), key: asdict(plan)})
    except BadFile as error:
        _log.info("The choice of engine is not remembered: %s", error)


def _memory() -> dict[str, Any]:
    """All choices so far; none where the file is missing or damaged, as they can be made again."""
    try:
        known = read_json(cache_folder() / _MEMORY)
    except BadFile:
        return {}
    return known if isinstance(known, dict) else {}
