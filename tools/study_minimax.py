"""Do the minimax criteria do what they claim? The same generator tuned for as many steps with and without them.

    python tools/study_minimax.py cifar100 --start runs/cifar100 [--out FOLDER] [--steps N] [--sweep R,D ...] [--table]

Every arm starts from the same weights, sees the same batches, and is sampled with the same noise. Its samples are
compared class by class in the features of an official ConvNet trained on real images, and evaluated by the protocol.
Finished results are kept in the folder, so the study continues when run again; --table shows what there is so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from ddkit.data.images import denormalize, normalize, to_uint8
from ddkit.data.store import dataset_spec, load_dataset, store_hash
from ddkit.distill.generate import FromModel, generate
from ddkit.generator.config import GeneratorConfig, MinimaxConfig
from ddkit.generator.model_folder import Model, ModelFacts, has_model, save_model
from ddkit.generator.presets import MINIMAX_PRESET, preset
from ddkit.generator.pretrained import start_from
from ddkit.generator.sampling import SamplingSettings
from ddkit.generator.training.train import TrainingData, TrainingRequest, train
from ddkit.metrics.coverage import density_and_coverage, nearest
from ddkit.metrics.features import ReferenceFeatures, reference_features
from ddkit.metrics.frechet import frechet_distance
from ddkit.sets.distilled import read_set
from ddkit.sets.select import choose
from kept import Findings, Record, arguments_of, carry_out, markdown, percent, share_latents


@dataclass(frozen=True)
class Arm:
    """One row of the table. weights: lambda_r and lambda_d; None where nothing is tuned."""

    name: str
    weights: tuple[float, float] | None = None
    real: bool = False


REAL = Arm("real images", real=True)
START = Arm("not tuned")
WITHOUT = Arm("without", (0.0, 0.0))
PUBLISHED = Arm("published", (0.002, 0.008))


class Study:
    """The arms of one dataset and their results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.findings = Findings(options.out or Path("runs") / f"study-minimax-{options.dataset}")
        self.findings.claim(options, rows=("sweep", "ipc", "epochs_setting"))
        self.spec = dataset_spec(options.dataset)
        self.real = load_dataset(options.dataset, "train")
        self.sweep = [Arm(f"{r:g}, {d:g}", (r, d)) for r, d in options.sweep]
        self.arms = [REAL, START, WITHOUT, PUBLISHED, *self.sweep]

    @functools.cached_property
    def features(self) -> ReferenceFeatures:
        """The network whose features compare images."""
        name = self.options.features_of or self.options.dataset
        return reference_features(load_dataset(name, "train"), dataset_spec(name))

    @functools.cached_property
    def drawn(self) -> Tensor:
        """(classes, measured + reference, 3, S, S) uint8 real images: a row of the table, then the reference."""
        count = self.options.measured + self.options.reference
        rows = choose("random", self.real.labels, count, self.spec.num_classes, seed=0)
        return self.real.images[rows].unflatten(0, (self.spec.num_classes, count))

    @functools.cached_property
    def reference(self) -> Tensor:
        """(classes, reference, D) features of real images."""
        return self._look(self.drawn[:, self.options.measured :])

    def run(self) -> None:
        """Everything that is not done yet; of the sweep only the first weights at more than the smallest IPC."""
        for arm in self.arms:
            self.findings.once(arm.name, "pictures", lambda arm=arm: self._measure(arm))
        first = [WITHOUT, PUBLISHED, *self.sweep[:1], START]
        for name, (ipc, epochs) in self._evaluations().items():
            for arm in [*first, *self.sweep[1:], REAL] if ipc == min(self.options.ipc) else first:
                self.findings.once(arm.name, name, functools.partial(self._evaluate, arm, ipc, epochs))

    def table(self) -> str:
        """The results so far, as Markdown."""
        evaluations = self._evaluations()
        columns = {"arm": "lambda r, d", **_TITLES, **{name: f"{name}, %" for name in evaluations}}
        rows = []
        for arm in self.arms:
            found = self.findings.of(arm.name)
            values = {"arm": arm.name, **_shown(found.get("pictures", {}))}
            values |= {name: percent(found[name]) for name in evaluations if name in found}
            rows.append([values.get(name, "-") for name in columns])
        return markdown(list(columns.values()), rows)

    def _evaluations(self) -> dict[str, tuple[int, int]]:
        """The images per class and the E of each, by name."""
        pairs = zip(self.options.ipc, self.options.epochs_setting, strict=True)
        return {f"IPC {ipc} (E = {epochs})": (ipc, epochs) for ipc, epochs in pairs}

    def _images(self, arm: Arm, count: int) -> Tensor:
        """(classes, count, 3, S, S) uint8: the first ones are the same whatever the count."""
        if arm.real:
            return self.drawn[:, :count]
        path = self.findings.folder(arm.name) / f"{self.options.dataset}-{count}.pt"
        if not path.is_file():
            generate(self.options.dataset, count, FromModel(self._model(arm), self.options.sampling), path)
        pixels = to_uint8(denormalize(read_set(path, self.spec.name).images, self.spec))
        return pixels.unflatten(0, (self.spec.num_classes, count))

    def _look(self, images: Tensor) -> Tensor:
        """(classes, n, 3, S, S) uint8 -> (classes, n, D)."""
        return self.features(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def _model(self, arm: Arm) -> Path:
        """The folder of the arm's generator."""
        folder = self.findings.folder(arm.name) / "model"
        if arm.weights is not None:
            share_latents([self.options.start, *self.findings.out.glob("*/model")], folder)
            train(self._data(), TrainingRequest(self._config(*arm.weights), folder, MINIMAX_PRESET))
        elif not has_model(folder):
            generator = start_from(str(self.options.start), self.real.class_names, full=True).generator
            save_model(Model(generator.denoiser, generator.autoencoder, self._facts(generator.prediction)), folder)
        return folder

    def _config(self, lambda_r: float, lambda_d: float) -> GeneratorConfig:
        options, config = self.options, preset(MINIMAX_PRESET).config(self.spec.image_size)
        start = start_from(str(options.start), self.real.class_names)
        return dataclasses.replace(
            config,
            objective=dataclasses.replace(config.objective, prediction=start.generator.prediction),
            denoiser_optimizer=dataclasses.replace(
                config.denoiser_optimizer, steps=options.steps, batch_size=options.batch_size, learning_rate=options.lr
            ),
            ema_decay=options.ema_decay,
            minimax=MinimaxConfig(str(options.start), full=options.full, lambda_r=lambda_r, lambda_d=lambda_d),
        )

    def _data(self) -> TrainingData:
        return TrainingData(self.options.dataset, self.real, store_hash(self.options.dataset, "train"))

    def _facts(self, prediction: str) -> ModelFacts:
        data = self._data()
        return ModelFacts(data.name, data.images.class_names, data.image_size, prediction, "none", 0, 0, data.sha256)

    def _measure(self, arm: Arm) -> Record:
        return measure_by_class(self._look(self._images(arm, self.options.measured)), self.reference)

    def _evaluate(self, arm: Arm, ipc: int, epochs: int) -> list[float]:
        count = max(ipc, self.options.measured)
        images = normalize(self._images(arm, count)[:, :ipc].flatten(0, 1), self.spec)
        return self.findings.score(images, self.spec, rounds=self.options.rounds, epochs_setting=epochs)


def measure_by_class(ours: Tensor, real: Tensor) -> Record:
    """Representativeness and diversity, means over the classes, and the Frechet distance of all together.

    ours: (classes, n, D) features of pictures. real: (classes, N, D) features of real images.
    """
    rows = []
    for pictures, members in zip(ours, real, strict=True):
        density, coverage = density_and_coverage(members, pictures)
        rows.append((coverage, density, float(nearest(members, pictures)[1].mean()), _apart(pictures)))
    values = dict(zip(_TITLES, (mean(column) for column in zip(*rows, strict=True)), strict=False))
    return values | {"frechet": frechet_distance(real.flatten(0, 1), ours.flatten(0, 1))}


_TITLES = {
    "coverage": "coverage",
    "density": "density",
    "reach": "real to nearest",
    "apart": "to nearest other",
    "frechet": "Frechet",
}


def _apart(features: Tensor) -> float:
    """The mean distance from each of (n, D) features to the nearest other one."""
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    return float(distances.min(dim=1).values.mean())


def _shown(pictures: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.3f}" if name != "frechet" else f"{value:.2f}" for name, value in pictures.items()}


def _pair(text: str) -> tuple[float, float]:
    first, second = (float(part) for part in text.split(","))
    return first, second


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, `sampling` put together from its own."""
    parser = arguments_of(__doc__)
    parser.add_argument("--start", type=Path, required=True, help="the generator that all arms start from")
    parser.add_argument("--sweep", type=_pair, nargs="*", default=[], metavar="R,D", help="more weights to try")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.99)
    parser.add_argument("--full", action="store_true", help="tune everything")
    parser.add_argument("--ipc", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--epochs-setting", type=int, nargs="+", default=[20, 10, 5], help="E for each IPC")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measured", type=int, default=20, help="images of a class that are compared")
    parser.add_argument("--reference", type=int, default=100, help="real images of a class to compare with")
    parser.add_argument(
        "--features-of",
        metavar="DATASET",
        help="whose real images the network of the features learns from; such as that of a part of it",
    )
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="compile before sampling; worth it for thousands of images")
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args(arguments)
    if len(options.ipc) != len(options.epochs_setting):
        parser.error(f"--epochs-setting: {len(options.ipc)} are wanted, one for each --ipc, not {len(options.epochs_setting)}")
    options.sampling = SamplingSettings(
        steps=options.sampling_steps, guidance=options.guidance, batch_size=100, compile=options.compile
    )
    return options


def main() -> None:
    options = parse()
    carry_out(Study, options)


if __name__ == "__main__":
    main()
