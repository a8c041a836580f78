"""Which network and which objective make the best generator for the same computation? On the same latents, in turn.

    python tools/study_denoiser.py cifar100 --start runs/cifar100 [--out FOLDER] [--minutes N] [--preset NAME] [--table]

The autoencoder and the encoded training set are those of --start. First a U-ViT and a DiT predict v; the one whose
samples have the smaller Frechet distance then predicts noise, predicts the flow, and predicts v without min-SNR
weights. Each trains for as many steps as fit into --minutes of CPU time of a core, which other work on the machine does
not stretch. CPU time includes waiting threads, so give the study one (OMP_NUM_THREADS=1).

Samples are compared with real images in the features of an official ConvNet trained on real images; a row of real
images shows what can be reached. With --rounds they are evaluated as well. Finished results are kept in the folder, so
the study continues when run again; --table shows what there is so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from torch import Tensor

from ddkit.data.images import normalize
from ddkit.data.store import dataset_spec, load_dataset, store_hash
from ddkit.generator.config import DenoiserConfig, GeneratorConfig, ObjectiveConfig
from ddkit.generator.networks import build_denoiser
from ddkit.generator.presets import preset
from ddkit.generator.sampling import Sampler, SamplingSettings, class_ordered
from ddkit.generator.training.latents import LatentSet
from ddkit.generator.training.stages import DenoiserStage
from ddkit.generator.training.train import TrainingData, TrainingRequest, train
from ddkit.generator.training.trainer import Callback, Trainer
from ddkit.metrics.coverage import density_and_coverage
from ddkit.metrics.features import ReferenceFeatures, reference_features
from ddkit.metrics.frechet import frechet_distance
from ddkit.sets.select import choose
from kept import Findings, Record, arguments_of, carry_out, markdown, percent, share_latents

# About the size of the U-ViT in the preset `tiny`.
DIT = DenoiserConfig("dit", hidden_size=192, depth=6, num_heads=3)
REAL = "real images"
_STEPS_BETWEEN_TIMES = 5
_TIMES = 5


@dataclass(frozen=True)
class Arm:
    """One row of the table. backbone: the name of the row with the same network, and so the same cost of a step."""

    name: str
    architecture: str
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig("v"))
    backbone: str | None = None


BACKBONES = (Arm("U-ViT, v", "uvit"), Arm("DiT, v", "dit"))


def objectives(backbone: Arm) -> list[Arm]:
    """The backbone with what else it may learn."""
    title = backbone.name.split(",")[0]
    ways = {
        "epsilon": ObjectiveConfig("epsilon"),
        "flow": ObjectiveConfig("flow"),
        "v, no min-SNR": ObjectiveConfig("v", min_snr_gamma=None),
    }
    return [Arm(f"{title}, {name}", backbone.architecture, objective, backbone.name) for name, objective in ways.items()]


class Study:
    """The arms of one dataset and their results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.findings = Findings(options.out or Path("runs") / f"study-denoiser-{options.dataset}")
        self.findings.claim(options, rows=())
        self.spec = dataset_spec(options.dataset)
        self.real = load_dataset(options.dataset, "train")
        self.data = TrainingData(options.dataset, self.real, store_hash(options.dataset, "train"))

    @property
    def arms(self) -> list[Arm]:
        """Those that can be named yet: the better backbone is not known before both are measured."""
        distances = [self.findings.of(arm.name).get("quality", {}).get("frechet") for arm in BACKBONES]
        if None in distances:
            return list(BACKBONES)
        return [*BACKBONES, *objectives(BACKBONES[distances.index(min(distances))])]

    @cached_property
    def features(self) -> ReferenceFeatures:
        """The network whose features compare images."""
        return reference_features(self.real, self.spec)

    @cached_property
    def drawn(self) -> Tensor:
        """(classes, images + reference, 3, S, S) uint8 real images: a row of the table, then the reference."""
        count = self.options.images + self.options.reference
        rows = choose("random", self.real.labels, count, self.spec.num_classes, seed=0)
        return self.real.images[rows].unflatten(0, (self.spec.num_classes, count))

    @cached_property
    def reference(self) -> Tensor:
        """(classes * reference, D) features of real images."""
        return self.features(self.drawn[:, self.options.images :].flatten(0, 1))

    def run(self) -> None:
        """Compute everything that is missing."""
        self._measure(REAL, lambda: self.drawn[:, : self.options.images].flatten(0, 1))
        done: set[str] = set()
        while remaining := [arm for arm in self.arms if arm.name not in done]:
            arm = remaining[0]
            self.findings.once(arm.name, "cost", lambda arm=arm: self._cost(arm))
            self._measure(arm.name, lambda arm=arm: self._samples(arm))
            done.add(arm.name)

    def table(self) -> str:
        """The results so far, as Markdown."""
        titles = ["network, prediction", "parameters", "ms a step", "steps", "Frechet", "density", "coverage", "accuracy, %"]
        rows = []
        for name in (REAL, *(arm.name for arm in self.arms)):
            known = self.findings.of(name)
            cells = [*_shown_cost(known.get("cost")), *_shown_quality(known.get("quality"))]
            rows.append([name, *cells, percent(known.get("accuracies", []))])
        return markdown(titles, rows)

    def _measure(self, name: str, images: Callable[[], Tensor]) -> None:
        self.findings.once(name, "quality", lambda: self._quality(images()))
        if self.options.rounds:
            self.findings.once(name, "accuracies", lambda: self._accuracies(images()))

    def _config(self, arm: Arm) -> GeneratorConfig:
        config = preset(self.options.preset).config(self.spec.image_size)
        denoiser = config.denoiser
        if arm.architecture != denoiser.architecture:
            denoiser = dataclasses.replace(DIT, tokens_per_side=denoiser.tokens_per_side)
        return dataclasses.replace(
            config,
            denoiser=denoiser,
            objective=arm.objective,
            compile=self.options.compile,
            pretrained_autoencoder=str(self.options.start / "vae"),
        )

    def _cost(self, arm: Arm) -> Record:
        """The network's size, the seconds a step takes a core, and how many of them fit into the time."""
        if arm.backbone is not None:
            return self.findings.of(arm.backbone)["cost"]
        config = self._config(arm)
        shape = config.autoencoder.latent_shape(self.spec.image_size)
        network = build_denoiser(config.denoiser, shape, self.spec.num_classes, seed=0)
        made_up = torch.zeros(len(self.real), 1, *shape, dtype=torch.float16)
        stage = DenoiserStage(config, network, LatentSet(made_up, self.real.labels, std=1.0))
        seconds = seconds_per_step(stage, compile_network=config.compile)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return {"parameters": parameters, "seconds": seconds, "steps": round(60 * self.options.minutes / seconds)}

    def _samples(self, arm: Arm) -> Tensor:
        """(classes * images, 3, S, S) uint8 of the arm's model, which is trained where it is not yet."""
        folder, config = self.findings.folder(arm.name) / "model", self._config(arm)
        steps = self.findings.of(arm.name)["cost"]["steps"]
        optimizer = dataclasses.replace(config.denoiser_optimizer, steps=steps)
        share_latents([self.options.start], folder)
        request = TrainingRequest(dataclasses.replace(config, denoiser_optimizer=optimizer), folder, self.options.preset)
        sampler = Sampler(train(self.data, request), self.options.sampling)
        return torch.cat([*sampler.images(*class_ordered(self.options.images, self.spec.num_classes))])

    def _quality(self, images: Tensor) -> Record:
        features = self.features(images)
        density, coverage = density_and_coverage(self.reference, features)
        distance = frechet_distance(self.reference, features)
        return {"frechet": distance, "density": density, "coverage": coverage}

    def _accuracies(self, images: Tensor) -> list[float]:
        ipc = min(self.options.ipc, self.options.images)
        chosen = images.unflatten(0, (self.spec.num_classes, -1))[:, :ipc].flatten(0, 1)
        return self.findings.score(
            normalize(chosen, self.spec), self.spec, rounds=self.options.rounds, epochs_setting=self.options.epochs_setting
        )


def seconds_per_step(stage: DenoiserStage, *, compile_network: bool) -> float:
    """CPU seconds of a step of training, the median of a few; compiling is not counted."""
    times: list[float] = []

    class Clock(Callback):
        every = _STEPS_BETWEEN_TIMES

        def on_interval(self, trainer: Trainer) -> None:
            times.append(time.process_time())

    steps = _STEPS_BETWEEN_TIMES * (_TIMES + 1)  # the first interval compiles
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            stage, Accelerator(cpu=True), Path(folder), steps=steps, compile_network=compile_network, callbacks=[Clock()]
        ).run()
    return median(after - before for before, after in pairwise(times)) / _STEPS_BETWEEN_TIMES


def _shown_cost(cost: Record | None) -> list[str]:
    if cost is None:
        return ["-"] * 3
    return [f"{cost['parameters']:,}", f"{1000 * cost['seconds']:.0f}", f"{cost['steps']:,}"]


def _shown_quality(quality: Record | None) -> list[str]:
    if quality is None:
        return ["-"] * 3
    return [f"{quality['frechet']:.2f}", f"{quality['density']:.3f}", f"{quality['coverage']:.3f}"]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, `sampling` put together from its own."""
    parser = arguments_of(__doc__)
    parser.add_argument("--start", type=Path, required=True, help="the model folder whose autoencoder all share")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--minutes", type=float, default=10, help="of a core, to train each for")
    parser.add_argument("--images", type=int, default=20, help="samples of a class that are compared")
    parser.add_argument("--reference", type=int, default=100, help="real images of a class to compare with")
    parser.add_argument("--sampling-steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=0, help="of the protocol, on the first --ipc samples of a class")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--epochs-setting", type=int, default=30, help="E of the protocol")
    parser.add_argument("--compile", action="store_true", help="compile before training; worth it above a few minutes")
    options = parser.parse_args(arguments)
    options.sampling = SamplingSettings(steps=options.sampling_steps, guidance=options.guidance, batch_size=64)
    return options


def main() -> None:
    options = parse()
    carry_out(Study, options)


if __name__ == "__main__":
    main()
