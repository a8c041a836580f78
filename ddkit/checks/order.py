"""Judge whether each row shows the class that its position implies, and find the order that the rows are in.

A classifier fitted on the real images (`classifier`) gives each image a log-probability for each class. Averaged over
the images of a block they make a block-by-class matrix, in which an order of the classes is a permutation. Orders that
are known mistakes are compared by how far each stands above random permutations. Unknown ones are found as an optimal
assignment on half of the images of each block, and believed only if the other half agrees. `rows` finds the mistakes
that cut through blocks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.checks.classifier import ClassModel, class_information, class_model, class_variety
from ddkit.checks.rows import find_row_order
from ddkit.data.images import denormalize
from ddkit.data.store import class_titles, store_facts
from ddkit.errors import BadDataError, InvalidSubmissionError, MissingDataError, UsageError, first_few
from ddkit.runtime.files import require_ending
from ddkit.runtime.progress import Listener, ignore
from ddkit.runtime.tensor_files import save_torch
from ddkit.sets.distilled import class_labels, read_set
from ddkit.sets.findings import Finding

# Thresholds, set on degraded real images by tools/study_check.py: at most 1 false alarm in 100 right sets.
_TELLING = 4.0  # standard deviations above random permutations from which an order is believed
_BETTER = 3.0  # by which a named wrong order must beat the right one
_UNKNOWN_TELLING = 5.0  # for an order found by assignment, on the images that it was not found on
_SHARE_OF_REAL = 0.25  # of the log-probability that real images gain, for such an order
_INFORMATIVE = 0.5  # of real images' information, from which rows that fit no order are called shuffled
_BY_CHANCE = 2.5  # standard deviations above random permutations, from which rows are not called shuffled
_EVEN = 0.94  # of the largest variety of classes, from which images are called shuffled; blobs of color reach 0.91 at most
_UNLIKE = 0.3  # share of images that are taken not to resemble their class, for the evidence about single blocks and rows
_PAIRS_ODDS = 0.05  # of a false alarm among all pairs of classes, by a bound that measured ones stay far below
_FEW_IMAGES = 4.0  # nats a moved block pays more, divided by its number of images
_FEWEST_CLASSES = 8  # random permutations of fewer are no measure
_FEW_MOVED = 0.1  # of the blocks: up to here the moved ones are named, beyond it the order is called shuffled
_FEWEST_IMAGES_HALVED = 4  # per class; below it, half a block tells too little
_MISPLACED = 0.01  # share of groups that may be misplaced, for the scale of the evidence
_HALF_PRICE = 4.0  # nats that half a block pays more to be moved, because few images decide
_CHANNEL_ROWS = 1000  # images judged with red and blue exchanged
_CLEARLY_BETTER = 4.5  # standard errors by which the exchanged channels must show the classes better
_SCALES = torch.logspace(-2, 0, 21)  # of the evidence of one block
# Wrong orders of all classes, believed only where the evidence for that very order is strong.
_NAMED_ORDERS = frozenset({"L002", "L003", "L004", "L005", "L006", "L012"})


@dataclass(frozen=True)
class OrderVerdict:
    """The order that the rows are in.

    code: of the finding. words: the order, as a phrase. labels: (N,) int64, the class that each row shows; None if
    that is unknown. agreement: of that order, in standard deviations above random ones.
    by_block: whether all rows of a block show one class.
    """

    code: str
    words: str
    labels: Tensor | None
    agreement: float
    by_block: bool = True


@dataclass(frozen=True)
class _Candidate:
    """A possible order. classes: (C,), the class of each group; a group is a block of rows or, interleaved, every C-th row."""

    code: str
    words: str
    classes: Tensor
    interleaved: bool = False


def order_findings(
    images: Tensor,
    spec: DatasetSpec,
    where: str,
    *,
    made_by_class: Callable[[], bool] = lambda: False,
    progress: Listener = ignore,
) -> list[Finding]:
    """Judge the order of the rows and of the color channels (codes L001 to L014 and N006).

    images: (C * ipc, 3, S, S) float32, normalized with `spec`. made_by_class: asked only where few classes seem exchanged
    (L007), whether ddkit made the images class by class, so that they may only look alike; it is then a warning.
    If the real images are not prepared or the classes are too few to judge, one remark (L011) says that the order was not
    compared.
    """
    try:
        model, logp, verdict = _judge(images, spec, progress)
    except (MissingDataError, UsageError, BadDataError) as error:
        return [Finding("info", "L011", f"The order of the rows was not compared with real images: {error}", where)]
    if verdict.code not in _NAMED_ORDERS and (exchanged := _exchanged_channels(images, logp, model, spec, verdict, where)):
        # With wrong colors, images resemble few classes, so that the seeming order says nothing.
        return [exchanged]
    return [_finding(logp, verdict, spec, where, verdict.code == "L007" and made_by_class())]


def reorder_rows(path: str | os.PathLike[str], out: str | os.PathLike[str], *, dataset: str | None = None) -> int:
    """Write the set at `path` to `out` with its rows in the order that the real images tell; returns the rows moved.

    dataset: None takes it from the JSON next to the set or from the file's name.
    Raises UsageError if `out` exists or does not end in .pt, or `path` is not a tensor's file, MissingDataError if the real
    images are not prepared, InvalidSubmissionError if the set cannot be used or its order cannot be found.
    """
    path, out = Path(path), Path(out)
    if path.is_dir() or path.suffix.lower() == ".zip":
        raise UsageError(
            f"--fix-order reorders one tensor at a time, and {path} is not a tensor.",
            "Name the tensor: ddkit check submission/cifar100.pt --fix-order OUT",
        )
    require_ending(out, ".pt")
    if out.exists():
        raise UsageError(f"The reordered set would replace {out}.", "Name another file for it.")
    distilled = read_set(path, dataset)
    rows = detected_rows(distilled.images, distilled.spec)
    if rows is None:
        raise InvalidSubmissionError(
            f"{path}: the images do not show which order is right, so nothing was written.",
            "Look at the contact sheet next to the tensor, which shows one class in each row.",
        )
    save_torch(distilled.images[rows], out)
    return int((rows != torch.arange(len(rows))).sum())


def detected_rows(images: Tensor, spec: DatasetSpec) -> Tensor | None:
    """The rows' indices in the order that puts each image at its class: `images[detected_rows(...)]`.

    images: as in `order_findings`. Returns (N,) int64, which is 0 ... N-1 if nothing needs moving, or None if the images
    do not tell. Raises MissingDataError or UsageError if the real images are not prepared.
    """
    _, _, verdict = _judge(images, spec, ignore)
    return None if verdict.labels is None else verdict.labels.argsort(stable=True)


def judge_order(logp: Tensor, orders: Mapping[str, Tensor], model: ClassModel) -> OrderVerdict:
    """Find the order of the rows from their log-probabilities.

    logp: (C * ipc, C). orders: known wrong orders by code, each as the (C,) classes of its blocks.
    """
    candidates = _candidates(logp.shape[1], orders)
    matrices = {interleaved: _standardized(_group_means(logp, interleaved)) for interleaved in (False, True)}
    scores = [_agreement(matrices[candidate.interleaved], candidate.classes) for candidate in candidates]
    best = max(range(len(scores)), key=scores.__getitem__)
    right = scores[0] >= _TELLING and scores[best] - scores[0] < _BETTER
    if scores[best] < _TELLING or (not right and scores[best] - scores[0] < _BETTER):
        return _judge_unknown(logp, model, scores[0])
    found = candidates[0 if right else best]
    if not found.interleaved and (verdict := _judge_rows(logp, candidates[0], found, scores[best])):
        return verdict
    return _judge_blocks(logp, scores[0]) if right else _verdict_of(found, len(logp), scores[best])


def known_orders(spec: DatasetSpec) -> dict[str, Tensor]:
    """Orders that entrants took for the right one: by code, the (C,) labels of the classes in that order.

    Raises MissingDataError or UsageError if the dataset is not prepared.
    """
    facts = store_facts(spec.name)
    names = facts.class_names
    recorded = json.loads(resources.files("ddkit.checks").joinpath("orders.json").read_text(encoding="utf-8"))
    listed = {"L002": recorded.get(spec.name, {}).get("superclass"), "L003": recorded.get(spec.name, {}).get("wnids.txt")}
    if facts.listed_order:
        listed["L003"] = facts.listed_order
    # Labels written as text and sorted as such: 0, 1, 10, 11, ... 2, 20.
    listed["L012"] = [names[number] for number in sorted(range(len(names)), key=str)]
    label = {name: number for number, name in enumerate(names)}
    orders = {
        code: torch.tensor([label[name] for name in order])
        for code, order in listed.items()
        if order and sorted(order) == sorted(names)
    }
    return {code: order for code, order in orders.items() if not torch.equal(order, torch.arange(len(names)))}


_WORDS = {
    "L001": "class by class, as the labels imply",
    "L002": "superclass by superclass (beaver, dolphin, otter, ...)",
    "L003": "in the order in which the source lists its classes (wnids.txt), which is not sorted",
    "L012": "in the order of labels sorted as text (0, 1, 10, 11, ...)",
}


def _judge(images: Tensor, spec: DatasetSpec, progress: Listener) -> tuple[ClassModel, Tensor, OrderVerdict]:
    if spec.num_classes < _FEWEST_CLASSES:
        raise BadDataError(f"{spec.num_classes} classes are too few.", "Look at the contact sheet next to the tensor.")
    model = class_model(spec.name, progress=progress)
    logp = model.log_probabilities(denormalize(images, spec))
    return model, logp, judge_order(logp, known_orders(spec), model)


def _candidates(classes: int, orders: Mapping[str, Tensor]) -> list[_Candidate]:
    """All named orders, with the right one first."""
    right = torch.arange(classes)
    by_block = [
        _Candidate("L001", _WORDS["L001"], right),
        *(_Candidate(code, _WORDS[code], order) for code, order in orders.items()),
        _Candidate("L006", "reversed: the last class comes first", right.flip(0)),
    ]
    for start in range(classes - 1):  # a class is missing or doubled
        for step, side in ((-1, "after"), (1, "before")):
            words = f"shifted by one block from block {start} on, where they show the class {side} theirs"
            by_block.append(_Candidate("L005", words, torch.cat([right[:start], right[start:].roll(step)])))
    in_turn = [_Candidate("L004", "image by image, the classes in turn (0, 1, 2, ... again and again)", right, True)]
    for code, order in orders.items():
        in_turn.append(_Candidate("L004", f"image by image, and the classes {_WORDS[code]}", order, True))
    return by_block + in_turn


def _group_means(logp: Tensor, interleaved: bool) -> Tensor:
    """The (C, C) mean log-probabilities of each block of rows or, interleaved, of every C-th row."""
    classes = logp.shape[1]
    return logp.view(-1, classes, classes).mean(dim=0) if interleaved else logp.view(classes, -1, classes).mean(dim=1)


def _row_labels(candidate: _Candidate, rows: int) -> Tensor:
    ipc = rows // len(candidate.classes)
    return candidate.classes.repeat(ipc) if candidate.interleaved else candidate.classes.repeat_interleave(ipc)


def _centered(matrix: Tensor) -> Tensor:
    """The matrix without its row and column means, which tell nothing about an order."""
    return matrix - matrix.mean(dim=0) - matrix.mean(dim=1, keepdim=True) + matrix.mean()


def _standardized(matrix: Tensor) -> Tensor:
    """The matrix centered, in units of the standard deviation of the sum over a random permutation (Hoeffding 1951)."""
    centered = _centered(matrix.double())
    deviation = (centered.square().sum() / (len(centered) - 1)).sqrt()
    # If all images are alike, only rounding is left to compare.
    return torch.zeros_like(centered) if deviation < 1e-6 else centered / deviation


def _agreement(standardized: Tensor, classes: Tensor) -> float:
    """Distance of the order `classes` above random ones, in standard deviations."""
    return float(standardized.gather(1, classes[:, None]).sum())


def _assign(gain: Tensor) -> Tensor:
    """The class of each group, each class equally often, with the largest sum of the gains (rows are groups)."""
    return torch.from_numpy(linear_sum_assignment(gain.double().numpy(), maximize=True)[1])


def _robust_evidence(logp: Tensor) -> Tensor:
    """(N, C): evidence of which no single image has too much, because any image may fail to resemble its class."""
    return torch.log((1 - _UNLIKE) * logp.exp() + _UNLIKE / logp.shape[1])


def _judge_rows(logp: Tensor, right: _Candidate, found: _Candidate, agreement: float) -> OrderVerdict | None:
    """The verdict if rows are out of step with the right order, or with the wrong order that was found; else None."""
    evidence = _centered(_robust_evidence(logp))
    verdicts = []
    for base in (right,) if found is right else (right, found):
        labels = _row_labels(base, len(logp))
        if order := find_row_order(evidence, labels):
            words = order.words if base is right else f"{base.words}, and {order.words}"
            gain = float(evidence.gather(1, order.labels[:, None]).sum())
            verdicts.append((gain, base is right, OrderVerdict(order.code, words, order.labels, agreement, by_block=False)))
    if not verdicts:
        return None
    as_found = float(evidence.gather(1, _row_labels(found, len(logp))[:, None]).sum())
    gain, _, verdict = max(verdicts, key=lambda item: item[:2])
    return verdict if gain > as_found else None


def _judge_blocks(logp: Tensor, agreement: float) -> OrderVerdict:
    """The order is right on the whole; find blocks, or halves of blocks, that stand in each other's place."""
    classes = logp.shape[1]
    ipc = len(logp) // classes
    right = class_labels(classes, ipc)
    evidence = _robust_evidence(logp)
    shown = _moved_groups(_centered(_group_means(evidence, False)) * ipc, ipc)
    moved = int((shown != torch.arange(classes)).sum())
    if moved:
        few = moved <= max(2, _FEW_MOVED * classes)
        code, words = ("L007", "right except for a few classes") if few else ("L008", "right in part only")
        return OrderVerdict(code, words, shown.repeat_interleave(ipc), agreement)
    if ipc >= _FEWEST_IMAGES_HALVED and (halves := _moved_halves(logp, evidence)) is not None:
        return OrderVerdict("L014", "halves of blocks show other classes", halves, agreement, by_block=False)
    return OrderVerdict("L001", _WORDS["L001"], right, agreement)


def _moved_halves(logp: Tensor, evidence: Tensor) -> Tensor | None:
    """The labels of the rows if one half of each block, or of a few blocks, stands in another block; else None.

    evidence: `_robust_evidence` of logp.
    """
    classes = logp.shape[1]
    blocks = logp.view(classes, -1, classes)
    ipc = blocks.shape[1]
    own = torch.arange(classes)
    labels = own.repeat_interleave(ipc).view(classes, ipc)
    for half in (slice(0, ipc // 2), slice(ipc // 2, None)):
        part = blocks[:, half].flatten(0, 1)
        if _agreement(_standardized(_group_means(part, False)), own) >= _BY_CHANCE:
            continue
        found = _cross_checked(part, False)
        if found is not None and found[0] >= _UNKNOWN_TELLING:
            labels[:, half] = _assign(_group_means(part, False))[:, None]
    if bool((labels == own[:, None]).all()):
        sizes = torch.tensor([ipc // 2, ipc - ipc // 2]).repeat(classes)
        places = torch.arange(2 * classes).repeat_interleave(sizes)
        sums = torch.zeros(2 * classes, classes).index_add_(0, places, _centered(evidence))
        labels = _moved_groups(sums, ipc // 2, _HALF_PRICE).repeat_interleave(sizes).view(classes, ipc)
    balanced = bool((labels.flatten().bincount(minlength=classes) == ipc).all())
    return labels.flatten() if balanced and bool((labels != own[:, None]).any()) else None


def _moved_groups(evidence: Tensor, images: int, more: float = 0.0) -> Tensor:
    """The class that each group of rows shows, which is its own unless the evidence pays for all moves that were tried.

    evidence: (G, C) summed log-probabilities of G / C groups for each class, in order. images: in a group.
    more: nats that a move costs beyond what all pairs of groups account for.
    As images of a group resemble one another and are not real ones, the evidence is scaled down to what makes the groups'
    classes most probable. A swapped pair must outweigh the log odds of one pair against all, so that each moved group pays
    half of them.
    """
    groups, classes = evidence.shape
    pairs = groups * (groups - 1) / 2
    price = math.log(pairs / _PAIRS_ODDS) / 2 + _FEW_IMAGES / images + more
    slots = torch.arange(classes).repeat_interleave(groups // classes)
    shown = slots
    for _ in range(3):
        # A few groups at the wrong place must not decide how much all of them tell.
        shares = [torch.softmax(scale * evidence, dim=1).gather(1, shown[:, None]) for scale in _SCALES]
        likelihoods = torch.stack([torch.log((1 - _MISPLACED) * share + _MISPLACED / classes).mean() for share in shares])
        scale = _SCALES[likelihoods.argmax()]
        stay = price * (slots[:, None] == slots)
        shown = slots[_assign(scale * evidence[:, slots] + stay)]
    return shown


def _verdict_of(candidate: _Candidate, rows: int, agreement: float) -> OrderVerdict:
    labels = _row_labels(candidate, rows)
    return OrderVerdict(candidate.code, candidate.words, labels, agreement, by_block=not candidate.interleaved)


def _judge_unknown(logp: Tensor, model: ClassModel, agreement: float) -> OrderVerdict:
    """No named order fits: the classes are shuffled, the rows are shuffled, or the images show no classes."""
    classes = logp.shape[1]
    unknown = OrderVerdict("L010", "unknown", None, agreement)
    # A shuffled set still has as many images of one class as of another. A weak generator's may look like some classes only.
    if class_variety(logp) < _EVEN * math.log(classes):
        return unknown
    for interleaved in (False, True):
        found = _cross_checked(logp, interleaved)
        if found is None or found[0] < _UNKNOWN_TELLING or found[1] < _SHARE_OF_REAL * model.real_gain:
            continue
        shown = _assign(_group_means(logp, interleaved))
        words = "shuffled" + (" and image by image, the classes in turn" if interleaved else ", class by class")
        candidate = _Candidate("L008", words, shown, interleaved)
        return _verdict_of(candidate, len(logp), found[0])
    informative = class_information(logp) >= _INFORMATIVE * model.real_information
    if len(logp) > classes and informative and agreement < _BY_CHANCE:
        return OrderVerdict("L009", "shuffled image by image", None, agreement)
    return unknown


def _cross_checked(logp: Tensor, interleaved: bool) -> tuple[float, float] | None:
    """Agreement and mean gain, on one half of each group's images, of the assignment found on the other half.

    None for one image per class, which leaves nothing to compare with.
    """
    classes = logp.shape[1]
    groups = logp.view(-1, classes, classes).transpose(0, 1) if interleaved else logp.view(classes, -1, classes)
    if groups.shape[1] < 2:
        return None
    halves = [groups[:, start::2].mean(dim=1) for start in (0, 1)]
    agreements, gains = [], []
    for ours, theirs in (halves, halves[::-1]):
        shown = _assign(ours)
        agreements.append(_agreement(_standardized(theirs), shown))
        gains.append(float(_centered(theirs)[torch.arange(classes), shown].mean()))
    return sum(agreements) / math.sqrt(2), sum(gains) / 2


def _exchanged_channels(
    images: Tensor, logp: Tensor, model: ClassModel, spec: DatasetSpec, verdict: OrderVerdict, where: str
) -> Finding | None:
    """N006 if the images show the classes of their rows clearly better with red and blue exchanged."""
    rows = torch.arange(0, len(images), max(1, len(images) // _CHANNEL_ROWS))
    # In units in which exchanging channels is exchanging colors.
    exchanged = _centered(model.log_probabilities(denormalize(images[rows], spec).flip(1)))
    better = exchanged - _centered(logp[rows])
    # As the rows stand, and as the verdict has them: wrong colors can make a class resemble another one.
    right = class_labels(spec.num_classes, len(images) // spec.num_classes)
    errors = max(_class_errors(better, labels[rows]) for labels in (right, verdict.labels) if labels is not None)
    if errors < _CLEARLY_BETTER:
        return None
    message = (
        "The images seem to have red and blue exchanged (BGR instead of RGB): with the channels in the other order, a "
        f"classifier of the real images recognizes the rows' classes better by {errors:.1f} standard errors. Convert them: "
        "undo the normalization, use pixels.flip(1), and normalize again."
    )
    return Finding("error", "N006", message, where)


def _class_errors(gains: Tensor, labels: Tensor) -> float:
    """The mean of (N, C) gains at the labels, over classes, in standard errors.

    By class, because the images of one class may be alike, as a weak generator's are.
    """
    classes = gains.shape[1]
    sums = torch.zeros(classes).index_add_(0, labels, gains.gather(1, labels[:, None]).flatten())
    means = sums / labels.bincount(minlength=classes).clamp_min(1)
    return float(means.mean() / (means.std() / classes**0.5).clamp_min(1e-9))


def _finding(logp: Tensor, verdict: OrderVerdict, spec: DatasetSpec, where: str, doubted: bool) -> Finding:
    titles = class_titles(spec.name)
    if verdict.code == "L001":
        means = _centered(_group_means(logp, False))
        classes = len(means)
        first = int((means.argmax(dim=1) == torch.arange(classes)).sum())
        worst = means.diagonal().argsort()[:3].tolist()
        named = "; ".join(_block_words(block, len(logp) // classes, titles) for block in worst)
        message = (
            f"The rows look right: {_strength(verdict)}; {first} of {classes} blocks resemble their own class most. "
            f"The weakest are {named}."
        )
        return Finding("info", "L001", message, where)
    if verdict.code == "L010":
        message = (
            f"Whether the rows are in the right order is unknown: they are {_strength(verdict)}, "
            "because the images show too little of their classes. Look at the contact sheet."
        )
        return Finding("warning", "L010", message, where)
    if verdict.labels is None:
        message = (
            f"The images look like images of {spec.name}, but the rows fit no order of the classes "
            f"({_strength(verdict)}): they seem to be shuffled one by one. No right order can be found; make the set again "
            "with its rows class by class."
        )
        return Finding("error", verdict.code, message, where)
    repair = "Reorder them: ddkit check FILE --fix-order OUT"
    wrong = int((verdict.labels != class_labels(len(titles), len(logp) // len(titles))).sum())
    if verdict.code in ("L013", "L014"):
        parts = f" ({_parts_words(verdict.labels, titles)})" if verdict.code == "L014" else ""
        message = f"{wrong} of {len(logp)} rows have a wrong label: {verdict.words}{parts}. {repair}"
        return Finding("error", verdict.code, message, where)
    # The names of blocks that hold all classes would say nothing.
    named = f": {_moved_words(logp, verdict, verdict.labels, titles)}" if verdict.by_block else ""
    order = f"{verdict.words} ({_strength(verdict)}){named}"
    if doubted:  # a generator may draw two classes alike; that it draws most of them in another order is still an error
        origin = "But ddkit made the set class by class, as the JSON next to it says: they may only look alike."
        return Finding("warning", verdict.code, f"The order of the rows seems {order}. {origin}", where)
    message = f"The rows are not in the order of the labels; they are {order}. {repair}"
    return Finding("error", verdict.code, message, where)


def _strength(verdict: OrderVerdict) -> str:
    return f"{verdict.agreement:.1f} standard deviations above a random order"


def _parts_words(labels: Tensor, titles: Sequence[str]) -> str:
    """The first rows that show another class than their block's."""
    ipc = len(labels) // len(titles)
    shown, parts = labels.tolist(), []
    start = 0
    for row in range(1, len(shown) + 1):
        if row == len(shown) or shown[row] != shown[start] or row % ipc == 0:
            if shown[start] != start // ipc:
                parts.append(f"rows {start}-{row - 1} show {shown[start]} ({titles[shown[start]]})")
            start = row
    return first_few(parts, joint="; ", kind="part")


def _moved_words(logp: Tensor, verdict: OrderVerdict, labels: Tensor, titles: Sequence[str]) -> str:
    """Which blocks show what: swapped pairs by name, a shifted run as such, or those that resemble their class least."""
    ipc = len(labels) // len(titles)
    shown = labels[::ipc].tolist()
    moved = [block for block, label in enumerate(shown) if label != block]
    pairs = [(block, shown[block]) for block in moved if shown[shown[block]] == block and block < shown[block]]
    if verdict.code == "L007" and len(pairs) * 2 == len(moved):
        return "swapped: " + first_few([f"{a} ({titles[a]}) and {b} ({titles[b]})" for a, b in pairs], kind="pair")
    in_a_row = len(moved) >= 3 and moved[-1] - moved[0] + 1 == len(moved)
    for step, side, run in ((1, "after", moved[:-1]), (-1, "before", moved[1:])):
        # All except one at the end, which shows the class at the other end.
        if verdict.code in ("L007", "L008") and in_a_row and all(shown[block] == block + step for block in run):
            first, last = moved[0], moved[-1]
            return f"the blocks from {first} ({titles[first]}) to {last} ({titles[last]}) show the class {side} theirs"
    own = _centered(_group_means(logp, False)).diagonal()
    moved.sort(key=lambda block: float(own[block]))
    named = [f"{_block_words(b, ipc, titles)} show {shown[b]} ({titles[shown[b]]})" for b in moved]
    return first_few(named, joint="; ", kind="block")


def _block_words(block: int, ipc: int, titles: Sequence[str]) -> str:
    rows = f"rows {block * ipc}-{block * ipc + ipc - 1}" if ipc > 1 else f"row {block}"
    return f"{rows} ({block}, {titles[block]})"
