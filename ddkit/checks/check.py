"""Checking a submission for all that the official scorer would stumble over, or would score without noticing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddkit.challenge import CHALLENGE_DATASETS, TRACKS, DatasetSpec
from ddkit.checks.archive import TENSOR_ENDINGS, Member, read_members
from ddkit.data.store import ImageSet, dataset_spec, known_names, load_dataset
from ddkit.errors import DDKitError, InvalidSubmissionError, MissingDataError, UsageError
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.sets.distilled import check_command, dataset_of, likely_dataset
from ddkit.sets.findings import Finding, Report, report_of
from ddkit.sets.reading import describe_tensor, read_tensor, read_tensor_bytes

__all__ = ["Finding", "Report", "check_path", "check_tensor", "require_acceptable", "submission_files"]

_CHALLENGE_NAMES = tuple(spec.name for spec in CHALLENGE_DATASETS)
_MOST_ROWS_NAMED = 5


@dataclass(frozen=True)
class CheckSettings:
    """What to check for.

    ipc: images per class there must be; None for any whole number.
    meaning: also compare the images with the real ones: their order, their normalization, copies of test images.
    """

    ipc: int | None = TRACKS[1].ipc
    meaning: bool = True


def check_tensor(tensor: Tensor, dataset: str, *, settings: CheckSettings = CheckSettings(), where: str = "tensor") -> Report:
    """Check a tensor in memory.

    tensor: should be (num_classes * 10, 3, S, S) float32, normalized, rows class by class.
    dataset: a built-in or prepared dataset's name; UsageError for any other.
    """
    spec = dataset_spec(dataset)
    if tensor.device.type != "cpu":
        message = f"The tensor is on {tensor.device}: submit tensor.cpu()."
        return report_of([Finding("error", "T004", message, where)])
    if tensor.layout != torch.strided or tensor.is_quantized:
        message = "The tensor is sparse or quantized; the scorer takes a plain one."
        return report_of([Finding("error", "T008", message, where)])
    findings = describe_tensor(tensor, spec, where, ipc=settings.ipc)
    if any(finding.level == "error" for finding in findings):
        return report_of(findings)
    return report_of(findings + _value_findings(tensor, spec, settings, where))


def check_path(
    path: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    settings: CheckSettings = CheckSettings(),
    progress: Listener = ignore,
) -> Report:
    """Check a submission folder, one `.pt` file, or a submission zip, without executing anything in it.

    dataset: of a single file; None takes it from the file's name.
    Raises UsageError where the dataset of a single file cannot be told.
    """
    path = Path(path)
    if path.is_dir():
        return _check_folder(path, settings, progress)
    if not path.exists():
        return report_of([Finding("error", "F001", f"{path} does not exist. Make it: ddkit generate.", path.name)])
    if path.suffix.lower() == ".zip":
        return _check_zip(path, settings, progress)
    name = dataset or (path.stem if path.stem in known_names() else dataset_of(path))
    spec = dataset_spec(name)
    progress(Progress(f"checking {path.name}", 0, 1))
    report = report_of(_file_findings(path, spec, settings))
    progress(Progress(f"checking {path.name}", 1, 1))
    return report


def require_acceptable(
    path: str | os.PathLike[str], dataset: str, *, ignore_codes: Collection[str] = (), progress: Listener = ignore
) -> Report:
    """Check one `.pt` file of any number of images a class; raises InvalidSubmissionError with the first error found.

    ignore_codes: findings that do not count.
    """
    report = check_path(path, dataset=dataset, settings=CheckSettings(ipc=None), progress=progress).ignoring(ignore_codes)
    if not report.ok:
        raise InvalidSubmissionError(f"{path}: {report.findings[0].message}", f"See: {check_command(path, dataset)}")
    return report


def submission_files(folder: str | os.PathLike[str]) -> tuple[list[Path], list[Finding]]:
    """The tensors of a submission folder that belong into its zip, in the scorer's order, and what is amiss about them.

    A folder with a file of the challenge must hold the challenge's two; one without is practice on other datasets.
    """
    folder = Path(folder)
    tensors = sorted(path for path in folder.iterdir() if path.suffix.lower() in TENSOR_ENDINGS)
    findings = name_findings([path.name for path in tensors], folder.name or str(folder))
    usable = [path for path in tensors if path.suffix == ".pt" and path.stem in known_names()]
    if any(path.stem in _CHALLENGE_NAMES for path in usable):
        for path in usable:
            if path.stem not in _CHALLENGE_NAMES:
                message = f"'{path.name}' is of no dataset of the challenge and is left aside."
                findings.append(Finding("warning", "F020", message, path.name))
        usable = [path for path in usable if path.stem in _CHALLENGE_NAMES]
    for path in usable:
        # Unlike Path.resolve, this takes links that lead in a circle.
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(os.path.realpath(folder)):
            message = f"{path.name} is a link to {target}, outside the folder. Put the file itself there."
            findings.append(Finding("error", "F013", message, path.name))
    return usable, findings


def name_findings(names: Sequence[str], where: str) -> list[Finding]:
    """F002, F003, F011 and F020 on the names of the tensors in a folder or at a zip's root."""
    findings = []
    known = known_names()
    present: set[str] = set()
    for name in names:
        stem, ending = os.path.splitext(name)
        if ending.lower() == ".pt" and stem.lower() in known:
            present.add(stem.lower())
            if name != f"{stem.lower()}.pt":
                message = f"The name must be '{stem.lower()}.pt', in lower case: the scorer opens that very name."
                findings.append(Finding("error", "F011", message, name))
        elif name != f"{stem}.pt" or stem not in known:
            likely = likely_dataset(name)
            offer = f" If it is the tensor for {likely}, rename it to {likely}.pt." if likely else ""
            message = f"'{name}' is not named after a dataset and is left aside.{offer}"
            findings.append(Finding("warning", "F020", message, name))
    missing = [name for name in _CHALLENGE_NAMES if name not in present]
    if not present & set(known):
        message = "There is no tensor to submit. The challenge takes cifar100.pt and tinyimagenet.pt: ddkit generate."
        findings.append(Finding("error", "F002", message, where))
    elif len(missing) == len(_CHALLENGE_NAMES):
        practice = ", ".join(sorted(present & set(known)))
        findings.append(Finding("info", "F021", f"Practice on {practice}, which the challenge does not score.", where))
    elif missing:
        message = (
            f"{missing[0]}.pt is missing; the scorer opens both files of the challenge and stops without it. "
            f"Make it: ddkit generate --dataset {missing[0]}"
        )
        findings.append(Finding("error", "F003", message, where))
    return findings


def _check_folder(folder: Path, settings: CheckSettings, progress: Listener) -> Report:
    files, findings = submission_files(folder)
    for done, path in enumerate(files):
        progress(Progress("checking", done, len(files), "files"))
        findings += _file_findings(path, dataset_spec(path.stem), settings)
    progress(Progress("checking", len(files), len(files), "files"))
    return report_of(findings)


def _check_zip(path: Path, settings: CheckSettings, progress: Listener) -> Report:
    known = known_names()
    largest = max(_expected_bytes(spec, settings.ipc or TRACKS[1].ipc) for spec in _known_specs())

    def wanted(member_name: str) -> bool:
        return member_name.endswith(".pt") and member_name[: -len(".pt")] in known

    findings: list[Finding] = []
    names: list[str] = []
    for member in read_members(path, wanted, largest_bytes=2 * largest):
        if isinstance(member, Finding):
            findings.append(member)
            continue
        names.append(member.name)
        if member.data is not None:
            progress(Progress(f"checking {member.name}", len(names), None, "files"))
            findings += _member_findings(member, settings)
    if not any(finding.code in ("F005", "F018") for finding in findings):
        tensors = [name for name in names if name.lower().endswith(TENSOR_ENDINGS)]
        of_challenge = [name for name in tensors if name.lower().removesuffix(".pt") in _CHALLENGE_NAMES]
        if of_challenge:  # nothing is left aside then, as whoever opens the zip gets all of it
            message = "The zip is to hold the challenge's two tensors only. Pack with ddkit pack."
            findings += [Finding("error", "F009", message, name) for name in tensors if name not in of_challenge]
        findings += name_findings(of_challenge or tensors, path.name)
    return report_of(findings)


def _file_findings(path: Path, spec: DatasetSpec, settings: CheckSettings) -> list[Finding]:
    tensor, findings = read_tensor(path, spec, ipc=settings.ipc)
    return findings if tensor is None else findings + _value_findings(tensor, spec, settings, path.name)


def _member_findings(member: Member, settings: CheckSettings) -> list[Finding]:
    spec = dataset_spec(Path(member.name).stem)
    tensor, findings = read_tensor_bytes(member.data, member.name, spec, ipc=settings.ipc)
    return findings if tensor is None else findings + _value_findings(tensor, spec, settings, member.name)


def _value_findings(tensor: Tensor, spec: DatasetSpec, settings: CheckSettings, where: str) -> list[Finding]:
    """What the numbers themselves tell, and their comparison with the real images."""
    tensor = tensor.detach().contiguous()
    finite = torch.isfinite(tensor).flatten(1).all(dim=1)
    if not finite.all():
        rows = (~finite).nonzero().flatten().tolist()
        named = ", ".join(map(str, rows[:_MOST_ROWS_NAMED])) + (", ..." if len(rows) > _MOST_ROWS_NAMED else "")
        message = f"{len(rows)} images hold values that are no finite numbers: the network learns nothing from them."
        return [Finding("error", "T009", message, f"{where}, rows {named}")]
    if not settings.meaning:
        return []
    # Imported here, as the shape and the files can be checked without scipy and the classifiers.
    from ddkit.checks.content import content_findings

    test = _prepared(spec.name, "test")
    findings = meaning_findings(tensor, spec, where)
    return findings + content_findings(tensor, spec, where, test_images=None if test is None else test.images)


def meaning_findings(tensor: Tensor, spec: DatasetSpec, where: str) -> list[Finding]:
    """What the values are normalized with, which order the rows are in, whether the images are upright (codes N, L).

    tensor: (C * ipc, 3, S, S) float32, finite.
    """
    from ddkit.checks.normalization import normalization_findings
    from ddkit.checks.order import NAMED_ORDERS, order_findings
    from ddkit.checks.orientation import turned_findings

    values = normalization_findings(tensor, spec, where)
    if any(finding.level == "error" for finding in values):
        # Values that are not normalized look like no class at all: their order would be judged wrongly.
        return values
    order = order_findings(tensor, spec, where)
    if any(finding.code in NAMED_ORDERS for finding in order):
        return values + order
    # Turned images look like few classes: what their order seems to be says nothing.
    return values + (turned_findings(tensor, spec, where) or order)


def _prepared(name: str, split: str) -> ImageSet | None:
    try:
        return load_dataset(name, split)
    except (MissingDataError, UsageError):
        return None
    except DDKitError:
        # A damaged store is no fault of the submission; `order_findings` says that it was not compared.
        return None


def _known_specs() -> Iterator[DatasetSpec]:
    """Of all known datasets but those whose store is damaged, which is no fault of the submission."""
    for name in known_names():
        with contextlib.suppress(DDKitError):
            yield dataset_spec(name)


def _expected_bytes(spec: DatasetSpec, ipc: int) -> int:
    """Of a tensor of so many images a class in float32."""
    return ipc * spec.num_classes * 3 * spec.image_size**2 * 4
