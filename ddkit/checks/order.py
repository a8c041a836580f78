"""Whether each row shows the class that its position implies, and if not, which order the rows are in.

A classifier fitted on the real images (`features`) gives each image a log-probability for each class. Averaged over
the images of a block these make a block-by-class matrix, in which an order of the classes is a permutation. Orders
that are known mistakes are compared by how far each stands above random permutations; unknown ones are found as an
optimal assignment on half of the images of each block and believed only where the other half agrees.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.checks.classifier import ClassModel, class_information, class_model
from ddkit.data.images import denormalize
from ddkit.data.store import class_titles, store_facts
from ddkit.errors import BadDataError, MissingDataError, UsageError
from ddkit.sets.distilled import class_labels
from ddkit.sets.findings import Finding

# Thresholds, set on degraded real images by tools/study_check.py: false alarms at most 1 in 100 correct sets.
_TELLING = 4.0  # standard deviations above random permutations from which an order is believed
_BETTER = 3.0  # by which a named wrong order must beat the right one
_UNKNOWN_TELLING = 5.0  # for an order found by assignment, on the images that it was not found on
_SHARE_OF_REAL = 0.25  # of the log-probability that real images gain, for such an order
_INFORMATIVE = 0.5  # of real images' information, from which rows that fit no order are called shuffled
_UNLIKE = 0.3  # of a row's evidence about single blocks: the share of images that are no likeness of their class
_PAIRS_ODDS = 0.1  # of a false alarm among all pairs of classes, by a bound that measured ones stay far below
_FEW_IMAGES = 4.0  # nats a moved block pays more, divided by its number of images
_FEWEST_CLASSES = 8  # random permutations of fewer are no measure
_FEW_MOVED = 0.1  # of the blocks: up to here the moved ones are named, beyond it the order is called shuffled
_NAMED = 5  # blocks listed in a message
_SCALES = torch.logspace(-2, 0, 21)  # of the evidence of one block


@dataclass(frozen=True)
class OrderVerdict:
    """What order the rows are in.

    code: of the finding. words: the order, as a phrase. labels: (N,) int64, the class that each row is taken to
    show; None where it cannot be told. agreement: of that order, in standard deviations above random ones.
    interleaved: rows show the classes in turn, so that each block holds all of them.
    """

    code: str
    words: str
    labels: Tensor | None
    agreement: float
    interleaved: bool = False


@dataclass(frozen=True)
class _Candidate:
    """An order that may be. classes: (C,), the class of each group; a group is a block of rows, or every C-th row."""

    code: str
    words: str
    classes: Tensor
    interleaved: bool = False


def order_findings(images: Tensor, spec: DatasetSpec, where: str) -> list[Finding]:
    """What the rows' order says (codes L001-L012; a table is in submission/README.md).

    images: (C * ipc, 3, S, S) float32, normalized with `spec`. Without prepared real images, or with classes too
    few to judge, one remark (L011) that the order was not compared.
    """
    try:
        logp, verdict = _judge(images, spec)
    except (MissingDataError, UsageError, BadDataError) as error:
        return [Finding("info", "L011", f"The order of the rows was not compared with real images: {error}", where)]
    return [_finding(logp, verdict, spec, where)]


def detected_rows(images: Tensor, spec: DatasetSpec) -> Tensor | None:
    """The rows' indices in the order that puts each image at its class: `images[detected_rows(...)]`.

    images: as in `order_findings`. Returns (N,) int64, 0 ... N-1 where nothing needs moving, None where the images
    do not tell. Raises MissingDataError or UsageError where the real images are not prepared.
    """
    _, verdict = _judge(images, spec)
    return None if verdict.labels is None else verdict.labels.argsort(stable=True)


def judge_order(logp: Tensor, orders: Mapping[str, Tensor], model: ClassModel) -> OrderVerdict:
    """Decide from log-probabilities which order the rows are in.

    logp: (C * ipc, C) of each row. orders: known wrong orders by code, (C,) class of each block each.
    """
    candidates = _candidates(logp.shape[1], orders)
    matrices = {interleaved: _standardized(_group_means(logp, interleaved)) for interleaved in (False, True)}
    scores = [_agreement(matrices[candidate.interleaved], candidate.classes) for candidate in candidates]
    best = max(range(len(scores)), key=scores.__getitem__)
    if scores[0] >= _TELLING and scores[best] - scores[0] < _BETTER:
        return _judge_blocks(logp, scores[0])
    if scores[best] >= _TELLING and scores[best] - scores[0] >= _BETTER:
        found = candidates[best]
        return _verdict_of(found, len(logp), scores[best])
    return _judge_unknown(logp, model, scores[0])


def known_orders(spec: DatasetSpec) -> dict[str, Tensor]:
    """Orders that entrants took for the right one: by code, (C,) the label of the class at each place.

    Raises MissingDataError or UsageError where the dataset is not prepared.
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


# Wrong orders of all classes, believed only where the evidence for that very order is strong.
NAMED_ORDERS = frozenset({"L002", "L003", "L004", "L005", "L006", "L012"})

_WORDS = {
    "L001": "class by class, as the labels imply",
    "L002": "superclass by superclass (beaver, dolphin, otter, ...)",
    "L003": "in the order in which the source lists its classes (wnids.txt), which is not sorted",
    "L012": "in the order of labels sorted as text (0, 1, 10, 11, ...)",
}


def _judge(images: Tensor, spec: DatasetSpec) -> tuple[Tensor, OrderVerdict]:
    if spec.num_classes < _FEWEST_CLASSES:
        raise BadDataError(f"{spec.num_classes} classes are too few for it.", "Look at the contact sheet beside the tensor.")
    model = class_model(spec.name)
    logp = model.log_probabilities(denormalize(images, spec))
    return logp, judge_order(logp, known_orders(spec), model)


def _candidates(classes: int, orders: Mapping[str, Tensor]) -> list[_Candidate]:
    """All named orders, the right one first."""
    right = torch.arange(classes)
    by_block = [
        _Candidate("L001", _WORDS["L001"], right),
        *(_Candidate(code, _WORDS[code], order) for code, order in orders.items()),
        _Candidate("L006", "reversed: the last class comes first", right.flip(0)),
        *_shifted(right),
    ]
    in_turn = [_Candidate("L004", "image by image, the classes in turn (0, 1, 2, ... again and again)", right, True)]
    for code, order in orders.items():
        in_turn.append(_Candidate("L004", f"image by image, and the classes {_WORDS[code]}", order, True))
    return by_block + in_turn


def _shifted(right: Tensor) -> list[_Candidate]:
    """From some block on, each shows the class after its own, or before: a class left out, or taken twice."""
    shifted = []
    for start in range(len(right) - 1):
        from_here = f"shifted by one block from block {start} on"
        before, tail = right[:start], right[start:]
        up, down = torch.cat([before, tail.roll(-1)]), torch.cat([before, tail.roll(1)])
        shifted.append(_Candidate("L005", f"{from_here}, where they show the class after theirs", up))
        shifted.append(_Candidate("L005", f"{from_here}, where they show the class before theirs", down))
    return shifted


def _group_means(logp: Tensor, interleaved: bool) -> Tensor:
    """(C, C): the mean log-probabilities of each block of rows, or of every C-th row."""
    classes = logp.shape[1]
    return logp.view(-1, classes, classes).mean(dim=0) if interleaved else logp.view(classes, -1, classes).mean(dim=1)


def _row_labels(candidate: _Candidate, rows: int) -> Tensor:
    ipc = rows // len(candidate.classes)
    return candidate.classes.repeat(ipc) if candidate.interleaved else candidate.classes.repeat_interleave(ipc)


def _centered(matrix: Tensor) -> Tensor:
    """Without row and column means: what neither a block nor a class as a whole accounts for."""
    return matrix - matrix.mean(dim=0) - matrix.mean(dim=1, keepdim=True) + matrix.mean()


def _standardized(matrix: Tensor) -> Tensor:
    """Centered, in units of the deviation that the sum over a random permutation has (Hoeffding 1951)."""
    centered = _centered(matrix.double())
    deviation = (centered.square().sum() / (len(centered) - 1)).sqrt()
    # Images that all look alike leave nothing but rounding to compare.
    return torch.zeros_like(centered) if deviation < 1e-6 else centered / deviation


def _agreement(standardized: Tensor, classes: Tensor) -> float:
    """How far the order `classes` stands above random ones, in standard deviations."""
    return float(standardized.gather(1, classes[:, None]).sum())


def _assign(gain: Tensor) -> Tensor:
    """(C,): the class of each block, each class once, with the largest sum of gains."""
    return torch.from_numpy(linear_sum_assignment(gain.double().numpy(), maximize=True)[1])


def _judge_blocks(logp: Tensor, agreement: float) -> OrderVerdict:
    """The order is right on the whole; find blocks that stand at each other's place."""
    classes = logp.shape[1]
    ipc = len(logp) // classes
    # One image that looks like anything but its class must not decide over its block.
    robust = torch.log((1 - _UNLIKE) * logp.exp() + _UNLIKE / classes)
    shown = _moved_blocks(_centered(_group_means(robust, False)) * ipc, ipc)
    moved = int((shown != torch.arange(classes)).sum())
    if not moved:
        return OrderVerdict("L001", _WORDS["L001"], class_labels(classes, ipc), agreement)
    few = moved <= max(2, _FEW_MOVED * classes)
    code, words = ("L007", "right but for a few classes") if few else ("L008", "right in part only")
    return OrderVerdict(code, words, shown.repeat_interleave(ipc), agreement)


def _moved_blocks(evidence: Tensor, ipc: int) -> Tensor:
    """(C,): the class that each block shows, its own unless the evidence for moving pays for all that was tried.

    evidence: (C, C), summed log-probabilities. As images of a block resemble one another and are no real ones, it
    is scaled down to what makes the blocks' classes most probable. A swapped pair must outweigh the log odds of one
    pair against all, so that each moved block pays half of them.
    """
    classes = len(evidence)
    pairs = classes * (classes - 1) / 2
    price = math.log(pairs / _PAIRS_ODDS) / 2 + _FEW_IMAGES / ipc
    shown = torch.arange(classes)
    for _ in range(3):
        likelihoods = [torch.log_softmax(scale * evidence, dim=1).gather(1, shown[:, None]).mean() for scale in _SCALES]
        scale = _SCALES[torch.stack(likelihoods).argmax()]
        shown = _assign(scale * evidence + price * torch.eye(classes))
    return shown


def _verdict_of(candidate: _Candidate, rows: int, agreement: float) -> OrderVerdict:
    labels = _row_labels(candidate, rows)
    return OrderVerdict(candidate.code, candidate.words, labels, agreement, candidate.interleaved)


def _judge_unknown(logp: Tensor, model: ClassModel, agreement: float) -> OrderVerdict:
    """No named order fits: the classes are shuffled, the rows are, or the images show no classes."""
    classes = logp.shape[1]
    for interleaved in (False, True):
        found = _cross_checked(logp, interleaved)
        if found is None or found[0] < _UNKNOWN_TELLING or found[1] < _SHARE_OF_REAL * model.real_gain:
            continue
        shown = _assign(_group_means(logp, interleaved))
        words = "shuffled" + (" and image by image, the classes in turn" if interleaved else ", class by class")
        candidate = _Candidate("L008", words, shown, interleaved)
        return _verdict_of(candidate, len(logp), found[0])
    if len(logp) > classes and class_information(logp) >= _INFORMATIVE * model.real_information:
        return OrderVerdict("L009", "shuffled image by image", None, agreement)
    return OrderVerdict("L010", "none that the images would tell", None, agreement)


def _cross_checked(logp: Tensor, interleaved: bool) -> tuple[float, float] | None:
    """Agreement and mean gain of the assignment found on one half of each group's images, on the other half.

    None with one image a class, which leaves nothing to check on.
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


def _finding(logp: Tensor, verdict: OrderVerdict, spec: DatasetSpec, where: str) -> Finding:
    titles = class_titles(spec.name)
    if verdict.code == "L001":
        return Finding("info", "L001", _right_message(logp, verdict, titles), where)
    if verdict.code == "L010":
        message = (
            f"Whether the rows are in the right order cannot be told: {_strength(verdict)}, "
            "so that the images show too little of their classes. Look at the contact sheet."
        )
        return Finding("warning", "L010", message, where)
    if verdict.labels is None:
        message = (
            f"The images look like images of {spec.name}, but the rows fit no order of the classes "
            f"({_strength(verdict)}): they seem shuffled one by one. No reordering can be found; make the set again "
            "with rows class by class."
        )
        return Finding("error", verdict.code, message, where)
    # Naming blocks that hold all classes would say nothing.
    named = "" if verdict.interleaved else f": {_moved_words(logp, verdict, titles)}"
    message = (
        f"The rows are not in the order of the labels; they are {verdict.words} ({_strength(verdict)}){named}. "
        "Put it right: ddkit check FILE --fix-order OUT"
    )
    return Finding("error", verdict.code, message, where)


def _strength(verdict: OrderVerdict) -> str:
    return f"{verdict.agreement:.1f} standard deviations above a random order"


def _right_message(logp: Tensor, verdict: OrderVerdict, titles: Sequence[str]) -> str:
    means = _centered(_group_means(logp, False))
    classes = len(means)
    own = means.diagonal()
    first = int((means.argmax(dim=1) == torch.arange(classes)).sum())
    worst = own.argsort()[: min(3, classes)].tolist()
    named = "; ".join(_block_words(block, len(logp) // classes, titles) for block in worst)
    return (
        f"The rows look right: {_strength(verdict)}; {first} of {classes} blocks look most like their own class. "
        f"Least like theirs: {named}."
    )


def _moved_words(logp: Tensor, verdict: OrderVerdict, titles: Sequence[str]) -> str:
    """Which blocks show what: swapped pairs by name, a shifted run as such, else those least like their class."""
    ipc = len(verdict.labels) // len(titles)
    shown = verdict.labels[::ipc]
    moved = (shown != torch.arange(len(shown))).nonzero().flatten().tolist()
    pairs = [(block, int(shown[block])) for block in moved if shown[shown[block]] == block and block < shown[block]]
    if verdict.code == "L007" and len(pairs) * 2 == len(moved):
        return "swapped are " + ", ".join(f"{a} ({titles[a]}) and {b} ({titles[b]})" for a, b in pairs[:_NAMED])
    if verdict.code in ("L007", "L008") and (step := _run_step(shown, moved)):
        return f"the blocks from {moved[0]} ({titles[moved[0]]}) to {moved[-1]} ({titles[moved[-1]]}) show the class " + (
            "after theirs" if step == 1 else "before theirs"
        )
    own = _centered(_group_means(logp, False)).diagonal()
    moved.sort(key=lambda block: float(own[block]))
    named = [f"{_block_words(b, ipc, titles)} show {int(shown[b])} ({titles[shown[b]]})" for b in moved[:_NAMED]]
    more = f"; and {len(moved) - _NAMED} more blocks" if len(moved) > _NAMED else ""
    return "; ".join(named) + more


def _run_step(shown: Tensor, moved: Sequence[int]) -> int:
    """1 or -1 where three blocks or more in a row show the class after or before theirs, the end one apart; else 0."""
    if len(moved) < 3 or moved[-1] - moved[0] + 1 != len(moved):
        return 0
    run = shown[moved[0] : moved[-1] + 1]
    here = torch.arange(moved[0], moved[-1] + 1)
    if torch.equal(run[:-1], here[:-1] + 1):
        return 1
    return -1 if torch.equal(run[1:], here[1:] - 1) else 0


def _block_words(block: int, ipc: int, titles: Sequence[str]) -> str:
    rows = f"rows {block * ipc}-{block * ipc + ipc - 1}" if ipc > 1 else f"row {block}"
    return f"{rows} ({block}, {titles[block]})"
