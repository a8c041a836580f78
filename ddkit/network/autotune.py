"""Chooses the fastest engine by measuring on the machine at hand, once, and remembers the choice."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ddkit.errors import BadFileError
from ddkit.network import winograd
from ddkit.network.convnet import ConvNet
from ddkit.network.engine import build_engine, close_engine
from ddkit.network.kernels import CompileError
from ddkit.network.plan import PRECISIONS, EnginePlan
from ddkit.runtime.device import describe_device, has_bfloat16, release_memory
from ddkit.runtime.files import cache_folder, one_at_a_time, read_json, write_json

_log = logging.getLogger(__name__)
_warn_once = functools.cache(_log.warning)  # not again for every network of an evaluation

_MEMORY = "_engines.json"  # no dataset can have this name
_REPEATS = 2
# A plan that takes so many times as long as the best one is given up on a CPU: after its first measurement, in which it also
# warms up, and after a later one.
_GIVEN_UP_FIRST, _GIVEN_UP_LATER = 3.0, 1.2
# Chunks of so many 32-pixel images are tried, and of as many pixels at other sizes; at least so many images are measured,
# as some work is done once for a batch of any size.
_CHUNKS = (4, 8, 16, 32, 64)
_LEAST_IMAGES = 64
_ENGINES = "2026-11-30"  # when they last became other or faster ones; what was remembered before is measured again
_PLAIN_CHUNK = 16
# Compiling for a GPU saves less than this share of the time, and takes at least so many seconds: where that cannot pay it
# is not tried. Both are assumptions from public measurements; no GPU was at hand.
_MOST_SAVED_BY_COMPILING = 0.5
_SECONDS_OF_COMPILING = 40.0
_CHUNK_IN_GPU_CACHE = 64  # 32-pixel images whose largest maps stay in the second-level cache

_prescribed: contextvars.ContextVar[Mapping[str, Mapping[str, Any]]] = contextvars.ContextVar(
    "prescribed", default=MappingProxyType({})
)


@dataclass(frozen=True)
class _Measured:
    """A plan with its seconds for each image (on a CPU, summed over its cores), and those before it begins (compiling)."""

    plan: EnginePlan
    seconds: float = 0.0
    start: float = 0.0


def choose_plan(network: nn.Module, precision: str, batch_size: int, *, images_left: int = 0) -> EnginePlan:
    """The fastest plan for training `network` on its device.

    For the official network it is measured at first use, in seconds, and remembered in the cache for this processor
    or GPU, PyTorch, number of threads, image size, batch size, precision and type of the weights.
    precision: "float32", "bfloat16", or "auto", which takes the faster of the two on a CPU with bfloat16 instructions
        and float32 on every other device.
    images_left: how many images the training will see. On a GPU the network is compiled only if that saves more time
        than the compiling takes.
    """
    weights = next(network.parameters())
    device = weights.device
    if precision == "auto" and not (type(network) is ConvNet and device.type == "cpu" and has_bfloat16(device)):
        precision = "float32"
    if type(network) is not ConvNet:
        return _plan_without_measuring(network, precision)
    if device.type == "cpu":
        try:
            winograd.load()
        except CompileError as error:
            _warn_once("No fast engine works here, so the network computes several times more slowly: %s", str(error))
            return _plan_without_measuring(network, precision)
    if precision == "auto":
        # Each is measured and remembered by itself, as what follows asks for the one that was taken.
        return min((_fastest(network, each, batch_size) for each in PRECISIONS), key=lambda each: each[1].seconds)[1].plan
    plans = candidates(network, precision, batch_size)
    if len(plans) == 1:
        return plans[0]
    key, best = _fastest(network, precision, batch_size)
    if device.type != "cuda" or images_left * best.seconds * _MOST_SAVED_BY_COMPILING < _SECONDS_OF_COMPILING:
        return best.plan
    plans = [EnginePlan("compiled", precision, channels_last=channels_last) for channels_last in (False, True)]
    compiled = _best(f"{key}, compiled", network, plans, batch_size)
    return compiled.plan if images_left * (best.seconds - compiled.seconds) > compiled.start else best.plan


def _fastest(network: ConvNet, precision: str, batch_size: int) -> tuple[str, _Measured]:
    """The fastest plan that compiles nothing for a GPU, and by which key it is remembered."""
    weights = next(network.parameters())
    if weights.device.type == "cpu":  # larger batches are computed in the same chunks, so that they need no measuring
        batch_size = min(batch_size, torch.get_num_threads() * _chunk(_CHUNKS[-1], network))
    key = (
        f"{describe_device(weights.device)}, torch {torch.__version__}, {network.image_size} pixels, "
        f"batches of {batch_size}, {precision}, {str(weights.dtype).removeprefix('torch.')}, engines of {_ENGINES}"
    )
    return key, _best(key, network, candidates(network, precision, batch_size), batch_size)


def candidates(network: ConvNet, precision: str, batch_size: int) -> list[EnginePlan]:
    """The plans worth trying for the official network on its device; on a GPU, those that compile nothing."""
    device = next(network.parameters()).device
    if device.type == "cuda":
        chunk = _chunk(_CHUNK_IN_GPU_CACHE, network)
        kinds = [("plain", 0), ("cuda_graph", 0), *([("cuda_graph", chunk)] if chunk < batch_size else [])]
        return [EnginePlan(kind, precision, of, channels_last=last) for kind, of in kinds for last in (False, True)]
    if device.type != "cpu":
        return [EnginePlan("plain", precision)]
    workers = torch.get_num_threads()
    most = -(-batch_size // workers)
    chunks = sorted({min(most, _chunk(chunk, network)) for chunk in _CHUNKS})
    plain = EnginePlan("plain", precision, chunks[-1])
    plans = [plain] if precision == "float32" or has_bfloat16(device) or not winograd.fits(network) else []
    if winograd.fits(network):
        # PyTorch's products of bfloat16 are far too slow as well without instructions for it.
        products = ("torch", "own") if precision == "float32" or has_bfloat16(device) else ("own",)
        plans += [EnginePlan("winograd", precision, chunk, workers, each) for each in products for chunk in chunks]
    return plans


def _chunk(of_32_pixels: int, network: ConvNet) -> int:
    """Images of the network's size with as many pixels as so many of 32 pixels have; at least one."""
    return max(1, of_32_pixels * 32**2 // network.image_size**2)


def _best(key: str, network: ConvNet, plans: Sequence[EnginePlan], batch_size: int) -> _Measured:
    """The plan that takes the least time: the one remembered under `key`, else measured with copies of `network`."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        values = dict(_prescribed.get().get(key) or _memory()[key])
        seconds, start = values.pop("seconds", 0.0), values.pop("start", 0.0)
        return _Measured(EnginePlan.from_dict(values), seconds, start)
    found: list[_Measured] = []
    # The plain way, by far the slowest on a CPU, comes last and is given up soon. Where it is the only one, "auto" compares it
    # with that of the other precision.
    for plan in reversed(plans) if len(plans) > 1 or plans[0].kind == "plain" else ():
        least = min((each.seconds for each in found), default=float("inf"))
        try:
            found.append(_measure(network, plan, batch_size, least))
        except Exception as error:
            # Compilers for GPUs fail in many ways of their own.
            if not isinstance(error, (RuntimeError, CompileError)) and plan.kind != "compiled":
                raise
            _log.info("%s does not work here: %s", plan, error)
        else:
            _log.info("%s: %.3f ms for each image", plan, 1000 * found[-1].seconds)
    best = min(found, key=lambda each: each.seconds, default=_Measured(plans[0], float("inf")))
    # A compiler for GPUs that fails will fail again. Another failure, such as of memory that other work takes, will pass.
    if not found and best.plan.kind != "compiled":
        return best
    values = asdict(best.plan) | {"seconds": best.seconds, "start": best.start}
    path = cache_folder() / _MEMORY
    try:
        with one_at_a_time(path.with_name(f".{_MEMORY}.lock"), "remembers a choice of engine"):
            write_json(path, {**_memory(), key: values})
    except BadFileError as error:
        _log.info("The choice of engine could not be saved: %s", error)
    return best


def _measure(network: ConvNet, plan: EnginePlan, batch_size: int, least: float) -> _Measured:
    """Time a forward and backward pass: the least of a few short measurements.

    least: seconds for each image of the best plan so far.
    """
    size, device = network.image_size, next(network.parameters()).device
    n = batch_size
    if device.type == "cpu":
        n = max(plan.chunk, _LEAST_IMAGES * 32**2 // size**2, 1) * plan.workers
    random = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=random).to(device)
    labels = torch.randint(network.num_classes, (n,), generator=random).to(device)
    engine = build_engine(copy.deepcopy(network), plan)
    # On a CPU every plan uses all threads, and what other work does on the same cores must not decide.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = []
    try:
        for _ in range(1 + _REPEATS):  # the first also compiles and warms up
            began = clock()
            engine.gradients(images, labels).item()
            seconds.append(clock() - began)
            given_up = _GIVEN_UP_FIRST if len(seconds) == 1 else _GIVEN_UP_LATER
            if device.type == "cpu" and min(seconds) / n > given_up * least:
                break
    finally:
        close_engine(engine)
        release_memory(device)
    return _Measured(plan, min(seconds) / n, seconds[0])


def with_smaller_chunks(plan: EnginePlan, batch_size: int) -> EnginePlan | None:
    """A plan that takes less memory, or None: first without a graph, whose memory is kept, then in ever smaller chunks."""
    if plan.needs_gpu:
        return replace(plan, kind="plain")
    chunk = (plan.chunk or batch_size) // 2
    return replace(plan, chunk=chunk) if chunk >= 1 else None


def remembered_plans(device: torch.device) -> dict[str, dict[str, Any]]:
    """The measurements on this device with this PyTorch, as `prescribed_plans` takes them."""
    start = f"{describe_device(device)}, torch {torch.__version__}, "
    return {key: values for key, values in _memory().items() if key.startswith(start) and f"engines of {_ENGINES}" in key}


@contextlib.contextmanager
def prescribed_plans(plans: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Let `choose_plan` take these plans in the context where they are for its device, so that rounding is the same again."""
    token = _prescribed.set(plans)
    try:
        yield
    finally:
        _prescribed.reset(token)


def _plan_without_measuring(network: nn.Module, precision: str) -> EnginePlan:
    device = next(network.parameters()).device
    across_images = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    # In chunks, a CPU's caches hold more of what is needed next.
    chunk = _PLAIN_CHUNK if device.type == "cpu" and not across_images else 0
    return EnginePlan("plain", "float32" if precision == "auto" else precision, chunk)


def _memory() -> dict[str, Any]:
    """All choices so far; none if the file is missing or damaged, since they can be made again."""
    try:
        known = read_json(cache_folder() / _MEMORY)
    except BadFileError:
        return {}
    return known if isinstance(known, dict) else {}
