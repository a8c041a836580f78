"""How much do a generator's samples teach? Guidance x steps, and selection methods, compared with real images.

    python tools/study_samples.py cifar100 --model runs/cifar100 [--guidance G ...] [--steps N ...]
        [--candidates N] [--select HOW ...] [--out FOLDER] [--table]

Every cell samples from the same noise; the first ten images of each class are evaluated by the protocol, with the same
networks in each round. Quality is measured on all samples of a class, in the features of an official ConvNet trained on
real images. The selection methods choose from --candidates samples of each class, at the first --guidance and the first
--steps, and from as many real images; compare them with the row "random". Finished results are kept in the folder, so
the study continues when run again; --table shows what there is so far.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ddkit.data.images import denormalize, normalize, to_uint8
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.distill.generate import FromModel, generate
from ddkit.generator.sampling import SamplingSettings
from ddkit.metrics.coverage import density_and_coverage
from ddkit.metrics.features import ReferenceFeatures, reference_features
from ddkit.metrics.frechet import frechet_distance
from ddkit.sets.distilled import class_labels, read_set
from ddkit.sets.select import FEATURE_METHODS, LABEL_METHODS, ImageFeatures, choose
from study import Findings, Record, arguments_of, markdown, percent, run_study

REAL = "real"


class Study:
    """One generator's samples and their results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.findings = Findings(options.out or Path("runs") / f"study-samples-{options.dataset}")
        self.findings.claim(options, rows=("guidance", "steps", "select"))
        self.spec = dataset_spec(options.dataset)
        self.real = load_dataset(options.dataset, "train")
        self.cells = [(guidance, steps) for steps in options.steps for guidance in options.guidance]

    @functools.cached_property
    def features(self) -> ReferenceFeatures:
        """The network whose features compare images."""
        return reference_features(self.real, self.spec)

    @functools.cached_property
    def drawn(self) -> Tensor:
        """(classes, candidates + reference, 3, S, S) uint8 real images: a row of the table, then the reference."""
        count = self.options.candidates + self.options.reference
        rows = choose("random", self.real.labels, count, self.spec.num_classes, seed=0)
        return self.real.images[rows].unflatten(0, (self.spec.num_classes, count))

    @functools.cached_property
    def reference(self) -> Tensor:
        """(classes * reference, D) features of real images."""
        return self.features(self.drawn[:, self.options.candidates :].flatten(0, 1))

    def run(self) -> None:
        """Compute everything that is missing."""
        ways = {REAL: lambda: self.drawn[:, : self.options.images]}
        ways |= {_cell(*cell): functools.partial(self._samples, *cell, self.options.images) for cell in self.cells}
        for name, images in ways.items():
            self.findings.once(name, "quality", lambda images=images: self._quality(images()))
            self.findings.once(name, "accuracies", lambda images=images: self._score(images()[:, : self.options.ipc]))
        for source, how in self._choices():
            self.findings.once(
                f"{source}, {how}", "accuracies", lambda source=source, how=how: self._score(self._chosen(source, how))
            )

    def table(self) -> str:
        """The results so far, as two tables in Markdown."""
        cells = []
        for name in (REAL, *(_cell(*cell) for cell in self.cells)):
            found = self.findings.of(name)
            quality = found.get("quality", {})
            shown = [f"{quality[key]:.3f}" if key in quality else "-" for key in ("frechet", "density", "coverage")]
            cells.append([name, *shown, percent(found.get("accuracies", []))])
        chosen = [
            [source, how, percent(self.findings.of(f"{source}, {how}").get("accuracies", []))]
            for source, how in self._choices()
        ]
        first = markdown(["guidance, steps", "Frechet", "density", "coverage", "accuracy, %"], cells)
        return first + "\n\n" + markdown(["chosen among", "how", "accuracy, %"], chosen)

    def _choices(self) -> list[tuple[str, str]]:
        return [(source, how) for source in (_cell(*self.cells[0]), REAL) for how in self.options.select]

    def _samples(self, guidance: float, steps: int, count: int) -> Tensor:
        """(classes, count, 3, S, S) uint8: the first ones are the same whatever the count."""
        path = self.findings.out / f"{_cell(guidance, steps).replace(', ', '-')}-{count}.pt"
        if not path.is_file():
            sampling = SamplingSettings(steps=steps, guidance=guidance, batch_size=100)
            generate(self.options.dataset, count, FromModel(self.options.model, sampling), path)
        pixels = to_uint8(denormalize(read_set(path, self.spec.name).images, self.spec))
        return pixels.unflatten(0, (self.spec.num_classes, count))

    def _chosen(self, source: str, how: str) -> Tensor:
        """(classes, ipc, 3, S, S) uint8."""
        count = self.options.candidates
        pool = self.drawn[:, :count] if source == REAL else self._samples(*self.cells[0], count)
        images, labels = pool.flatten(0, 1), class_labels(self.spec.num_classes, count)

        def extract(rows: Tensor) -> ImageFeatures:
            return ImageFeatures(*self.features.with_confidence(images[rows], labels[rows]))

        rows = choose(how, labels, self.options.ipc, self.spec.num_classes, seed=0, extract=extract)
        return images[rows].unflatten(0, (self.spec.num_classes, self.options.ipc))

    def _quality(self, images: Tensor) -> Record:
        features = self.features(images.flatten(0, 1))
        density, coverage = density_and_coverage(self.reference, features)
        distance = frechet_distance(self.reference, features)
        return {"frechet": distance, "density": density, "coverage": coverage}

    def _score(self, images: Tensor) -> list[float]:
        """The accuracies of (classes, ipc, 3, S, S) uint8 images."""
        options = self.options
        return self.findings.score(
            normalize(images.flatten(0, 1), self.spec), self.spec,
            rounds=options.rounds, epochs_setting=options.epochs_setting,
        )  # fmt: skip


def _cell(guidance: float, steps: int) -> str:
    return f"{guidance:g}, {steps} steps"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the generator's folder")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 1.0, 2.0, 3.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--images", type=int, default=20, help="samples of a class that quality is measured on")
    parser.add_argument("--candidates", type=int, default=100, help="images of a class to choose from")
    parser.add_argument(
        "--select", nargs="+", choices=(*LABEL_METHODS, *FEATURE_METHODS), metavar="HOW", default=["random", *FEATURE_METHODS]
    )
    parser.add_argument("--reference", type=int, default=100, help="real images of a class to compare with")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs-setting", type=int, default=30, help="E of the protocol")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_study(Study, parse())
