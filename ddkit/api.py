"""The Python interface: functions that do what the commands do, also available as `ddkit.train`, `ddkit.generate` and so on.

`ddkit demo`, `tune`, `doctor` and `completion` have no function here, nor have packing and evaluating for track 2.

Files are given as paths, and written where the commands write them; `evaluate` and `check` also take a set in memory.
`progress` is called with a `ddkit.runtime.progress.Progress` now and then; None shows bars in a Jupyter notebook and nothing
elsewhere.
All functions raise `ddkit.errors.DDKitError` for what the user can correct, and compute alike whatever default device and
dtype a notebook has set in PyTorch.
Ctrl-C saves the state of a long computation; the same call then continues it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ddkit.results import RESULTS_FILE, Result
from ddkit.runtime.progress import Listener, default_listener

if TYPE_CHECKING:
    from torch import Tensor

    from ddkit.data.store import ImageSet
    from ddkit.distill.refine import Refined
    from ddkit.distill.settings import RefineSettings
    from ddkit.entering.entry import Entry
    from ddkit.generator.config import SamplingSettings
    from ddkit.generator.model_folder import Model
    from ddkit.reporting.report import Leaderboard
    from ddkit.sets.distilled import DistilledSet
    from ddkit.sets.findings import Report

PathLike = str | os.PathLike[str]
P = ParamSpec("P")
T = TypeVar("T")


def _with_torch_defaults(function: Callable[P, T]) -> Callable[P, T]:
    """Let `function` compute under PyTorch's own defaults: tensors are made on the CPU, in float32."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        import torch

        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        # As a context torch.device sees every operation, so it is entered only where it changes something.
        device = contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
        try:
            with device:
                return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(dtype)

    return wrapped


@_with_torch_defaults
def load_dataset(name: str, split: str = "train", *, progress: Listener | None = None) -> ImageSet:
    """Open the "train" or "test" split of a dataset, after preparing a built-in one if needed.

    Its `images` are (N, 3, S, S) uint8 and memory-mapped, its `labels` (N,) int64.
    Raises UsageError for an unknown name or split, and MissingDataError if it cannot be downloaded.
    """
    from ddkit.data.prepare import open_dataset

    return open_dataset(name, split, progress=progress or default_listener())


@_with_torch_defaults
def read_set(path: PathLike, dataset: str | None = None) -> DistilledSet:
    """Read a distilled set without executing anything in it.

    dataset: None takes its name from the JSON next to the file, else from the file's name.
    Its `images` are (C * ipc, 3, S, S) float32, normalized; its `labels` are (C * ipc,) int64.
    Raises InvalidSubmissionError for a file that is not such a set.
    """
    from ddkit.sets.distilled import read_set

    return read_set(path, dataset)


@_with_torch_defaults
def train(
    dataset: str,
    *,
    preset: str | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    out: PathLike | None = None,
    device: str = "auto",
    progress: Listener | None = None,
    **options: Any,
) -> Model:
    """Train a generator, or continue its training, and return it.

    preset: see `ddkit train --help`. steps: of the denoiser, in all. seconds: of training instead of steps.
    out: the run folder; None means runs/<dataset>. options: further arguments and settings of
    `ddkit.generator.training.plan.train_generator`, such as batch_size=64, seed=1 or init="facebook/DiT-XL-2-256".
    Raises UsageError for settings that are unknown or differ from those that the folder was begun with.
    """
    from ddkit.generator.training.plan import train_generator

    folder, progress = None if out is None else Path(out), progress or default_listener()
    return train_generator(
        dataset, preset=preset, steps=steps, seconds=seconds, folder=folder, device=device, progress=progress, **options
    )


@_with_torch_defaults
def generate(
    dataset: str,
    ipc: int = 10,
    *,
    model: PathLike | None = None,
    from_real: str | None = None,
    out: PathLike | None = None,
    sampling: SamplingSettings | None = None,
    candidates: int | None = None,
    select: str | None = None,
    seed: int = 0,
    device: str = "auto",
    replace: bool = False,
    progress: Listener | None = None,
) -> DistilledSet:
    """Make a distilled set of `ipc` images per class, from a trained generator or from real training images.

    model: the generator's folder, or its id on the Hugging Face hub; None means runs/<dataset>. from_real: a selection
    method of `ddkit.sets.select`, such as "random", to take real images instead. out: the tensor's file; None means
    submission/<dataset>.pt. sampling: how a generator samples, its seed included; None takes the command's defaults.
    candidates, select: how many samples to make of each class, and how to select among them.
    replace: make the set again if it is there.
    Raises MissingModelError if there is no such model, and UsageError for unknown names and for arguments that would have
    no effect: those of a generator next to `from_real`, `seed` next to `sampling`, and `select` without `candidates`.
    """
    from ddkit.distill.generate import FromModel, FromReal
    from ddkit.distill.generate import generate as generate_set
    from ddkit.errors import UsageError
    from ddkit.sets.distilled import read_set

    source: FromModel | FromReal
    if from_real is not None:
        of_generator = {"model": model, "sampling": sampling, "candidates": candidates, "select": select}
        unused = [name for name, value in of_generator.items() if value is not None]
        if unused:
            raise UsageError(f"{' and '.join(unused)} cannot be combined with from_real, which samples nothing.")
        source = FromReal(from_real, seed, device)
    else:
        if sampling is not None and seed:
            raise UsageError("seed has no effect next to sampling, which has its own.", f"Give SamplingSettings(seed={seed}).")
        source = FromModel.find(
            dataset, model, device=device, candidates=candidates, select=select, sampling=sampling, seed=seed
        )
    path = Path("submission", f"{dataset}.pt") if out is None else Path(out)
    return read_set(
        generate_set(dataset, ipc, source, path, replace=replace, progress=progress or default_listener()).tensor, dataset
    )


@_with_torch_defaults
def refine(
    path: PathLike,
    *,
    dataset: str | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    settings: RefineSettings | None = None,
    out: PathLike | None = None,
    run: PathLike | None = None,
    fresh: bool = False,
    device: str = "auto",
    progress: Listener | None = None,
) -> Refined:
    """Optimize the pixels of the set at `path`, or continue to, and write one that validates well.

    It is the latest version within `RefineSettings.val_margin` of the best on held-out training images.

    dataset: None takes its name from the JSON next to the file, else from the file's name. steps: in all, 1200 if neither
    is given; or seconds: of work in all. settings: None takes those that the run was begun with, else the preset "track1" of
    `ddkit.distill.settings`. out: None replaces the set, of which the run folder keeps a copy.
    run: the folder of the state; None means runs/<dataset>-refine. fresh: start over.
    Raises UsageError for a state of other settings, and ComputeError if the optimization diverges or memory is short.
    """
    from ddkit.distill.refine import recorded_settings
    from ddkit.distill.refine import refine as refine_set
    from ddkit.distill.settings import PRESETS, RefineLimits
    from ddkit.errors import UsageError
    from ddkit.sets.distilled import dataset_of

    if steps is not None and seconds is not None:
        raise UsageError("steps and seconds exclude each other.", "Give one of them.")
    dataset = dataset_of(path, dataset)
    folder = Path("runs", f"{dataset}-refine") if run is None else Path(run)
    if settings is None:
        settings = (None if fresh else recorded_settings(folder)) or PRESETS["track1"]
    limits = RefineLimits(seconds=seconds) if steps is None else RefineLimits(steps)
    target = None if out is None else Path(out)
    return refine_set(
        Path(path),
        dataset,
        settings,
        limits,
        folder,
        out=target,
        fresh=fresh,
        device=device,
        progress=progress or default_listener(),
    )


@_with_torch_defaults
def evaluate(
    path: PathLike | DistilledSet | Tensor,
    *,
    dataset: str | None = None,
    name: str | None = None,
    rounds: int | None = None,
    epochs_setting: int | None = None,
    seed: int = 0,
    reference: PathLike | None = None,
    results: PathLike = RESULTS_FILE,
    state: PathLike = Path("runs", "evaluations"),
    device: str = "auto",
    progress: Listener | None = None,
) -> Result:
    """Train fresh networks on a distilled set as track 1 of the challenge does, test them on real images, and record it.

    path: of the set's file; or the set itself, as `read_set` returns it or as the tensor that its file would hold, which
    gives the same numbers: (C * ipc, 3, S, S) float32, normalized, class by class. Images that are not those of a file are
    recorded with a hash of their own. dataset: of a tensor in memory; for a file, None takes it from the JSON next to it,
    else from the file's name.
    name: under which the result is recorded; None takes the name of the file's folder, and "in-memory" for images that are
    not those of a file. rounds, epochs_setting: None takes the challenge's 3 rounds and E = 1000.
    reference: the challenge's test file; None takes the prepared test split.
    results: the file that the result is added to. state: the folder from which an interrupted evaluation continues.
    `Result.mean` is the accuracy, a fraction, and `Result.interval` its 95 % confidence interval.
    Raises InvalidSubmissionError for a set that `check` refuses.
    """
    from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
    from ddkit.evaluation.job import JobSettings, evaluate_files

    given, dataset = _given_set(path, dataset)
    settings = JobSettings(
        EvaluationSettings(rounds=rounds, epochs_setting=epochs_setting, seed=seed, device=device),
        dataset=dataset,
        name=name,
        reference=None if reference is None else Path(reference),
        results=Path(results),
        state=StateFolder(Path(state)),
    )
    (result,) = evaluate_files([given], settings, progress=progress or default_listener()).results
    return result


@_with_torch_defaults
def check(
    path: PathLike | DistilledSet | Tensor = "submission",
    *,
    dataset: str | None = None,
    ipc: int | None = 10,
    progress: Listener | None = None,
) -> Report:
    """Check a submission folder, one tensor's file or a zip, without executing anything in it, or a set in memory.

    path: of one of these; or the set itself, as `read_set` returns it or as the tensor that is to be saved.
    dataset: of a tensor in memory; for one file, None finds it from its name or else from the JSON next to it. ipc: the
    images per class that there must be; None accepts any number. `Report.ok` is the verdict, `Report.findings` the reasons.
    """
    from ddkit.checks.check import check_path, check_set

    (given, dataset), progress = _given_set(path, dataset), progress or default_listener()
    if isinstance(given, Path):
        return check_path(given, dataset=dataset, ipc=ipc, progress=progress)
    return check_set(given, ipc=ipc, progress=progress)


def _given_set(given: PathLike | DistilledSet | Tensor, dataset: str | None) -> tuple[Path | DistilledSet, str | None]:
    """The file to read, also for a set that still is what its file holds, or a set in memory; and the dataset, if known.

    Raises UsageError for a tensor without a dataset, and for another dataset than the set's.
    """
    from torch import Tensor

    from ddkit.data.store import dataset_spec
    from ddkit.errors import UsageError
    from ddkit.sets.distilled import DistilledSet, read_set

    if isinstance(given, Tensor):
        if dataset is None:
            raise UsageError("A tensor does not tell which dataset it is for.", 'Name it, such as dataset="cifar100".')
        return DistilledSet(given, dataset_spec(dataset)), dataset
    if not isinstance(given, DistilledSet):
        return Path(given), dataset
    if dataset not in (None, given.spec.name):
        raise UsageError(f"The set is for {given.spec.name}, not for {dataset}.", "Leave out dataset.")
    # Its hash and its provenance are those of the file, and would be wrong for images that were changed since.
    if given.path and given.path.is_file() and read_set(given.path, given.spec.name).images.equal(given.images):
        return given.path, given.spec.name
    return DistilledSet(given.images, given.spec), given.spec.name


@_with_torch_defaults
def enter(
    datasets: str | Iterable[str] = ("cifar100", "tinyimagenet"),
    *,
    seconds: float | None = None,
    recipe: PathLike | None = None,
    track: int = 1,
    epochs_setting: int | None = None,
    rounds: int | None = None,
    time_budget: float | None = None,
    seed: int = 0,
    folder: PathLike = "ddkit-entry",
    device: str = "auto",
    progress: Listener | None = None,
) -> Entry:
    """Go the whole way to an entry: prepare data, make sets, refine, evaluate, check, pack and report.

    datasets: a name, or several. seconds: for everything, evaluations included; what is not needed for them goes to refining
    or training. recipe: a recipe.toml to make again instead, which decides everything except `folder` and `device`.
    time_budget: seconds of each round that a track 2 generator has, 600 if None. folder: where everything is written. The
    same call continues after an interruption, and with more seconds it refines or trains further.
    Raises UsageError for too little time, saying the least, and what the other functions raise.
    """
    from ddkit.entering.entry import enter as enter_challenge
    from ddkit.entering.plan import draft
    from ddkit.entering.recipe import read_recipe
    from ddkit.errors import UsageError

    if (recipe is None) == (seconds is None):
        raise UsageError("An entry needs either seconds or a recipe.", "Give seconds=8 * 3600, or recipe=PATH.")
    if recipe is not None:
        wanted = read_recipe(Path(recipe))
    else:
        names = (datasets,) if isinstance(datasets, str) else tuple(datasets)
        wanted = draft(
            names, track=track, epochs_setting=epochs_setting, rounds=rounds, time_budget=time_budget, seed=seed, device=device
        )
    return enter_challenge(wanted, Path(folder), seconds=seconds, device=device, progress=progress or default_listener())


@_with_torch_defaults
def pack(
    folder: PathLike = "submission",
    out: PathLike = "submission.zip",
    *,
    name: str | None = None,
    strict: bool = False,
    ignore_codes: Collection[str] = (),
    progress: Listener | None = None,
) -> Path:
    """Check a submission folder, write its zip, verify that, record it in runs/packed.jsonl, and return its path.

    name: under which it is recorded; None takes the zip's own, with a number if that is in use. strict: refuse warnings
    too. ignore_codes: findings that do not matter.
    Raises InvalidSubmissionError for a folder that `check` refuses.
    """
    from ddkit.history import PackedRecords
    from ddkit.packing.pack import pack as pack_folder

    return pack_folder(
        folder,
        out,
        strict=strict,
        ignore_codes=ignore_codes,
        name=name,
        records=PackedRecords(),
        progress=progress or default_listener(),
    )


@_with_torch_defaults
def push(
    path: PathLike, hub_id: str, *, license: str | None = None, private: bool = False, results: PathLike = RESULTS_FILE
) -> str:
    """Upload a generator's folder or a distilled set to the Hugging Face hub with a card, and return its address.

    hub_id: user/name. license: an identifier of the hub, such as "cc-by-4.0"; None says that it is not known. private: only
    you can see what is created. results: the file whose evaluations the card lists.
    Raises HubError without a network or a token, and UsageError if the repository holds another set.
    """
    from ddkit.hub import plan_upload
    from ddkit.hub import push as push_planned

    return push_planned(plan_upload(path, hub_id, license=license, results=results), private=private)


@_with_torch_defaults
def pull(hub_id: str, out: PathLike | None = None, *, dataset: str | None = None, replace: bool = False) -> DistilledSet:
    """Download a distilled set from the Hugging Face hub, without executing anything in it, and write its three files.

    out: the tensor's file; None means submission/<dataset>.pt. dataset: None takes its name from the JSON on the hub,
    else from the file's name. replace: write even over another set.
    Raises MissingDataError without a network, or if the hub has no such set.
    """
    from ddkit.hub import pull as pull_set
    from ddkit.sets.distilled import read_set

    return read_set(pull_set(hub_id, out, dataset=dataset, replace=replace).tensor, dataset)


@_with_torch_defaults
def report(
    results: PathLike = RESULTS_FILE,
    *,
    tracks: Iterable[int] | None = None,
    html: PathLike | None = None,
    runs_folder: PathLike = "runs",
    quality: PathLike | None = None,
    device: str = "auto",
    progress: Listener | None = None,
) -> Leaderboard:
    """Rank the results in a file next to the published entries and random real images.

    tracks: None means those with results, or track 1 without any. html: also write the page to this file; it shows the
    training logs in `runs_folder`. quality: also measure the images of this set, or of the sets in this folder.
    Raises MissingDataError for a missing file.
    """
    from ddkit.reporting.report import report as rank

    return rank(
        results,
        tracks=tracks,
        html=html,
        runs_folder=runs_folder,
        quality=quality,
        device=device,
        progress=progress or default_listener(),
    )
