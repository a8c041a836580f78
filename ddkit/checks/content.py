"""Find blank images and copies, within a set and from the test set, and summarize the range of the values."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.data.images import denormalize, to_uint8
from ddkit.errors import counted, first_few
from ddkit.sets.findings import Finding

_BLANK = 0.01  # standard deviation in units of [0, 1]; two and a half 8-bit steps
_THUMB = 8  # pixels of the thumbnails that candidates are found by
_THUMB_ALIKE = 0.97  # correlation of thumbnails
_ALIKE = 0.95  # correlation of the images themselves, channels together
_CLOSE = 0.08  # root mean square difference in units of [0, 1]: two plain skies correlate, but differ in color
_BATCH = 1000
_REMARKED = 0.01  # share of the rows up to which near copies are only remarked on


def content_findings(images: Tensor, spec: DatasetSpec, where: str, *, test_images: Tensor | None = None) -> list[Finding]:
    """Look for blanks and copies, and summarize the values (codes C001 to C008; a table is in submission/README.md).

    images: (C * ipc, 3, S, S) float32, normalized. test_images: (M, 3, S, S) uint8, the real test set; if None,
    copies of test images are not looked for.
    """
    pixels = denormalize(images, spec)
    blank = pixels.flatten(2).std(dim=2).amax(dim=1) < _BLANK
    findings = []
    if rows := blank.nonzero().flatten().tolist():
        images_are = counted(len(rows), "image is", "images are")
        message = f"{images_are} blank (a single color): rows {first_few([*map(str, rows)])}."
        findings.append(Finding("warning", "C001", message, where))
    prints = _fingerprints(to_uint8(pixels))
    unlike = (~blank).nonzero().flatten()
    same: dict[bytes, list[int]] = defaultdict(list)
    for row in unlike.tolist():
        same[prints[row]].append(row)
    exact = [(rows[0], row) for rows in same.values() for row in rows[1:]]
    others = pixels[unlike]
    pairs = {(int(unlike[a]), int(unlike[b])) for a, b in map(sorted, _near_copies(others, others))}
    near = sorted((a, b) for a, b in pairs if prints[a] != prints[b])
    ipc = len(images) // spec.num_classes
    findings += _pair_findings(exact, ("C002", "C003"), "the same at 8 bits", 0, ipc, where)
    # Real images hold a few pairs that look alike; many pairs are a mistake.
    findings += _pair_findings(near, ("C004", "C005"), "nearly the same", int(_REMARKED * len(pixels)), ipc, where)
    if test_images is not None:
        findings += _test_findings(pixels, prints, unlike, test_images, where)
    return [*findings, _summary(pixels, spec, where)]


def _pair_findings(
    pairs: Sequence[tuple[int, int]], codes: tuple[str, str], words: str, remarked: int, ipc: int, where: str
) -> list[Finding]:
    """One finding on pairs within a class and one on pairs across classes; up to `remarked` pairs are only a remark."""
    findings = []
    for code, kind, inside in ((codes[0], "one class", True), (codes[1], "different classes", False)):
        chosen = [(a, b) for a, b in pairs if (a // ipc == b // ipc) == inside]
        if chosen:
            pairs_are = counted(len(chosen), f"pair of images of {kind} is", f"pairs of images of {kind} are")
            message = f"{pairs_are} {words}: rows {_pair_words(chosen)}."
            findings.append(Finding("warning" if len(chosen) > remarked else "info", code, message, where))
    return findings


def _test_findings(pixels: Tensor, prints: Sequence[bytes], unlike: Tensor, test_images: Tensor, where: str) -> list[Finding]:
    """Findings C006 and C007: images that are in the real test set, pixel by pixel or nearly."""
    test_rows = {fingerprint: row for row, fingerprint in enumerate(_fingerprints(test_images))}
    exact = [(row, test_rows[prints[row]]) for row in unlike.tolist() if prints[row] in test_rows]
    nearest: dict[int, int] = {}
    for row, other in _near_copies(pixels[unlike], test_images):
        nearest.setdefault(int(unlike[row]), other)
    near = sorted((row, other) for row, other in nearest.items() if prints[row] not in test_rows)
    findings = []
    if exact:
        are_test_images = counted(len(exact), "image is a test image", "images are test images")
        message = f"{are_test_images}, pixel by pixel: {_pair_words(exact, ' is test image ')}."
        findings.append(Finding("warning", "C006", message, where))
    if near:
        are_nearly = counted(len(near), "image is nearly a test image", "images are nearly test images")
        message = f"{are_nearly}: {_pair_words(near, ' is like test image ')}."
        level = "warning" if len(near) > _REMARKED * len(pixels) else "info"
        findings.append(Finding(level, "C007", message, where))
    return findings


def _near_copies(images: Tensor, others: Tensor) -> Iterator[tuple[int, int]]:
    """(row, other row) of images that are nearly one of the others, or a mirrored one; of each, the most similar only.

    images: (N, 3, S, S) float in units of [0, 1]. others: the same or uint8, or `images` itself.
    """
    thumbs = torch.cat([_unit_thumbs(_in_unit(batch)) for batch in others.split(_BATCH)])
    for candidates in (images, images.flip(-1)):
        for start, ours in zip(range(0, len(images), _BATCH), _unit_thumbs(candidates).split(_BATCH), strict=False):
            likeness = ours @ thumbs.mT
            if others is images:  # an image is no copy of itself, nor of its mirror image if it is symmetric
                likeness.diagonal(start).fill_(-1)
            values, columns = likeness.max(dim=1)
            for row in (values > _THUMB_ALIKE).nonzero().flatten().tolist():
                other = int(columns[row])
                if _really_alike(candidates[start + row], _in_unit(others[other])):
                    yield start + row, other


def _in_unit(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _unit_thumbs(pixels: Tensor) -> Tensor:
    """Thumbnails without their mean, scaled to length one: (N, 3 * 8 * 8)."""
    thumbs = F.adaptive_avg_pool2d(pixels, _THUMB).flatten(1)
    return F.normalize(thumbs - thumbs.mean(dim=1, keepdim=True), dim=1)


def _really_alike(first: Tensor, second: Tensor) -> bool:
    if float((first - second).square().mean().sqrt()) > _CLOSE:
        return False
    return float(F.cosine_similarity((first - first.mean()).flatten(), (second - second.mean()).flatten(), dim=0)) > _ALIKE


def _fingerprints(images: Tensor) -> list[bytes]:
    """A hash of each (3, S, S) uint8 image."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images.contiguous().numpy()]


def _summary(pixels: Tensor, spec: DatasetSpec, where: str) -> Finding:
    outside = float(((pixels < -0.002) | (pixels > 1.002)).float().mean())
    black, white = float((pixels <= 0.002).float().mean()), float((pixels >= 0.998).float().mean())
    mean, std = pixels.mean(dim=(0, 2, 3)).tolist(), pixels.std(dim=(0, 2, 3)).tolist()
    message = (
        f"{len(pixels)} images, {len(pixels) // spec.num_classes} of each of {spec.num_classes} classes. In units of "
        f"[0, 1]: from {float(pixels.min()):.2f} to {float(pixels.max()):.2f}, {outside:.1%} of the values outside, "
        f"{black:.1%} at or below black, {white:.1%} at or above white; channels' means "
        f"{', '.join(f'{value:.2f}' for value in mean)}, deviations {', '.join(f'{value:.2f}' for value in std)}."
    )
    return Finding("info", "C008", message, where)


def _pair_words(pairs: Sequence[tuple[int, int]], between: str = " and ") -> str:
    return first_few([f"{a}{between}{b}" for a, b in pairs], joint="; ")
