"""Random numbers that depend on names and numbers only, not on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63), a fixed function of the parts that differs if any of them does."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def network_seed(*parts: int | str) -> int:
    """`derived_seed` in [0, 2**32), the range of different seeds of PyTorch's CPU generator, which draws initial weights."""
    return derived_seed(*parts) % 2**32


def generator_for(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on the device, seeded with `derived_seed`. Different kinds of devices draw different numbers."""
    return torch.Generator(device).manual_seed(derived_seed(*parts))


class Shuffling:
    """An endless sequence of indices: one random permutation of range(count) after another.

    Any part of it can be computed without the parts before, so that an interrupted training can resume.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def take(self, start: int, length: int) -> torch.Tensor:
        """(length,) int64: positions start ... start + length - 1 of the sequence."""
        pieces = []
        while length > 0:
            epoch, place = divmod(start, self._count)
            if epoch != self._epoch:
                self._order = torch.randperm(self._count, generator=generator_for("cpu", "order", self._seed, epoch))
                self._epoch = epoch
            piece = self._order[place : place + length]
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return torch.cat(pieces)
