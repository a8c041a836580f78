"""Find rows that are out of step with the labels: shifted by some rows, or exchanged between neighboring blocks.

A block's mean still shows its class when a few of its rows belong to another one, so that rows are judged here by the sum
of log-probabilities that they gain under another label. A change is believed only if its gain pays for all changes tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_SCALES = torch.logspace(-2, 0, 21)  # of the evidence of one row
_FARTHEST = 60  # rows of a shift; at most two blocks
_MOST_SHIFTS = 4  # of different parts of the rows
_WHOLE = 12.0  # nats by which a shift of a part of the rows must beat that of all rows
_EXCHANGE_PRICE = 15.0  # nats, for the rows at one position of every other block
_SAME_GAIN = 0.9  # of the exchange's gain, from which a shift explains the same rows more simply
_KEPT = 50.0  # nats for keeping a row's label when the numbers of rows are balanced
_STILL_GAINED = 0.8  # of the gain, by the balanced labels


@dataclass(frozen=True)
class RowOrder:
    """Labels of rows that are out of step. labels: (N,) int64, each class equally often. words: what is wrong."""

    code: str
    labels: Tensor
    words: str


def find_row_order(evidence: Tensor, labels: Tensor) -> RowOrder | None:
    """The labels that the rows show, where they are clearly not `labels`; None otherwise.

    evidence: (N, C) log-probabilities without row and column means. labels: (N,) int64, C blocks of N / C rows.
    """
    rows, classes = evidence.shape
    ipc = rows // classes
    if ipc < 2:
        return None
    evidence = evidence.double()
    # Scaled down to what makes the labels, or the exchanged ones, most probable, as images of a set are not as clear as
    # real ones. If no row shows the class of its label, the scale cannot be told from the labels alone.
    alternatives = (labels, _exchanged(evidence, labels, ipc)[0])
    likelihoods = [
        (float(torch.log_softmax(scale * evidence, dim=1).gather(1, of[:, None]).mean()), float(scale))
        for scale in _SCALES
        for of in alternatives
    ]
    evidence = evidence * max(likelihoods)[1]
    shifted, shift_gain, shift_words = _shifted(evidence, labels, ipc)
    exchanged, exchange_gain, exchange_words = _exchanged(evidence, labels, ipc)
    gain = max(shift_gain, exchange_gain)
    if gain <= 0:
        return None
    if shift_gain >= _SAME_GAIN * exchange_gain:
        code, found, words = "L013", shifted, shift_words
    else:
        code, found, words = "L014", exchanged, exchange_words
    found = _balanced(evidence, found, ipc)
    # A block that only looks like another class gains nothing here, because no rows elsewhere show its own.
    if float((evidence.gather(1, found[:, None]) - evidence.gather(1, labels[:, None])).sum()) < _STILL_GAINED * gain:
        return None
    return RowOrder(code, found, words)


def _shifted(evidence: Tensor, labels: Tensor, ipc: int) -> tuple[Tensor, float, str]:
    """Parts of the rows that stand some places too early or too late: the labels, the gain in nats, and words."""
    rows = len(labels)
    # Shifts by whole blocks are orders of blocks.
    shifts = [sign * step for step in range(1, min(2 * ipc, _FARTHEST + 1)) if step != ipc for sign in (1, -1)]
    price = 2 * math.log(rows**2 * len(shifts))
    found, gain = labels, 0.0
    words: list[str] = []
    for _ in range(_MOST_SHIFTS):
        own = evidence.gather(1, found[:, None]).flatten()
        best = (price, 0, 0, 0)
        for shift in shifts:
            gains = evidence.gather(1, labels.roll(-shift)[:, None]).flatten() - own
            sums = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
            lowest, first = sums.cummin(0)
            end = int((sums - lowest).argmax())
            part = (float(sums[end] - lowest[end]), shift, int(first[end]), end)
            if not words and part[0] - float(sums[-1]) < _WHOLE:
                part = (float(sums[-1]), shift, 0, rows)
            best = max(best, part)
        part_gain, shift, start, end = best
        if not shift:
            break
        found = torch.cat([found[:start], labels.roll(-shift)[start:end], found[end:]])
        gain += part_gain
        which = "all rows" if end - start == rows else f"rows {start}-{end - 1}"
        words.append(
            f"{which} stand {abs(shift)} {'place' if abs(shift) == 1 else 'places'} too {'early' if shift > 0 else 'late'}"
        )
    return found, gain, " and ".join(words)


def _exchanged(evidence: Tensor, labels: Tensor, ipc: int) -> tuple[Tensor, float, str]:
    """Rows at the same positions of every block, or of every other one, that show the class of a neighboring block."""
    blocks = labels.view(-1, ipc)
    found = blocks.clone()
    by_block = evidence.view(len(blocks), ipc, -1)
    own = by_block.gather(2, blocks[..., None])[..., 0]
    gain = 0.0
    words: list[str] = []
    for step, side in ((1, "after"), (-1, "before")):
        neighbors = blocks.roll(-step, 0)
        gains = by_block.gather(2, neighbors[..., None])[..., 0] - own
        for parity, which in ((0, "even"), (1, "odd")):
            sums = gains[parity::2].sum(dim=0)
            moved = (sums > _EXCHANGE_PRICE).nonzero().flatten()
            if len(moved):
                last = len(blocks) - 1 if step == 1 else 0  # the block whose neighbor is at the other end of the set
                wraps = bool(gains[last, moved].sum() > 0)
                taken = [block for block in range(parity, len(blocks), 2) if block != last or wraps]
                found[torch.tensor(taken)[:, None], moved] = neighbors[taken][:, moved]
                gain += float(sums[moved].sum())
                places = ", ".join(str(place) for place in moved.tolist())
                words.append(f"the images at the places {places} of {which} blocks show the class {side} theirs")
    return found.flatten(), gain, "; ".join(words)


def _balanced(evidence: Tensor, labels: Tensor, ipc: int) -> Tensor:
    """The nearest labels in which each class occurs `ipc` times, with the rows moved that show their class least."""
    classes = evidence.shape[1]
    if bool((torch.bincount(labels, minlength=classes) == ipc).all()):
        return labels
    gain = evidence.clone()
    gain[torch.arange(len(labels)), labels] += _KEPT
    slots = torch.arange(classes).repeat_interleave(ipc)
    return slots[torch.from_numpy(linear_sum_assignment(gain[:, slots].numpy(), maximize=True)[1])]
