"""The minimax criteria: few samples that cover a class and differ from one another.

Source: Gu et al. 2024, "Efficient Dataset Distillation via Minimax Diffusion", arXiv 2311.15529, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

# For each class looked at, (K,): the index of an image in the batch, and a place in the memory.
_Pairs = tuple[Tensor, Tensor]
_COPIED_AT_MOST = 1 / 8  # of a memory; copying its rows takes about eight times as long as multiplying with them


class MinimaxCriteria(nn.Module):
    """Representativeness and diversity of predicted latents, measured against memories of the steps before.

    Each class has two memories of at most `memory_size` latents, first in, first out: one of real latents and one of
    predictions. A call measures a batch, and then the memories take it in. They are buffers, so that state dictionaries
    hold them, and are allocated when the first batch shows the size of latents.

    A cosine depends on directions only, so the memories hold latents of length one, in float32.

    With several processes each calls it with its own part of the batch, all of one size. All memories see the whole
    batch, and the values are those of the whole batch. Gradients flow through a process's own rows only, multiplied by
    the number of processes: averaging them over the processes, as DistributedDataParallel does, gives the gradient
    that one process would have computed from the whole batch.
    """

    real: Tensor  # (num_classes, memory_size, D)
    predicted: Tensor  # (num_classes, memory_size, D)
    seen: Tensor  # (num_classes,) int64, images of each class so far

    def __init__(self, num_classes: int, memory_size: int) -> None:
        super().__init__()
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
        of classes in the batch.
        """
        # Low precision would choose other pairs, and round the differences that matter.
        with torch.autocast(predicted.device.type, enabled=False):
            own = predicted.flatten(1).float()
            everything = _of_all_processes(own.detach())
            real, labels = _of_all_processes(real.detach().flatten(1).float()), _of_all_processes(labels)
            groups = self._group(labels)
            self._allocate(own)
            with torch.no_grad():
                directions = F.normalize(everything, dim=1)
                farthest, nearest = self._pairs(directions, groups)
            if _processes() > 1:  # only the rows of this process have gradients
                start = distributed.get_rank() * len(own)
                own = torch.cat([everything[:start], own, everything[start + len(own) :]])
            values = self._values(own, groups, farthest, nearest)
            with torch.no_grad():
                self._remember(directions, F.normalize(real, dim=1), labels, groups)
        return values

    def _group(self, labels: Tensor) -> _Groups:
        """The batch by class. The host waits for the device once, because the sizes of tensors depend on the labels."""
        counts = torch.zeros(self.num_classes, dtype=torch.int64, device=labels.device)
        counts.index_add_(0, labels, torch.ones_like(labels))
        most, present = torch.stack([counts.max(), (counts > 0).sum()]).tolist()
        order = torch.argsort(labels, stable=True)
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(labels), device=labels.device) - starts[labels[order]]
        if present > _COPIED_AT_MOST * self.num_classes:
            classes = torch.arange(self.num_classes, device=labels.device)
        else:
            classes = torch.argsort(counts == 0, stable=True)[:present]
        position = torch.arange(most, device=labels.device)
        members = order[(starts[classes, None] + position).clamp(max=len(labels) - 1)]
        return _Groups(classes, counts[classes] > 0, present, members, position < counts[classes, None], rank)

    def _pairs(self, directions: Tensor, groups: _Groups) -> tuple[_Pairs, _Pairs]:
        """The least similar real memory and the most similar predicted one of each class, and the image of each pair."""
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
        # If all classes are needed, the memory is used without a copy.
        rows = memory if len(groups.classes) == self.num_classes else memory.index_select(0, groups.classes)
        return torch.bmm(queries, rows.transpose(1, 2))

    def _pair(self, place: Tensor, groups: _Groups) -> _Pairs:
        """The pairs at these places in flattened (n, memory_size) tables, one for each class."""
        member = torch.div(place, self.memory_size, rounding_mode="floor")
        return groups.members.gather(1, member[:, None]).squeeze(1), place % self.memory_size

    def _values(self, predicted: Tensor, groups: _Groups, farthest: _Pairs, nearest: _Pairs) -> tuple[Tensor, Tensor]:
        """Both criteria, from the chosen pairs alone: nothing else of the batch has a gradient."""
        counting = groups.present & (self.seen[groups.classes] > 0)
        least = self._cosines_of(farthest, predicted, self.real, groups)
        most = self._cosines_of(nearest, predicted, self.predicted, groups)
        representativeness = ((1 - least) * counting).sum() / groups.count
        return _averageable(representativeness), _averageable((most * counting).sum() / groups.count)

    def _cosines_of(self, pairs: _Pairs, predicted: Tensor, memory: Tensor, groups: _Groups) -> Tensor:
        """The cosines of the chosen pairs, with gradients: (K,)."""
        image, place = pairs
        places = groups.classes * self.memory_size + place
        images = predicted.index_select(0, image)
        return F.cosine_similarity(images, memory.flatten(0, 1).index_select(0, places))

    def _remember(self, predicted: Tensor, real: Tensor, labels: Tensor, groups: _Groups) -> None:
        """Write a batch over the oldest latents. Of a class with more images than places the last ones stay."""
        rows = labels * self.memory_size + (self.seen[labels] + groups.rank) % self.memory_size
        # Images that share a place all write the last one of them, so the order of writing does not matter.
        shared = rows[:, None] == rows[None, :]
        last = (shared * torch.arange(len(rows), device=rows.device)).amax(dim=1)
        self.predicted.flatten(0, 1).index_copy_(0, rows, predicted.index_select(0, last))
        self.real.flatten(0, 1).index_copy_(0, rows, real.index_select(0, last))
        self.seen.index_add_(0, labels, torch.ones_like(labels))

    def _allocate(self, latents: Tensor) -> None:
        if self.real.shape[2] == 0:
            self.seen = self.seen.to(latents.device)
            self.real = latents.new_zeros(self.num_classes, self.memory_size, latents.shape[1])
            self.predicted = torch.zeros_like(self.real)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the size of latents from the loaded memories; everything else must fit."""
        for name in ("real", "predicted"):
            given, held = state_dict.get(prefix + name), getattr(self, name)
            if given is not None and given.shape[:2] == held.shape[:2]:
                setattr(self, name, held.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class _Groups:
    """A batch of B images by class.

    classes: (K,) the classes looked at; present: (K,) whether the batch has any image of each; count: how many it has.
    members: (K, n) indices into the batch, of which exists: (K, n) says which are real.
    rank: (B,) how many images of its class come before each one in the batch.
    """

    classes: Tensor
    present: Tensor
    count: int
    members: Tensor
    exists: Tensor
    rank: Tensor


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _of_all_processes(rows: Tensor) -> Tensor:
    """(B, ...) -> (processes * B, ...), in the order of the processes, without gradients."""
    if _processes() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(_processes())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _averageable(value: Tensor) -> Tensor:
    """The same value, with a gradient whose average over the processes is the sum of their parts."""
    return value + (_processes() - 1) * (value - value.detach())
