"""Time the minimax criteria: with memories as Python lists and a loop over classes, and with ring buffers in tensors.

    python tools/bench_minimax.py [--batch N] [--classes N] [--memory N] [--latents C S S] [--steps N] [--device NAME]

Both see the same batches in turn, with full memories, and compute the values, the gradients and the memories' update;
the median step of each counts. The size of each one's memories is printed as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ddkit.generator.minimax import MinimaxCriteria

Batch = tuple[Tensor, Tensor, Tensor]  # predicted, real, labels


class ListCriteria:
    """The criteria by their definition: a list of latents for each class, one class after the other."""

    def __init__(self, memory_size: int) -> None:
        self.memory_size = memory_size
        self.real: dict[int, list[Tensor]] = defaultdict(list)
        self.predicted: dict[int, list[Tensor]] = defaultdict(list)

    def __call__(self, predicted: Tensor, real: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same as `MinimaxCriteria.forward`."""
        representativeness = diversity = predicted.new_zeros(())
        classes = labels.unique().tolist()
        for label in classes:
            own = predicted[labels == label].flatten(1)
            if self.predicted[label]:
                least = _cosines(own, torch.stack(self.real[label])).min()
                most = _cosines(own, torch.stack(self.predicted[label])).max()
                representativeness = representativeness + (1 - least) / len(classes)
                diversity = diversity + most / len(classes)
        for image, label in enumerate(labels.tolist()):
            self._remember(self.real[label], real[image])
            self._remember(self.predicted[label], predicted[image])
        return representativeness, diversity

    def bytes(self) -> int:
        """The bytes of all latents in the memories."""
        lists = [*self.real.values(), *self.predicted.values()]
        return sum(latent.nbytes for held in lists for latent in held)

    def _remember(self, held: list[Tensor], latent: Tensor) -> None:
        held.append(latent.detach().flatten().clone())
        if len(held) > self.memory_size:
            held.pop(0)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def batches(options: argparse.Namespace) -> Iterator[Batch]:
    """Endless random batches."""
    generator = torch.Generator(options.device).manual_seed(0)
    shape = (options.batch, *options.latents)
    while True:
        labels = torch.randint(options.classes, (options.batch,), generator=generator, device=options.device)
        predicted, real = (torch.randn(shape, generator=generator, device=options.device) for _ in range(2))
        yield predicted, real, labels


def step(criteria: Callable[..., tuple[Tensor, Tensor]], batch: Batch) -> tuple[float, Tensor]:
    """Seconds of one step with gradients, and those gradients."""
    predicted, real, labels = batch
    predicted = predicted.detach().requires_grad_()
    _wait(predicted)
    began = time.perf_counter()
    representativeness, diversity = criteria(predicted, real, labels)
    (0.002 * representativeness + 0.008 * diversity).backward()
    _wait(predicted)
    return time.perf_counter() - began, predicted.grad


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def measure(lists: ListCriteria, tensors: MinimaxCriteria, options: argparse.Namespace) -> tuple[float, float, float]:
    """The median seconds of a step of each, and the largest difference of their gradients."""
    source = batches(options)
    for _ in range(2 * options.memory * options.classes // options.batch):
        batch = next(source)
        lists(*batch)
        tensors(*batch)
    times, difference = [], 0.0
    for _ in range(options.steps):
        batch = next(source)
        (slow, expected), (fast, found) = step(lists, batch), step(tensors, batch)
        times.append((slow, fast))
        difference = max(difference, float((expected - found).abs().max()))
    slow, fast = (statistics.median(column) for column in zip(*times, strict=True))
    return slow, fast, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--memory", type=int, default=64)
    parser.add_argument("--latents", type=int, nargs=3, default=(4, 8, 8), metavar=("C", "S", "S"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    lists, tensors = ListCriteria(options.memory), MinimaxCriteria(options.classes, options.memory)
    slow, fast, difference = measure(lists, tensors, options)
    held = sum(buffer.nbytes for buffer in tensors.buffers())
    print(f"lists   {1000 * slow:8.2f} ms a step, {lists.bytes() / 2**20:.1f} MiB held")
    print(f"tensors {1000 * fast:8.2f} ms a step, {held / 2**20:.1f} MiB held")
    print(f"{slow / fast:.1f} times as fast; gradients differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
