"""Measure how often `ddkit check` is wrong: false alarms on right sets, and mistakes of order and of values that it misses.

    python tools/study_check.py cifar100 [--ipc 1 10 50] [--trials N] [--mistakes N] [--values N] [--set FILE]

Sets are drawn from real test images, degraded as weak generators and optimizers degrade them; --set studies your own
set instead, whose order and values must be right. For orders the classifier sees each image once, and every set
after that is a choice of rows. Two tables are printed: orders, then values (normalization and channels).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddkit.challenge import CIFAR100, TINYIMAGENET, DatasetSpec
from ddkit.checks.classifier import class_model
from ddkit.checks.normalization import judge_normalization
from ddkit.checks.order import judge_order, known_orders, order_findings
from ddkit.data.images import denormalize, normalize
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.sets.distilled import read_set

Degradation = Callable[[Tensor, torch.Generator], Tensor]
Mistake = Callable[[Tensor, torch.Generator], Tensor]
Row = dict[str, str]  # of a table, by column
# With one image a class, these are the right order, shuffled classes, or orders of blocks.
SAME_WITH_ONE_IMAGE = ("in turn", "rows shuffled", "shift of 1 row", "shift of 8 rows", "halves exchanged", "1 row exchanged")
PER_CLASS = 50  # test images of a class to draw from
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
UNLISTED = ((0.4321, 0.5432, 0.3217), (0.2123, 0.3087, 0.1955))


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    side = images.shape[-1]
    return F.interpolate(F.interpolate(images, size=side // 3, mode="area"), size=side, mode="bilinear")


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.2 * torch.randn(images.shape, generator=generator)


def pale(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images - 0.5) * 0.3 + 0.5


def optimized(images: Tensor, generator: torch.Generator) -> Tensor:
    """High contrast, fine and coarse noise, far out of range: as matching gradients leaves images."""
    coarse = torch.randn(len(images), 3, images.shape[-1] // 2, images.shape[-1] // 2, generator=generator)
    fine = torch.randn(images.shape, generator=generator)
    return (images - 0.5) * 1.5 + 0.5 + 0.35 * fine + 0.2 * F.interpolate(coarse, size=images.shape[-1])


def recompressed(images: Tensor, generator: torch.Generator) -> Tensor:
    """JPEG at quality 15."""
    decoded = []
    for image in (images.clamp(0, 1) * 255).byte():
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=15)
        decoded.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255)
    return torch.stack(decoded)


DEGRADATIONS: dict[str, Degradation] = {
    "as it is": lambda images, generator: images,
    "blurred": blurred,
    "noisy": noisy,
    "low contrast": pale,
    "optimized": optimized,
    "JPEG 15": recompressed,
}


def real_pool(name: str) -> Tensor:
    """(C, P, 3, S, S) float in units of [0, 1]: real test images of each class."""
    spec = dataset_spec(name)
    tests = load_dataset(name, "test")
    rows = tests.labels.argsort(stable=True).unflatten(0, (spec.num_classes, -1))[:, :PER_CLASS]
    return tests.images[rows].float() / 255


def own_pool(path: Path, spec: DatasetSpec) -> Tensor:
    """(C, ipc, 3, S, S) in units of [0, 1]: the images of a set."""
    return denormalize(read_set(path, spec.name).images, spec).unflatten(0, (spec.num_classes, -1))


def degraded(pool: Tensor, degrade: Degradation) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.cat([degrade(batch, generator) for batch in pool.flatten(0, 1).split(500)])
    return images.unflatten(0, pool.shape[:2])


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
        "shift of 1 row": ("L013", lambda blocks, generator: blocks.flatten(0, 1).roll(1, 0)),
        "shift of 8 rows": ("L013", lambda blocks, generator: blocks.flatten(0, 1).roll(-8, 0)),
        "halves exchanged": ("L014", lambda blocks, generator: _exchange(blocks, blocks.shape[1] // 2)),
        "1 row exchanged": ("L014", lambda blocks, generator: _exchange(blocks, 1)),
        "classes shuffled": ("L008", lambda blocks, generator: _shuffled(blocks, generator).flatten(0, 1)),
        "rows shuffled": ("L009", lambda blocks, generator: _shuffled(blocks.flatten(0, 1), generator)),
    }


def _reordered(order: Tensor) -> Mistake:
    return lambda blocks, generator: blocks[order].flatten(0, 1)


def _shift_from_middle(blocks: Tensor, generator: torch.Generator) -> Tensor:
    middle = len(blocks) // 2
    return torch.cat([blocks[:middle], blocks[middle:].roll(-1, 0)]).flatten(0, 1)


def _exchange(blocks: Tensor, rows: int) -> Tensor:
    """The last rows of every other block, exchanged with the first ones of the next."""
    exchanged = blocks.clone()
    exchanged[0::2, -rows:], exchanged[1::2, :rows] = blocks[1::2, :rows], blocks[0::2, -rows:]
    return exchanged.flatten(0, 1)


def _swap_pair(blocks: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.arange(len(blocks))
    pair = torch.randperm(len(blocks), generator=generator)[:2]
    order[pair] = order[pair.flip(0)]
    return blocks[order].flatten(0, 1)


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]


def wrong_values(spec: DatasetSpec) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Wrong tensors by name: the code that should be found, and how images in units of [0, 1] become one."""
    other = TINYIMAGENET if spec.name == CIFAR100.name else CIFAR100
    return {
        "[0, 1]": ("N001", lambda images: images),
        "[-1, 1]": ("N002", lambda images: 2 * images - 1),
        "[0, 255]": ("N003", lambda images: 255 * images),
        "CIFAR-10's constants": ("N004", lambda images: _with_constants(images, *CIFAR10)),
        f"{other.name}'s constants": ("N004", lambda images: normalize(images, other)),
        "constants of no list": ("N004", lambda images: _with_constants(images, *UNLISTED)),
        "mean only": ("N004", lambda images: _with_constants(images, spec.mean, (1.0, 1.0, 1.0))),
        "BGR": ("N006", lambda images: normalize(images.flip(1), spec)),
        "channels last": ("N007", lambda images: normalize(images, spec).permute(0, 2, 3, 1).reshape(images.shape)),
        "whitened": ("N012", _whitened),
    }


def _whitened(images: Tensor) -> Tensor:
    """ZCA with an epsilon of 0.1, as published codes do it, fitted on the images themselves."""
    flat = images.flatten(1)
    centered = flat - flat.mean(dim=0)
    # The variances of all other components are zero.
    _, values, components = torch.linalg.svd(centered, full_matrices=False)
    variances = values.square() / (len(flat) - 1)
    whitened = centered / 0.1**0.5 + (centered @ components.T) * ((variances + 0.1).rsqrt() - 0.1**-0.5) @ components
    return whitened.view_as(images)


def _with_constants(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def study_order(name: str, kind: str, pool: Tensor, ipc: int, trials: int, tried_mistakes: int) -> Row:
    """Codes for right sets, and the share of each mistake that is found. pool: (C, P, C) log-probabilities."""
    spec, model = dataset_spec(name), class_model(name)
    orders = known_orders(spec)
    generator = torch.Generator().manual_seed(2)

    def judged(mistake: Mistake) -> str:
        return judge_order(mistake(draw(pool, ipc, generator), generator), orders, model).code

    right = Counter(judged(lambda blocks, generator: blocks.flatten(0, 1)) for _ in range(trials))
    row = {"images": kind, "ipc": str(ipc), "right sets: L001": _share(right["L001"], trials)}
    row["other codes"] = ", ".join(f"{code} {n}" for code, n in sorted(right.items()) if code != "L001")
    for title, (code, mistake) in mistakes(spec).items():
        if ipc == 1 and title in SAME_WITH_ONE_IMAGE:
            row[title] = ""
            continue
        row[title] = _share(sum(judged(mistake) == code for _ in range(tried_mistakes)), tried_mistakes)
    return row


def study_values(name: str, kind: str, pool: Tensor, ipc: int, trials: int, tried_mistakes: int) -> Row:
    """The alarms on values or order of right sets, and the share of wrong values that is found."""
    spec = dataset_spec(name)
    generator = torch.Generator().manual_seed(3)

    def codes(make: Callable[[Tensor], Tensor]) -> set[str]:
        tensor = make(draw(pool, ipc, generator).flatten(0, 1))
        verdict = judge_normalization(tensor, spec)
        found = [verdict.finding] if verdict else []
        if not any(finding.level == "error" for finding in found):
            found += order_findings(tensor, spec, name)
        return {finding.code for finding in found if finding.level != "info"}

    alarms = Counter(code for _ in range(trials) for code in codes(lambda images: normalize(images, spec)))
    row = {"images": kind, "ipc": str(ipc), "right sets": str(trials)}
    row["alarms"] = ", ".join(f"{code} {n}" for code, n in sorted(alarms.items())) or "0"
    for title, (code, make) in wrong_values(spec).items():
        row[title] = _share(sum(code in codes(make) for _ in range(tried_mistakes)), tried_mistakes)
    return row


def _share(found: int, tried: int) -> str:
    return f"{100 * found / tried:.0f} %" if tried else ""


def pools(name: str, own: Path | None, kinds: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Images to draw sets from, by name: (C, P, 3, S, S) in units of [0, 1]. kinds: keys of DEGRADATIONS."""
    if own is not None:
        yield own.parent.name, own_pool(own, dataset_spec(name))
        return
    real = real_pool(name)
    for kind in kinds:
        yield kind, degraded(real, DEGRADATIONS[kind])


def print_table(rows: list[Row]) -> None:
    if rows:
        print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--set", type=Path, help="study this set, whose order and values are right, instead of real images")
    parser.add_argument("--images", nargs="+", choices=list(DEGRADATIONS), default=list(DEGRADATIONS))
    parser.add_argument("--ipc", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--trials", type=int, default=200, help="right sets of each kind whose order is judged; or 0")
    parser.add_argument("--mistakes", type=int, default=20, help="sets of each kind and mistake")
    parser.add_argument("--values", type=int, default=20, help="right sets of each kind whose values are judged; or 0")
    arguments = parser.parse_args()
    orders, values = [], []
    for kind, pool in pools(arguments.dataset, arguments.set, arguments.images):
        logp = class_model(arguments.dataset).log_probabilities(pool.flatten(0, 1)).unflatten(0, pool.shape[:2])
        for ipc in arguments.ipc:
            if arguments.trials and ipc <= pool.shape[1]:
                orders.append(study_order(arguments.dataset, kind, logp, ipc, arguments.trials, arguments.mistakes))
                print(orders[-1], file=sys.stderr, flush=True)
        if arguments.values:
            ipc = min(10, pool.shape[1])
            values.append(study_values(arguments.dataset, kind, pool, ipc, arguments.values, arguments.mistakes))
            print(values[-1], file=sys.stderr, flush=True)
    print_table(orders)
    print_table(values)


if __name__ == "__main__":
    main()
