"""Sets that others published, made ready for an evaluation: whitening is undone, and values are normalized as they should."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddkit.challenge import DatasetSpec
from ddkit.checks.check import check_set
from ddkit.checks.normalization import Constants, judge_normalization, named_constants
from ddkit.data.images import normalize
from ddkit.data.prepare import open_dataset
from ddkit.data.store import dataset_spec, known_names
from ddkit.data.whitening import ZCA_EPSILON, undo_zca
from ddkit.errors import InvalidSubmissionError, UsageError, did_you_mean
from ddkit.evaluation.sources import hash_of
from ddkit.evaluation.tracks import images_per_class
from ddkit.runtime.files import sha256_of
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.distilled import DistilledSet, dataset_of
from ddkit.sets.published import LabeledImages, read_published

KIND_PUBLISHED = "published"
_OTHER_ROUNDING, _WHITENED = "N005", "N012"
_SLACK = 0.002  # half a step of 8 bits: rounding is not outside


@dataclass(frozen=True)
class Conversion:
    """How a published set is converted to what the challenge trains on.

    zca: undo ZCA whitening (see `ddkit.data.whitening`). argmax: reduce soft labels to their largest class.
    normalization: "auto" finds it; else a name of `ddkit.checks.normalization.named_constants`, or six numbers, the mean
    of each channel and then the standard deviations: "0.5,0.5,0.5/0.2,0.2,0.2".
    Raises UsageError for an unknown normalization, and for one that is given with zca, which whitens plain pixels.
    """

    zca: bool = False
    argmax: bool = False
    normalization: str = "auto"

    def __post_init__(self) -> None:
        if self.zca and self.normalization != "auto":
            raise UsageError("--zca and --normalization exclude each other.", "ZCA whitens pixels that are not normalized.")
        if self.normalization != "auto":
            _given(self.normalization, dataset_spec("glyphs"))


@dataclass(frozen=True)
class PublishedSet:
    """A published set, ready to be trained on.

    images: (N, 3, S, S) float32, normalized as the challenge does. labels: (N,) int64, in any order.
    sha256: of the file; of pixels and labels for a folder and for two files. converted: what it was, as a phrase.
    notes: sentences on what was found and done. provenance: the same for the record.
    """

    images: Tensor
    labels: Tensor
    spec: DatasetSpec
    sha256: str
    path: Path
    converted: str
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]

    kind = KIND_PUBLISHED

    def check(self, ignore_codes: Collection[str], progress: Listener = ignore) -> None:
        """Raise InvalidSubmissionError where `ddkit check` would find an error in the converted rows, sorted by class.

        Nothing is checked if the classes have unequal numbers of images.
        """
        low, high = images_per_class(self.labels, self.spec.num_classes)
        if low != high:
            return
        order = self.labels.argsort(stable=True)
        ordered = DistilledSet(self.images[order].contiguous(), self.spec, path=self.path)
        report = check_set(ordered, progress=progress).ignoring(ignore_codes)
        if not report.ok:
            first = report.findings[0]
            raise InvalidSubmissionError(
                f"{self.path}, sorted by class: {first.message}", f"To evaluate it all the same: --ignore {first.code}"
            )


def open_published(
    path: Path, dataset: str | None = None, conversion: Conversion = Conversion(), *, progress: Listener = ignore
) -> PublishedSet:
    """Read a published set and convert it.

    dataset: None takes it from the file's or folder's name. The training images of the dataset are needed for zca only.
    Raises UsageError if the dataset is unknown, InvalidSubmissionError for a file without images and labels, and for values
    that cannot be converted, MissingDataError if the dataset is not prepared, BadFileError if the system refuses the file.
    """
    spec = dataset_spec(_dataset(path, dataset))
    read = read_published(path, spec, argmax=conversion.argmax)
    if conversion.zca:
        words = f"ZCA whitening of strength {ZCA_EPSILON:g} undone"
        images, notes = _without_zca(read, spec, progress)
    else:
        images, words, notes = _normalized(read, spec, path, conversion.normalization)
    if read.reduced:
        words = ", ".join(filter(None, (words, "soft labels reduced to their largest class")))
    return PublishedSet(
        images,
        read.labels,
        spec,
        sha256_of(path) if read.one_file else hash_of(read.images, read.labels),
        path,
        f"{read.layout}, {words}" if words else read.layout,
        (f"{path} holds {read.layout}: {len(images):,} images.", *read.notes, *notes),
        {"kind": KIND_PUBLISHED, "layout": read.layout, "converted": words, "conversion": asdict(conversion)},
    )


def _dataset(path: Path, dataset: str | None) -> str:
    if not path.is_dir():
        return dataset_of(path, dataset)
    name = dataset or path.resolve().name.lower()
    if not dataset and name not in known_names():
        raise UsageError(f"{path} is not named after a known dataset.", "Add --dataset NAME.")
    return name


def _without_zca(read: LabeledImages, spec: DatasetSpec, progress: Listener) -> tuple[Tensor, list[str]]:
    """The images as the challenge normalizes them, and sentences on what was undone."""
    if read.images.dtype == torch.uint8:
        raise InvalidSubmissionError(f"These are 8-bit pixels, which were never whitened: {read.layout}.", "Leave --zca out.")
    train = open_dataset(spec.name, "train", progress=progress)
    pixels = undo_zca(read.images, spec.name, train, progress=progress)
    outside = float(((pixels < -_SLACK) | (pixels > 1 + _SLACK)).float().mean())
    notes = [
        f"The whitening was undone as trajectory matching does it, with epsilon {ZCA_EPSILON:g}. {outside:.1%} of the values "
        "are then outside [0, 1]; many are if the whitening was another one."
    ]
    if (verdict := judge_normalization(read.images.float(), spec)) is None or verdict.finding.code != _WHITENED:
        notes.append("warning: The values do not look whitened. Without --zca, ddkit says how they are normalized.")
    return normalize(pixels, spec), notes


def _normalized(read: LabeledImages, spec: DatasetSpec, path: Path, given: str) -> tuple[Tensor, str, list[str]]:
    """The images as the challenge normalizes them, what that changed as a phrase ("" for nothing), and sentences on it."""
    if read.images.dtype == torch.uint8:
        if given != "auto":
            raise InvalidSubmissionError(
                f"These are 8-bit pixels, which nobody has normalized: {read.layout}.", "Leave --normalization out."
            )
        return normalize(read.images, spec), "", [f"Its 8-bit pixels were normalized with {spec.name}'s constants."]
    right = named_constants(spec)["challenge"]
    if given != "auto":
        found = _given(given, spec)
        title = found.title
        notes = [f"Normalization, as --normalization says: {found.title}."]
    else:
        verdict = judge_normalization(read.images, spec)
        if verdict is None:
            note = f"Its values are taken as normalized with {spec.name}'s constants, which their mean and spread agree with."
            return read.images, "", [note]
        if verdict.constants is None:
            level, code, message = verdict.finding.level, verdict.finding.code, verdict.finding.message
            remedy = "If it was whitened as in trajectory matching: --zca" if code == _WHITENED else _SAY
            if level == "error":
                raise InvalidSubmissionError(f"{path}: {message}", remedy)
            note = f"{message} Its values are taken as normalized with {spec.name}'s constants. {_SAY}"
            return read.images, "", [note]
        found, title = verdict.constants, verdict.constants.title
        if verdict.finding.code == _OTHER_ROUNDING:
            title = f"another rounding of {right.title}"
        notes = [verdict.finding.message.partition(" Convert the file's tensor:")[0]]
    if (found.mean, found.std) == (right.mean, right.std):
        return read.images, "", notes
    theirs_mean, theirs_std = (torch.tensor(values).view(3, 1, 1) for values in (found.mean, found.std))
    unit = read.images * theirs_std + theirs_mean
    return normalize(unit, spec), f"normalized again from {title}", [*notes, "Its values were converted to the challenge's."]


_SAY = "If they were normalized otherwise, say how: --normalization NAME"


def _given(text: str, spec: DatasetSpec) -> Constants:
    """The constants that the user names or writes as six numbers. Raises UsageError."""
    named = named_constants(spec)
    if text in named:
        return named[text]
    if re.fullmatch(r"[-+.\deE]+(,[-+.\deE]+){2}/[-+.\deE]+(,[-+.\deE]+){2}", text):
        try:
            mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
        except ValueError:
            mean, std = (), ()
        if len(mean) == len(std) == 3 and min(std) > 0:
            return Constants("the given constants", (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    raise UsageError(
        f"'{text}' is not a way to normalize.",
        f"{did_you_mean(text, ('auto', *named))} Or write the means and deviations: 0.5,0.5,0.5/0.2,0.2,0.2",
    )
