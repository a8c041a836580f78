"""The quality of a set's images for the report: metrics with their meaning, and two sheets of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from ddkit.data.images import denormalize, to_uint8
from ddkit.data.store import class_titles, dataset_spec, load_dataset
from ddkit.errors import MissingDataError, UsageError
from ddkit.metrics.features import FeatureSettings, convnet_features, is_cached
from ddkit.metrics.quality import Quality, measure
from ddkit.reporting.rows import dataset_title
from ddkit.runtime.device import resolve_device
from ddkit.runtime.progress import Listener, ignore
from ddkit.sets.contact_sheet import neighbor_sheet, save_png, side_by_side
from ddkit.sets.distilled import dataset_of, generate_command, read_set

_COPY_DISTANCE = 0.2  # in units of the distance between real images; a nearer image counts as a copy


@dataclass(frozen=True)
class SetQuality:
    """The quality of a set's images.

    name: the set's folder and dataset, for names of files. title: dataset and path, for people.
    precision: of the features that metrics compare, "float32" or "bfloat16"; compare with metrics of the same one.
    rows: (metric, value of the set, value of real images, meaning). neighbors: a sheet of images next to the real image
    that is nearest to each. real: a sheet of images next to real ones of the same class.
    """

    name: str
    title: str
    images: int
    precision: str
    rows: tuple[tuple[str, float | None, float | None, str], ...]
    neighbors: Image
    real: Image

    @property
    def sheets(self) -> tuple[tuple[str, str, Image], ...]:
        """(title, note, picture)."""
        return (
            (
                "Next to real images",
                "The set's images are on the left and real ones on the right, with one class in each row.",
                self.real,
            ),
            (
                "Nearest real image of each",
                "Pairs of an image (left) and the real training image nearest to it (right), the nearest pairs first. "
                "The number is the distance in units of that between real images; near 0 the image is a copy.",
                self.neighbors,
            ),
        )

    def save_sheets(self, folder: Path) -> tuple[Path, Path]:
        """Write both sheets as PNG files; returns their paths."""
        files = folder / f"{self.name}-neighbors.png", folder / f"{self.name}-real.png"
        for picture, file in zip((self.neighbors, self.real), files, strict=True):
            save_png(picture, file)
        return files

    def as_data(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("metric", "ours", "real", "reading")
        lines = [dict(zip(names, row, strict=True)) for row in self.rows]
        return {"name": self.title, "images": self.images, "precision": self.precision, "lines": lines}


def sets_at(path: Path) -> list[Path]:
    """The files of sets at `path`: itself, or the .pt files of a folder. Raises MissingDataError if there are none."""
    found = sorted(path.glob("*.pt")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise MissingDataError(f"There is no distilled set at {path}.", f"Make one: {generate_command()}")
    return found


def measure_sets(
    path: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    on_event: Callable[[str], object] = lambda text: None,
    progress: Listener = ignore,
) -> list[SetQuality]:
    """The quality of the set at `path`, or of the sets in that folder; on_event is called with a sentence before each.

    Files of a folder that are for no known dataset are named and left out, if there are others.
    """
    measured, on = [], resolve_device(device)
    datasets: dict[Path, str] = {}
    unknown: list[UsageError] = []
    for file in sets_at(path):
        try:
            datasets[file] = dataset_of(file)
        except UsageError as error:
            unknown.append(error)
    if not datasets:
        raise unknown[0]
    for problem in unknown:
        on_event(f"ignored: {problem.message}")
    for file, dataset in datasets.items():
        has_network = is_cached(load_dataset(dataset, "train"), dataset_spec(dataset), device=on)
        first = "" if has_network else " First a small network is trained on these, which takes minutes."
        on_event(f"Comparing the images of {file} with real images.{first}")
        measured.append(quality_of(file, dataset, seed=seed, device=on, progress=progress))
    return measured


def quality_of(
    path: Path,
    dataset: str | None = None,
    settings: FeatureSettings | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Listener = ignore,
) -> SetQuality:
    """Compare the images of a set's file with the dataset's real training images.

    dataset: as `ddkit.sets.distilled.read_set` takes it. The first time a feature network is trained, which takes minutes.
    Raises the errors of reading the set and of loading the dataset.
    """
    one = read_set(path, dataset)
    spec = one.spec
    real, images = load_dataset(spec.name, "train"), to_uint8(denormalize(one.images, spec))
    features = convnet_features(real, spec, settings or FeatureSettings(), device=device, progress=progress)
    quality = measure(images, one.labels, real, features, seed=seed, progress=progress)
    titles = [title.replace("_", " ") for title in class_titles(spec.name)]
    of_each = [titles[label] for label in one.labels.tolist()]
    suffix = "" if path.stem == spec.name else f"-{path.stem}"
    return SetQuality(
        name=f"{path.resolve().parent.name}-{spec.name}{suffix}",
        title=f"{dataset_title(spec.name)}: {path}",
        images=quality.images,
        precision=features.precision,
        rows=_rows(quality),
        neighbors=neighbor_sheet(images, real.images[quality.neighbors], quality.distances, of_each),
        real=side_by_side((images, one.labels), (real.images, real.labels), titles),
    )


def _rows(quality: Quality) -> tuple[tuple[str, float | None, float | None, str], ...]:
    ours, real = quality.metrics, quality.real
    copies = float((quality.distances < _COPY_DISTANCE).float().mean())
    return (
        ("Frechet distance", ours.frechet, real.frechet, "smaller is better"),
        ("density", ours.density, real.density, "best near that of real images; low: unlike any real image"),
        ("coverage", ours.coverage, real.coverage, "share of real images that are near one of the set; larger is better"),
        ("within-class diversity", ours.diversity, real.diversity, "low: the images of a class are alike"),
        ("distance to nearest real", ours.nearest, real.nearest, "median; far below 1: copies"),
        ("copies", copies, None, f"share of images nearer than {_COPY_DISTANCE:g} to a real one"),
    )
