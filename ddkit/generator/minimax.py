"""The minimax criteria: few samples that cover a class, and differ from one another.

Source: Gu et al. 2024, "Efficient Dataset Distillation via Minimax Diffusion", arXiv 2311.15529, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ddkit.errors import UsageError

_COPIED_AT_MOST = 1 / 8  # of a memory; copying its rows takes about so many times as long as multiplying with them


class MinimaxCriteria(nn.Module):
    """Representativeness and diversity of predicted latents, measured against memories of the steps before.

    For each class two memories of at most `memory_size` latents are kept, first in, first out: of real latents and of
    predictions. Call it with a batch; the memories take the batch in afterwards. They are buffers, so that state
    dictionaries hold them, and are allocated when the first batch shows how large latents are.

    Only directions matter to a cosine, so the memories hold latents of length one in float32, and nothing else is kept.

    With several processes every one calls it with its own, equally large part of the batch; all memories see the whole
    batch, and the values are those of the whole batch. Gradients flow through a process's own rows only, multiplied by
    the number of processes: averaging them over the processes, as DistributedDataParallel does, gives the gradient
    that one process would have computed from the whole batch.
    """

    real: Tensor  # (num_classes, memory_size, D)
    predicted: Tensor  # (num_classes, memory_size, D)
    seen: Tensor  # (num_classes,) int64, images of each class so far

    def __init__(self, num_classes: int, memory_size: int) -> None:
        super().__init__()
        if num_classes < 1 or memory_size < 1:
            raise UsageError(f"Minimax memories need classes and places, not {num_classes} and {memory_size}.")
        self.num_classes = num_classes
        self.memory_size = memory_size
        self.register_buffer("real", torch.empty(num_classes, memory_size, 0))
        self.register_buffer("predicted", torch.empty(num_classes, memory_size, 0))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.int64))

    @torch.compiler.disable
    def forward(self, predicted: Tensor, real: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Measure a batch, then remember it.

        predicted: (N, ...) predictions of clean latents; gradients flow through them only.
        real: (N, ...) the clean latents, of the same shape. labels: (N,) int64 in [0, num_classes).
        Returns two float32 scalars: representativeness, which is 1 minus the least cosine between a prediction and a
        remembered real latent of its class, and diversity, the greatest cosine between a prediction and a remembered
        prediction of its class; both summed over the classes of the batch that have memories and divided by the number
        of classes in the batch. Raises UsageError where the three do not fit together, a label is out of range, or
        latents have another size than those before; the memories stay as they were.
        """
        _check_shapes(predicted, real, labels)
        # Low precision would choose other pairs, and rounds the very differences that count.
        with torch.autocast(predicted.device.type, enabled=False):
            own = predicted.flatten(1).float()
            everything = _of_all_processes(own.detach())
            real, labels = _of_all_processes(real.detach().flatten(1).float()), _of_all_processes(labels)
            self._check_range(labels)
            self._allocate(own)
            with torch.no_grad():
                directions = F.normalize(everything, dim=1)
                groups = _group(labels, self.num_classes)
                farthest, nearest = self._pairs(directions, groups)
            values = self._values(_with_own_rows(everything, own), groups, farthest, nearest)
            with torch.no_grad():
                self._remember(directions, F.normalize(real, dim=1), labels, groups)
        return values

    def _pairs(self, directions: Tensor, groups: _Groups) -> tuple[_Pairs, _Pairs]:
        """The least similar real memory and the most similar predicted one of each class, and of which image."""
        # index_select, here and below: advanced indexing of long rows is several times slower on CPUs.
        queries = directions.index_select(0, groups.members.flatten()).unflatten(0, groups.members.shape)  # (K, n, D)
        filled = torch.arange(self.memory_size, device=queries.device) < self.seen[groups.classes, None]  # (K, N)
        usable = groups.exists[:, :, None] & filled[:, None, :]  # (K, n, N)
        to_real = self._cosines(queries, self.real, groups).masked_fill_(~usable, torch.inf)
        farthest = self._pair(to_real.flatten(1).argmin(dim=1), groups)
        to_predicted = self._cosines(queries, self.predicted, groups).masked_fill_(~usable, -torch.inf)
        return farthest, self._pair(to_predicted.flatten(1).argmax(dim=1), groups)

    def _cosines(self, queries: Tensor, memory: Tensor, groups: _Groups) -> Tensor:
        """(K, n, D) directions -> (K, n, memory_size) cosines with the memories of their classes."""
        # Where all classes are looked at the memory is used as it lies, without a copy.
        rows = memory if len(groups.classes) == self.num_classes else memory.index_select(0, groups.classes)
        return torch.bmm(queries, rows.transpose(1, 2))

    def _pair(self, place: Tensor, groups: _Groups) -> _Pairs:
        """From places in flattened (n, memory_size) tables, one a class."""
        member = torch.div(place, self.memory_size, rounding_mode="floor")
        return _Pairs(groups.members.gather(1, member[:, None]).squeeze(1), place % self.memory_size)

    def _values(self, predicted: Tensor, groups: _Groups, farthest: _Pairs, nearest: _Pairs) -> tuple[Tensor, Tensor]:
        """Both criteria, from the chosen pairs alone: nothing else of the batch has a gradient."""
        counting = (groups.present & (self.seen[groups.classes] > 0)).nonzero().squeeze(1)
        least = self._cosines_of(farthest, predicted, self.real, groups, counting)
        most = self._cosines_of(nearest, predicted, self.predicted, groups, counting)
        classes = groups.present.sum()
        return _averageable((1 - least).sum() / classes), _averageable(most.sum() / classes)

    def _cosines_of(self, pairs: _Pairs, predicted: Tensor, memory: Tensor, groups: _Groups, counting: Tensor) -> Tensor:
        """The cosines of chosen pairs, with gradients. counting: (k,) which of the groups. Returns (k,)."""
        places = groups.classes[counting] * self.memory_size + pairs.place[counting]
        images = predicted.index_select(0, pairs.image[counting])
        return F.cosine_similarity(images, memory.flatten(0, 1).index_select(0, places))

    def _remember(self, predicted: Tensor, real: Tensor, labels: Tensor, groups: _Groups) -> None:
        """Write a batch over the oldest latents; of a class with more images than places the last ones stay."""
        added = torch.bincount(labels, minlength=self.num_classes)
        stays = groups.rank >= added[labels] - self.memory_size
        rows = labels[stays]
        places = (self.seen[rows] + groups.rank[stays]) % self.memory_size
        self.predicted[rows, places] = predicted[stays]
        self.real[rows, places] = real[stays]
        self.seen += added

    def _check_range(self, labels: Tensor) -> None:
        # After gathering, so that all processes stop, and none waits for one that has.
        least, greatest = labels.aminmax()
        if least < 0 or greatest >= self.num_classes:
            raise UsageError(f"Labels {int(least)} to {int(greatest)} are not within 0 to {self.num_classes - 1}.")

    def _allocate(self, latents: Tensor) -> None:
        size, held = latents.shape[1], self.real.shape[2]
        if held == 0:
            self.seen = self.seen.to(latents.device)
            self.real = latents.new_zeros(self.num_classes, self.memory_size, size)
            self.predicted = torch.zeros_like(self.real)
        elif held != size:
            raise UsageError(f"The memories hold latents of {held} numbers, the batch has latents of {size}.")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the size of latents from what is loaded; all else must fit."""
        for name in ("real", "predicted"):
            given, held = state_dict.get(prefix + name), getattr(self, name)
            if given is not None and given.shape[:2] == held.shape[:2]:
                setattr(self, name, held.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class _Groups:
    """A batch of B images by class.

    classes: (K,) the classes looked at, and present: (K,) whether the batch has any image of each.
    members: (K, n) indices into the batch, as many of them as exists: (K, n) says.
    rank: (B,) how many images of its class are before each one in the batch.
    """

    classes: Tensor
    present: Tensor
    members: Tensor
    exists: Tensor
    rank: Tensor


@dataclass(frozen=True)
class _Pairs:
    """One pair for each class looked at. image: (K,) of the batch. place: (K,) in the memory."""

    image: Tensor
    place: Tensor


def _check_shapes(predicted: Tensor, real: Tensor, labels: Tensor) -> None:
    if predicted.shape != real.shape or labels.shape != predicted.shape[:1] or not len(labels):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (predicted, real, labels))
        raise UsageError(f"Predictions, real latents and labels of shapes {shapes} are no batch.")


def _group(labels: Tensor, num_classes: int) -> _Groups:
    """labels: (B,) int64."""
    counts = torch.bincount(labels, minlength=num_classes)
    order = torch.argsort(labels, stable=True)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
    classes = counts.nonzero().squeeze(1)
    if len(classes) > _COPIED_AT_MOST * num_classes:
        classes = torch.arange(num_classes, device=labels.device)
    position = torch.arange(int(counts.max()), device=labels.device)
    members = order[(starts[classes, None] + position).clamp(max=len(labels) - 1)]
    return _Groups(classes, counts[classes] > 0, members, position < counts[classes, None], rank)


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _of_all_processes(rows: Tensor) -> Tensor:
    """(B, ...) -> (processes * B, ...), in the order of the processes, without gradients."""
    if _processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_processes())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _with_own_rows(everything: Tensor, own: Tensor) -> Tensor:
    """The rows of all processes, this one's with their gradients."""
    if _processes() == 1:
        return own
    start = distributed.get_rank() * len(own)
    return torch.cat([everything[:start], own, everything[start + len(own) :]])


def _averageable(value: Tensor) -> Tensor:
    """The same value; its gradient is such that averaging over the processes sums up their parts."""
    return value + (_processes() - 1) * (value - value.detach())
