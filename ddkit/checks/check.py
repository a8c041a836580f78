"""Check a submission for everything that the official scorer fails on, or scores without noticing a mistake."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ddkit.challenge import CHALLENGE_DATASETS, TRACKS, DatasetSpec
from ddkit.checks.archive import TENSOR_ENDINGS, read_members
from ddkit.checks.content import content_findings
from ddkit.checks.normalization import judge_normalization
from ddkit.checks.order import order_findings
from ddkit.data.store import dataset_spec, known_names, load_dataset
from ddkit.errors import DDKitError, InvalidSubmissionError, UsageError, counted, first_few
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.sets.distilled import (
    BASELINE_KINDS,
    KIND_GENERATED,
    DistilledSet,
    check_command,
    dataset_of,
    generate_command,
    likely_dataset,
    read_provenance,
)
from ddkit.sets.findings import Finding, Report, report_of
from ddkit.sets.reading import describe_tensor, read_tensor, read_tensor_bytes

_CHALLENGE_NAMES = tuple(spec.name for spec in CHALLENGE_DATASETS)
_MADE_BY_CLASS = (KIND_GENERATED, *BASELINE_KINDS)


def check_set(distilled: DistilledSet, *, ipc: int | None = None, progress: Listener = ignore) -> Report:
    """Check a distilled set that was read with `read_set`, or made in memory.

    ipc: the images per class that there must be; None accepts any whole number.
    progress: hears of the classifier that is fitted on the real images of a dataset once.
    """
    where = distilled.path.name if distilled.path else "tensor"
    tensor, spec = distilled.images, distilled.spec
    if tensor.device.type != "cpu":
        return report_of([Finding("error", "T004", f"The tensor is on {tensor.device}. Submit tensor.cpu().", where)])
    if tensor.layout != torch.strided or tensor.is_quantized:
        message = "The tensor is sparse or quantized. The scorer expects a dense float32 tensor."
        return report_of([Finding("error", "T008", message, where)])
    findings = [*distilled.warnings, *describe_tensor(tensor, spec, where, ipc=ipc)]
    refused = any(finding.level == "error" for finding in findings)
    kind = distilled.provenance.get("kind")
    return report_of(_findings_on(None if refused else tensor, findings, spec, where, progress, lambda: kind in _MADE_BY_CLASS))


def check_tensor(tensor: Tensor, dataset: str, *, ipc: int | None = TRACKS[1].ipc, progress: Listener = ignore) -> Report:
    """Check a tensor in memory.

    tensor: should be (num_classes * ipc, 3, S, S) float32, normalized, with its rows class by class.
    dataset: the name of a built-in or prepared dataset. Raises UsageError for any other name.
    """
    return check_set(DistilledSet(tensor, dataset_spec(dataset)), ipc=ipc, progress=progress)


def check_path(
    path: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    ipc: int | None = TRACKS[1].ipc,
    progress: Listener = ignore,
) -> Report:
    """Check a submission folder, one `.pt` file, or a submission zip, without executing anything in it.

    dataset: of a single file; None takes it from the file's name, or from the JSON next to it.
    Raises UsageError if the dataset of a single file is unknown, and if one is given for a folder or a zip.
    """
    path = Path(path)
    if dataset is not None and (path.is_dir() or path.suffix.lower() == ".zip"):
        remedy = "In a folder or a zip, the names of the files give the dataset."
        raise UsageError("--dataset applies to a single file.", remedy)
    if not path.exists():
        command = "ddkit pack" if path.suffix.lower() == ".zip" else generate_command()
        message = f"{path} does not exist. Check the path, or make one: {command}"
        return report_of([Finding("error", "F001", message, path.name)])
    if path.suffix.lower() == ".zip" and not path.is_dir():
        return _check_zip(path, ipc, progress)
    findings: list[Finding] = []
    if path.is_dir():
        files, findings = submission_files(path)
        specs = [dataset_spec(file.stem) for file in files]
    else:
        files, specs = [path], [dataset_spec(dataset or (path.stem if path.stem in known_names() else dataset_of(path)))]
    for done, (file, spec) in enumerate(zip(files, specs, strict=True)):
        progress(Progress(f"checking {path.name}", done, len(files), "files"))
        read = read_tensor(file, spec, ipc=ipc)
        made_by_class = functools.partial(_says_made_by_class, file)
        findings += _findings_on(*read, spec, file.name, progress, made_by_class)
    if files:
        progress(Progress(f"checking {path.name}", len(files), len(files), "files"))
    return report_of(findings)


def require_acceptable(distilled: DistilledSet, *, ignore_codes: Collection[str] = (), progress: Listener = ignore) -> Report:
    """Check a set with any number of images per class. Raises InvalidSubmissionError with the first error.

    ignore_codes: findings that do not count.
    """
    report = check_set(distilled, progress=progress).ignoring(ignore_codes)
    if not report.ok:
        path = distilled.path
        all_of_it = f": {check_command(path, distilled.spec.name)}" if path else ", give it to ddkit.check."
        raise InvalidSubmissionError(
            f"{path or 'tensor in memory'}: {report.findings[0].message}", f"To see everything{all_of_it}"
        )
    return report


def submission_files(folder: str | os.PathLike[str]) -> tuple[list[Path], list[Finding]]:
    """The tensors of a submission folder that belong in its zip, in the scorer's order, and findings on their names.

    A folder with a file of the challenge must hold both of the challenge's files; any other is practice.
    """
    folder = Path(folder)
    tensors = sorted(path for path in folder.iterdir() if path.suffix.lower() in TENSOR_ENDINGS)
    findings = _name_findings([path.name for path in tensors], folder.name or str(folder))
    usable = [path for path in tensors if path.suffix == ".pt" and path.stem in known_names()]
    if any(path.stem in _CHALLENGE_NAMES for path in usable):
        for path in usable:
            if path.stem not in _CHALLENGE_NAMES:
                message = f"'{path.name}' is not a dataset of the challenge and is not packed."
                findings.append(Finding("warning", "F020", message, path.name))
        usable = [path for path in usable if path.stem in _CHALLENGE_NAMES]
    for path in usable:
        # Unlike Path.resolve, this takes links that lead in a circle.
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(os.path.realpath(folder)):
            message = f"{path.name} is a link to {target}, outside the folder. Put the file itself there."
            findings.append(Finding("error", "F013", message, path.name))
    return usable, findings


def _name_findings(names: Sequence[str], where: str) -> list[Finding]:
    """Findings F002, F003, F011, F020 and F021 on the names of the tensors in a folder or at a zip's root."""
    findings = []
    known = known_names()
    present: set[str] = set()
    for name in names:
        stem, ending = os.path.splitext(name)
        if ending.lower() == ".pt" and stem.lower() in known:
            present.add(stem.lower())
            if name != f"{stem.lower()}.pt":
                message = f"The name must be '{stem.lower()}.pt', in lower case: the scorer opens exactly that name."
                findings.append(Finding("error", "F011", message, name))
        elif name != f"{stem}.pt" or stem not in known:
            likely = likely_dataset(name)
            offer = f" If it is the tensor for {likely}, rename it to {likely}.pt." if likely else ""
            message = f"'{name}' is not named after a dataset and was not checked.{offer}"
            findings.append(Finding("warning", "F020", message, name))
    missing = [name for name in _CHALLENGE_NAMES if name not in present]
    if not present & set(known):
        message = f"There is no tensor to submit. The challenge takes cifar100.pt and tinyimagenet.pt: {generate_command()}"
        findings.append(Finding("error", "F002", message, where))
    elif len(missing) == len(_CHALLENGE_NAMES):
        practice = ", ".join(sorted(present & set(known)))
        findings.append(Finding("info", "F021", f"Practice on {practice}, which the challenge does not score.", where))
    elif missing:
        message = (
            f"{missing[0]}.pt is missing; the scorer opens both files of the challenge and stops without it. "
            f"Make it: {generate_command(missing[0])}"
        )
        findings.append(Finding("error", "F003", message, where))
    return findings


def _check_zip(path: Path, ipc: int | None, progress: Listener) -> Report:
    known = {f"{name}.pt" for name in known_names()}
    findings: list[Finding] = []
    names: list[str] = []
    for member in read_members(path, known.__contains__):
        if isinstance(member, Finding):
            findings.append(member)
            continue
        names.append(member.name)
        if member.data is not None:
            progress(Progress(f"checking {member.name}", len(names), None, "files"))
            spec = dataset_spec(Path(member.name).stem)
            read = read_tensor_bytes(member.data, member.name, spec, ipc=ipc)
            findings += _findings_on(*read, spec, member.name, progress)
    if not any(finding.code in ("F005", "F018") for finding in findings):
        tensors = [name for name in names if name.lower().endswith(TENSOR_ENDINGS)]
        of_challenge = [name for name in tensors if name.lower().removesuffix(".pt") in _CHALLENGE_NAMES]
        if of_challenge:  # a zip is scored whole, so that nothing can be left out of it
            message = "The zip must hold the challenge's two tensors only. Pack with ddkit pack."
            findings += [Finding("error", "F009", message, name) for name in tensors if name not in of_challenge]
        findings += _name_findings(of_challenge or tensors, path.name)
    return report_of(findings)


def _says_made_by_class(file: Path) -> bool:
    """Whether the JSON next to the file says that ddkit sampled or drew its images class by class."""
    return read_provenance(file).get("kind") in _MADE_BY_CLASS


def _findings_on(
    tensor: Tensor | None,
    findings: list[Finding],
    spec: DatasetSpec,
    where: str,
    progress: Listener,
    made_by_class: Callable[[], bool] = lambda: False,
) -> list[Finding]:
    """The findings on a file and those on its numbers, which are compared with the real images.

    tensor: of the right shape and type; None if it could not be read. made_by_class: see `order_findings`.
    """
    if tensor is None:
        return findings
    tensor = tensor.detach().contiguous()
    finite = torch.isfinite(tensor).flatten(1).all(dim=1)
    if not finite.all():
        rows = (~finite).nonzero().flatten().tolist()
        hold = counted(len(rows), "image holds", "images hold")
        message = f"{hold} NaN or infinity. A network that trains on such values learns nothing."
        return [*findings, Finding("error", "T009", message, f"{where}, rows {first_few([*map(str, rows)])}")]
    try:
        test_images = load_dataset(spec.name, "test").images
    except DDKitError:
        test_images = None  # not prepared, or damaged, which is not the submission's fault
    verdict = judge_normalization(tensor, spec, where)
    findings = [*findings, *([verdict.finding] if verdict else [])]
    if verdict is None or verdict.finding.level != "error":
        findings += order_findings(tensor, spec, where, made_by_class=made_by_class, progress=progress)
    elif verdict.constants:
        # Under wrong constants images resemble no class, so that their order is not judged. Their content is, under their own.
        spec = replace(spec, mean=verdict.constants.mean, std=verdict.constants.std)
    return findings + content_findings(tensor, spec, where, test_images=test_images)
