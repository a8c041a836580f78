"""The facts about a model folder that can be read without its networks, and without diffusers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ddkit import __version__
from ddkit.data.store import class_names, dataset_spec
from ddkit.errors import BadFileError, MissingModelError, UsageError
from ddkit.runtime.files import read_json, sha256_of
from ddkit.runtime.hub import download, is_hub_id
from ddkit.runtime.records import read_record

FACTS_FILE = "ddkit.json"
INDEX_FILE = "model_index.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
FORMAT_VERSION = 1

DENOISER_PART = "transformer"
PARTS = ("vae", DENOISER_PART, "scheduler")


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model, as ddkit.json holds them.

    prediction: what the denoiser predicts, as in ObjectiveConfig. steps: steps of denoiser training.
    dataset_sha256: hash of the prepared training split. metrics: scores of the model by name.
    label_dropout: as in ObjectiveConfig; None when an earlier version wrote the file.
    """

    dataset: str
    class_names: tuple[str, ...]
    image_size: int
    prediction: str
    preset: str
    steps: int
    images_seen: int
    dataset_sha256: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    label_dropout: float | None = None
    ddkit_version: str = __version__
    format: int = FORMAT_VERSION


def find_model(source: str | os.PathLike[str]) -> Path:
    """The folder of a model: `source` itself, or where the hub's generator of that id is downloaded to.

    Raises MissingModelError when it cannot be downloaded or the hub holds something else under that id.
    """
    # On Windows a path has other slashes than the id that it was made from.
    folder, hub_id = Path(source).expanduser(), source.as_posix() if isinstance(source, PurePath) else os.fspath(source)
    if folder.is_dir() or not is_hub_id(hub_id):
        return folder
    # The facts come first: nobody should wait for the weights of something else.
    if not has_model(download(hub_id, "model", [FACTS_FILE])):
        raise MissingModelError(
            f"'{hub_id}' on the hub is not a generator of ddkit: it has no {FACTS_FILE}.",
            f"Give the id of one that `ddkit push` uploaded, or start from another: ddkit train --init {hub_id}",
        )
    parts = [f"{part}/*.{ending}" for part in PARTS for ending in ("json", "safetensors")]
    return download(hub_id, "model", [FACTS_FILE, INDEX_FILE, *parts])


def has_model(folder: Path) -> bool:
    """Return whether a folder holds a complete model: ddkit.json is written last."""
    return (folder / FACTS_FILE).is_file()


def read_facts(folder: Path, *, dataset: str | None = None) -> ModelFacts:
    """Read a model folder's ddkit.json. dataset: its name, if known, for the advice in an error.

    Raises MissingModelError when there is none, BadFileError when it is not ours.
    """
    path = folder / FACTS_FILE
    if not path.is_file():
        reason = f"{FACTS_FILE} is missing" if folder.is_dir() else "there is no such folder"
        raise MissingModelError(
            f"{folder} does not hold a complete model: {reason}.",
            f"Train one, or continue its training: ddkit train --dataset {dataset or 'NAME'}",
        )
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT_VERSION:
        raise BadFileError(f"{path} was not written by this version of ddkit.", "Train the model again.")
    try:
        return read_record(ModelFacts, value)
    except BadFileError as error:
        raise BadFileError(f"{path} is not complete: {error}.", "Train the model again.") from error


def require_present_dataset(facts: ModelFacts, folder: Path) -> None:
    """Raise UsageError if the model's dataset was prepared with other classes or of another size after its training.

    folder: the model's, for the message. Raises what `dataset_spec` and `class_names` raise.
    """
    known, present, size = facts.class_names, class_names(facts.dataset), dataset_spec(facts.dataset).image_size
    remedy = "Train a model on the present dataset."
    if len(known) != len(present):
        raise UsageError(f"The model in {folder} knows {len(known)} classes, but the dataset has {len(present)}.", remedy)
    for label, (before, now) in enumerate(zip(known, present, strict=True)):
        if before != now:
            raise UsageError(
                f"The model in {folder} was trained on other classes than '{facts.dataset}' has now: class {label} was "
                f"{before} and is {now}.",
                remedy,
            )
    if facts.image_size != size:
        raise UsageError(
            f"The model in {folder} makes images of {facts.image_size} pixels, but '{facts.dataset}' has {size}.", remedy
        )


def require_label_dropout(facts: ModelFacts, guidance: float) -> None:
    """Raise UsageError for guidance of a model that has not learned the null class."""
    if guidance != 1 and facts.label_dropout == 0:
        raise UsageError(
            "The model was trained without label dropout, so it cannot be sampled with guidance.",
            "Turn guidance off with --guidance 1, or train the model again with --label-dropout 0.1.",
        )


def model_hash(folder: Path) -> str:
    """Hexadecimal SHA-256 over the hashes of both networks' weights, which identifies this model."""
    parts = [folder / part / WEIGHTS_FILE for part in ("vae", DENOISER_PART)]
    return hashlib.sha256("".join(sha256_of(path) for path in parts if path.is_file()).encode()).hexdigest()
