"""How often `ddkit check` is wrong about the order of rows: false alarms on right sets, wrong orders it misses.

    python tools/study_check.py cifar100 [--trials N] [--ipc 1 10 50] [--mistakes N] [--values N]

Sets are drawn from real test images, degraded as weak generators and optimisers degrade them. The classifier sees
each image once; every set after that is a choice of rows. `--values` also counts false alarms on normalisation.
"""

from __future__ import annotations

import argparse
import io
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import normalise
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.submission.features import class_model
from ddkit.submission.normalisation import normalisation_findings
from ddkit.submission.order import judge_order, known_orders

Degradation = Callable[[Tensor, torch.Generator], Tensor]
Mistake = Callable[[Tensor, torch.Generator], Tensor]
PER_CLASS = 50  # test images of a class to draw from


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    side = images.shape[-1]
    return F.interpolate(F.interpolate(images, size=side // 3, mode="area"), size=side, mode="bilinear")


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.2 * torch.randn(images.shape, generator=generator)


def pale(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images - 0.5) * 0.3 + 0.5


def optimised(images: Tensor, generator: torch.Generator) -> Tensor:
    """High contrast, fine and coarse noise, far out of range: as matching gradients leaves images."""
    coarse = torch.randn(len(images), 3, images.shape[-1] // 2, images.shape[-1] // 2, generator=generator)
    fine = torch.randn(images.shape, generator=generator)
    return (images - 0.5) * 1.5 + 0.5 + 0.35 * fine + 0.2 * F.interpolate(coarse, size=images.shape[-1])


def recompressed(images: Tensor, generator: torch.Generator) -> Tensor:
    """JPEG at quality 15."""
    return torch.stack([_jpeg(image) for image in (images.clamp(0, 1) * 255).byte()])


def _jpeg(image: Tensor) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=15)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255


DEGRADATIONS: dict[str, Degradation] = {
    "as it is": lambda images, generator: images,
    "blurred": blurred,
    "noisy": noisy,
    "low contrast": pale,
    "optimised": optimised,
    "JPEG 15": recompressed,
}


def log_probabilities(name: str, degrade: Degradation) -> Tensor:
    """(C, P, C): what the classifier says of P degraded test images of each class."""
    spec, model = dataset_spec(name), class_model(name)
    generator = torch.Generator().manual_seed(1)
    images = _by_class(name).flatten(0, 1)
    logp = [model.log_probabilities(degrade(batch.float() / 255, generator)) for batch in images.split(500)]
    return torch.cat(logp).unflatten(0, (spec.num_classes, -1))


def _by_class(name: str) -> Tensor:
    spec = dataset_spec(name)
    return load_dataset(name, "test").images.unflatten(0, (spec.num_classes, -1))[:, :PER_CLASS]


def draw(pool: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
    """(C, ipc, ...): images of each class, chosen at random."""
    chosen = torch.rand(pool.shape[:2], generator=generator).argsort(dim=1)[:, :ipc]
    return torch.stack([images[rows] for images, rows in zip(pool, chosen, strict=True)])


def mistakes(spec: DatasetSpec) -> dict[str, tuple[str, Mistake]]:
    """Wrong orders by name: the code that should be found, and what turns (C, ipc, ...) into rows."""
    named = {code: (code, _reordered(order)) for code, order in known_orders(spec).items()}
    return named | {
        "in turn": ("L004", lambda blocks, generator: blocks.transpose(0, 1).flatten(0, 1)),
        "shift up": ("L005", lambda blocks, generator: blocks.roll(-1, 0).flatten(0, 1)),
        "shift down": ("L005", lambda blocks, generator: blocks.roll(1, 0).flatten(0, 1)),
        "shift from the middle": ("L005", _shift_from_middle),
        "reversed": ("L006", lambda blocks, generator: blocks.flip(0).flatten(0, 1)),
        "pair swapped": ("L007", _swap_pair),
        "classes shuffled": ("L008", lambda blocks, generator: _shuffled(blocks, generator).flatten(0, 1)),
        "rows shuffled": ("L009", lambda blocks, generator: _shuffled(blocks.flatten(0, 1), generator)),
    }


def _reordered(order: Tensor) -> Mistake:
    return lambda blocks, generator: blocks[order].flatten(0, 1)


def _shift_from_middle(blocks: Tensor, generator: torch.Generator) -> Tensor:
    middle = len(blocks) // 2
    return torch.cat([blocks[:middle], blocks[middle:].roll(-1, 0)]).flatten(0, 1)


def _swap_pair(blocks: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.arange(len(blocks))
    pair = torch.randperm(len(blocks), generator=generator)[:2]
    order[pair] = order[pair.flip(0)]
    return blocks[order].flatten(0, 1)


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]


def study_order(name: str, kind: str, pool: Tensor, ipc: int, trials: int, tried_mistakes: int) -> None:
    """Print one row: codes on right sets, then the share of each mistake that is found."""
    spec, model = dataset_spec(name), class_model(name)
    orders = known_orders(spec)
    generator = torch.Generator().manual_seed(2)
    codes = Counter(judge_order(draw(pool, ipc, generator).flatten(0, 1), orders, model).code for _ in range(trials))
    found = []
    for title, (code, mistake) in mistakes(spec).items():
        hits = sum(
            judge_order(mistake(draw(pool, ipc, generator), generator), orders, model).code == code
            for _ in range(tried_mistakes)
        )
        found.append(f"{title} {hits}/{tried_mistakes}")
    right = ", ".join(f"{code} {count}" for code, count in sorted(codes.items()))
    print(f"{name} ipc {ipc} {kind}: {right} of {trials} right sets; found: {', '.join(found)}", flush=True)


def study_values(name: str, kind: str, degrade: Degradation, trials: int) -> None:
    """Print how often right sets of ten images a class draw a warning or an error about their values."""
    spec = dataset_spec(name)
    generator = torch.Generator().manual_seed(3)
    codes: Counter[str] = Counter()
    for _ in range(trials):
        images = degrade(draw(_by_class(name), 10, generator).flatten(0, 1).float() / 255, generator)
        found = normalisation_findings(normalise(images, spec), spec, name)
        codes.update(finding.code for finding in found if finding.level != "info")
    print(f"{name} {kind}: {dict(codes) or 'no'} alarms about values in {trials} right sets", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--trials", type=int, default=200, help="right sets of each kind")
    parser.add_argument("--mistakes", type=int, default=20, help="sets of each kind and mistake")
    parser.add_argument("--values", type=int, default=0, help="right sets of each kind whose values are checked")
    arguments = parser.parse_args()
    for kind, degrade in DEGRADATIONS.items():
        if arguments.trials or arguments.mistakes:
            pool = log_probabilities(arguments.dataset, degrade)
            for ipc in arguments.ipc:
                study_order(arguments.dataset, kind, pool, ipc, arguments.trials, arguments.mistakes)
        if arguments.values:
            study_values(arguments.dataset, kind, degrade, arguments.values)


if __name__ == "__main__":
    main()
