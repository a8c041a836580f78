"""The quality of a set's pictures as a report tells it: the metrics with a reading each, and two sheets to look at."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image

from ddkit.data.store import class_titles, dataset_spec, load_dataset
from ddkit.errors import MissingDataError
from ddkit.metrics.features import FeatureSettings, is_cached, reference_features
from ddkit.metrics.quality import Quality, measure
from ddkit.reporting.rows import dataset_title
from ddkit.reporting.sets import read_set
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.contact_sheet import neighbor_sheet, side_by_side
from ddkit.sets.distilled import read_provenance

_COPY = 0.2  # of the distance between real images: nearer than this, an image is as good as copied


@dataclass(frozen=True)
class QualityLine:
    """One metric of a set, and of real images."""

    metric: str
    ours: float | None
    real: float | None
    reading: str


@dataclass(frozen=True)
class QualityPicture:
    """A sheet that goes with the metrics. uri: a data URI."""

    title: str
    note: str
    uri: str


@dataclass(frozen=True)
class QualityView:
    """The metrics of one set's pictures. images: in the set."""

    name: str
    images: int
    lines: tuple[QualityLine, ...]
    pictures: tuple[QualityPicture, ...] = ()


@dataclass(frozen=True)
class SetQuality:
    """A set's quality and its two sheets.

    name: its folder and dataset, for the names of files. neighbors: each image with its nearest real one; beside:
    with real ones of its class.
    """

    name: str
    view: QualityView
    neighbors: Image
    beside: Image


def sets_at(path: Path) -> list[Path]:
    """The files of sets at `path`: itself, or the .pt files of a folder. Raises MissingDataError when there are none."""
    found = sorted(path.glob("*.pt")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise MissingDataError(f"There is no set at {path}.", "Make one: ddkit generate")
    return found


def dataset_at(path: Path) -> str:
    """The dataset of a set: as the JSON beside it says, else as the file is called."""
    return str(read_provenance(path).get("dataset", path.stem))


def is_prepared(dataset: str) -> bool:
    """Whether the feature network of the dataset is trained already: without, `quality_of` takes minutes more."""
    return is_cached(load_dataset(dataset, "train"), dataset_spec(dataset))


def quality_of(
    path: Path,
    dataset: str,
    settings: FeatureSettings | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Listener = ignore,
) -> SetQuality:
    """Measure the pictures of a submission's file against the dataset's real training images.

    Takes minutes the first time, when the feature network is trained; raises what reading the set and loading the
    dataset raise.
    """
    spec, real = dataset_spec(dataset), load_dataset(dataset, "train")
    images, labels = read_set(path, dataset)
    features = reference_features(real, spec, settings or FeatureSettings(), device=device, progress=progress)
    quality = measure(images, labels, real, features, seed=seed, progress=progress)
    titles = [title.replace("_", " ") for title in class_titles(dataset)]
    neighbors = neighbor_sheet(
        images, real.images[quality.neighbors], quality.distances, [titles[label] for label in labels.tolist()]
    )
    beside = side_by_side((images, labels), (real.images, real.labels), titles)
    called = "" if path.stem == dataset else f"-{path.stem}"
    name = f"{path.resolve().parent.name}-{dataset}{called}"
    return SetQuality(name, _view(path, dataset, quality, neighbors, beside), neighbors, beside)


def _view(path: Path, dataset: str, quality: Quality, neighbors: Image, beside: Image) -> QualityView:
    copies = int((quality.distances < _COPY).sum())
    return QualityView(
        name=f"{dataset_title(dataset)}: {path}",
        images=quality.images,
        lines=_lines(quality, copies),
        pictures=(
            QualityPicture("Beside real images", "Generated left, real right, the same class on a row.", _uri(beside)),
            QualityPicture(
                "Nearest real image of each",
                "Pairs of a picture (left) and the real training image nearest to it (right), the nearest pairs first; "
                "below, the distance in units of that between real images. Near 0 a picture is a copy.",
                _uri(neighbors),
            ),
        ),
    )


def _lines(quality: Quality, copies: int) -> tuple[QualityLine, ...]:
    ours, real = quality.scores, quality.real
    return (
        QualityLine("Frechet distance", ours.frechet, real.frechet, "smaller is better"),
        QualityLine("density", ours.density, real.density, "near that of real images; low: unlike any real image"),
        QualityLine("coverage", ours.coverage, real.coverage, "of real images with one of ours near; larger is better"),
        QualityLine("within-class diversity", ours.diversity, real.diversity, "low: pictures of a class are alike"),
        QualityLine("distance to nearest real", ours.nearest, real.nearest, "median; far below 1: copies"),
        QualityLine("as good as copied", copies / quality.images, None, f"fraction nearer than {_COPY:g}"),
    )


def _uri(picture: Image) -> str:
    buffer = io.BytesIO()
    # With losses: the page has to be sent around. The files beside it have none.
    picture.save(buffer, format="WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
