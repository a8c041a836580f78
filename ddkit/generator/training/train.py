"""Training a generator: the autoencoder, the latents, the denoiser, the model folder; each once, each resumable."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from diffusers import AutoencoderKL

from ddkit.data.store import ImageSet
from ddkit.errors import UsageError
from ddkit.generator.autoencoder import build_autoencoder, load_pretrained
from ddkit.generator.difffit import plain_copy
from ddkit.generator.model_folder import (
    WEIGHTS_FILE,
    Model,
    ModelFacts,
    has_model,
    load_autoencoder,
    load_model,
    read_facts,
    save_autoencoder,
    save_model,
)
from ddkit.generator.networks import build_denoiser
from ddkit.generator.presets import GeneratorConfig
from ddkit.generator.pretrained import Start, start_from
from ddkit.generator.training.chart import draw_chart
from ddkit.generator.training.checkpoints import list_checkpoints
from ddkit.generator.training.latents import LATENTS_FILE, LatentSet, cached_latents
from ddkit.generator.training.records import MetricsLog, Score, require_tensorboard
from ddkit.generator.training.run_folder import CHART_FILE, CHECKPOINTS, Begun, claim, start_over
from ddkit.generator.training.stages import AutoencoderStage, DenoiserStage, MinimaxStage
from ddkit.generator.training.trainer import Limits, Stage, Trainer, require_even_parts
from ddkit.runtime.device import resolve_device
from ddkit.runtime.distributed import LONGEST_WAIT
from ddkit.runtime.files import exclusive, sha256_of
from ddkit.runtime.progress import Listener, ignore
from ddkit.runtime.seeds import derived_seed

log = logging.getLogger(__name__)

AUTOENCODER_SHARE = 0.15  # of a training time given in seconds
_NO_LIMIT = 10**9  # steps, where time is the limit


@dataclass(frozen=True)
class TrainingData:
    """What is trained on. name: of the dataset. sha256: of its prepared training split."""

    name: str
    images: ImageSet
    sha256: str

    def __post_init__(self) -> None:
        if not len(self.images):
            raise UsageError(f"The training split of '{self.name}' holds no images.")

    @property
    def image_size(self) -> int:
        return self.images.images.shape[-1]


@dataclass(frozen=True)
class TrainingRequest:
    """How to train: the configuration and the limits of this call, which may grow from call to call.

    preset: the name the configuration came from, for the records.
    seconds: of training in all, both stages; the autoencoder takes up to AUTOENCODER_SHARE of it, once. None: the
        configuration's steps.
    device: as `resolve_device` names it.
    """

    config: GeneratorConfig
    preset: str = ""
    seconds: float | None = None
    device: str = "cpu"
    save_every_seconds: float = 300.0
    tensorboard: bool = False


@dataclass(frozen=True)
class Tracking:
    """Scoring the model during training; the folder then keeps the best one by it.

    score: of a model with its averaged weights, lower is better, such as a Frechet distance. name: of the score.
    """

    name: str
    score: Callable[[Model], float]
    every_steps: int = 1000

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise UsageError(f"Tracking every {self.every_steps} steps cannot be meant.")


def train(
    data: TrainingData,
    request: TrainingRequest,
    folder: Path,
    *,
    start: Start | None = None,
    tracking: Tracking | None = None,
    fresh: bool = False,
    progress: Listener = ignore,
) -> Model:
    """Train a generator in `folder`, going on from what is there; returns the model that is then in the folder.

    start: what `config.minimax.init` names, where the caller has read it already; it is trained in place.
    fresh: remove the training that is there first, as `start_over` does.
    Raises UsageError where the folder holds a training with other settings (each is listed), a model that is not of a
    training here, or the very generator to start from, and where another process trains in it; Interrupted and
    ComputeError as `Trainer.run` does, BadFileError for what the system refuses.
    """
    minimax = request.config.minimax
    if minimax is not None:
        if Path(minimax.init).expanduser().resolve() == folder.resolve():
            raise UsageError(f"{folder} holds what fine-tuning starts from.", "Choose another folder with --out.")
        start = start or _start(request.config, data.images.class_names)
    if request.tensorboard:
        require_tensorboard()
    with (
        _accelerator(request) as accelerator,
        exclusive(folder, "trains", elsewhere="--out", is_main=accelerator.is_main_process),
    ):
        # What may fail does so before anything is removed.
        require_even_parts(request.config.denoiser_optimizer, accelerator.num_processes)
        pretrained, source = None, request.config.pretrained_autoencoder
        if source and (fresh or not (folder / "vae" / WEIGHTS_FILE).is_file()):
            pretrained = load_pretrained(source)
        elif not source and minimax is None:
            require_even_parts(request.config.autoencoder_optimizer, accelerator.num_processes)
        with accelerator.main_process_first():
            if fresh and accelerator.is_main_process:
                start_over(folder)
            tracked = (tracking.every_steps, tracking.name) if tracking else (0, "")
            of = (data.name, data.sha256, data.images.class_names, data.image_size)
            claim(folder, Begun(*of, request.preset, request.config, *tracked))
        listener = progress if accelerator.is_main_process else ignore
        run = _Run(data, request, folder, accelerator, start, pretrained, tracking, listener)
        with contextlib.closing(run.log):
            autoencoder = run.autoencoder()
            run.denoiser(autoencoder, run.latents(autoencoder))
        if accelerator.is_main_process:
            draw_chart(run.log.records(), folder / CHART_FILE)
        accelerator.wait_for_everyone()
        return load_model(folder, dataset=data.name)


class _Run:
    """One call of `train`: what its steps share."""

    def __init__(
        self,
        data: TrainingData,
        request: TrainingRequest,
        folder: Path,
        accelerator: Accelerator,
        start: Start | None,
        pretrained: AutoencoderKL | None,
        tracking: Tracking | None,
        progress: Listener,
    ) -> None:
        self.pretrained = pretrained
        self.data, self.request, self.config = data, request, request.config
        self.folder, self.accelerator, self.tracking, self.progress = folder, accelerator, tracking, progress
        self.start = start.generator if start else None
        self.latent_side = (
            self.start.denoiser.config.sample_size if self.start else self.config.autoencoder.latent_shape(data.image_size)[1]
        )
        self.best = _best_score(folder, tracking, data.sha256)
        self.log = MetricsLog(folder, tensorboard=request.tensorboard and accelerator.is_main_process)

    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder, from the folder where it is finished."""
        wanted = not (self.folder / "vae" / WEIGHTS_FILE).is_file() or self._may_improve_autoencoder()
        self.accelerator.wait_for_everyone()  # all processes have looked before one writes
        if wanted:
            self._make_autoencoder()
            self.accelerator.wait_for_everyone()
        elif self._autoencoder_was_hurried():
            log.warning("The autoencoder stays as little trained as it is, as the denoiser has learned from its latents. "
                        "--fresh trains both for longer.")  # fmt: skip
        return load_autoencoder(self.folder / "vae").to(self.accelerator.device).eval()

    def latents(self, autoencoder: AutoencoderKL) -> LatentSet:
        """The training set's latents; the autoencoder's latent scale is set from them."""
        weights = sha256_of(self.folder / "vae" / WEIGHTS_FILE)
        with self.accelerator.main_process_first():
            latents = cached_latents(
                self.folder / CHECKPOINTS / LATENTS_FILE,
                autoencoder,
                self.data.images,
                self.latent_side,
                flips=self.config.flips,
                identity=f"{self.data.sha256} {weights} flips={self.config.flips}",
                progress=self.progress,
            )
        if self.start:
            # What a network has learned holds for the latent scale it has learned with.
            return replace(latents, std=1 / autoencoder.config.scaling_factor)
        autoencoder.register_to_config(scaling_factor=1 / latents.std)
        return latents

    def denoiser(self, autoencoder: AutoencoderKL, latents: LatentSet) -> None:
        """Train the denoiser; the model folder is written whenever a checkpoint is."""
        stage = self._denoiser_stage(latents)
        steps, seconds = stage.optimizer.steps, None
        if self.request.seconds is not None:
            share = AUTOENCODER_SHARE * self.request.seconds
            steps, seconds = _NO_LIMIT, self.request.seconds - min(share, self._autoencoder_seconds())
        engine = self._engine(stage, Limits(steps, seconds, self.request.save_every_seconds))
        engine.on_save = lambda: self._save_model(engine, autoencoder)
        if self.tracking is not None:
            engine.every(self.tracking.every_steps, lambda: self._track(engine, autoencoder))
            if engine.step and engine.step % self.tracking.every_steps == 0:  # it was stopped before it was scored
                self._score_unless_scored(engine, autoencoder)
        engine.run()
        if self.tracking is not None:
            self._score_unless_scored(engine, autoencoder)
        behind = not has_model(self.folder) or (self.best is None and read_facts(self.folder).steps != engine.step)
        self.accelerator.wait_for_everyone()  # all processes have looked before one writes
        if behind:  # a kill between the last checkpoint and the model it belongs to
            engine.save()

    def _score_unless_scored(self, engine: Trainer, autoencoder: AutoencoderKL) -> None:
        scored = self._scored(engine.step)
        self.accelerator.wait_for_everyone()  # all processes have looked before one writes
        if not scored and self.accelerator.is_main_process:
            self._track(engine, autoencoder)
        self.accelerator.wait_for_everyone()

    def _may_improve_autoencoder(self) -> bool:
        """Whether one of our own can train on: not once a denoiser has begun to learn from its latents."""
        trained_here = not self.start and not self.config.pretrained_autoencoder
        return trained_here and not list_checkpoints(self.folder / CHECKPOINTS, DenoiserStage.name)

    def _autoencoder_was_hurried(self) -> bool:
        """Whether it ended when its time was up, and would have more than twice as much now."""
        records = self._autoencoder_records()
        if self.request.seconds is None or not records or records[-1]["step"] >= self.config.autoencoder_optimizer.steps:
            return False
        return AUTOENCODER_SHARE * self.request.seconds > 2 * self._autoencoder_seconds()

    def _autoencoder_seconds(self) -> float:
        """Of the time in all, what training the autoencoder took."""
        return max((record["seconds"] for record in self._autoencoder_records()), default=0.0)

    def _autoencoder_records(self) -> list[dict[str, Any]]:
        return [record for record in self.log.records() if record["stage"] == AutoencoderStage.name]

    def _scored(self, step: int) -> bool:
        return any(
            (record["stage"], record["step"], record.get("name")) == ("score", step, self.tracking.name)
            for record in self.log.records()
        )

    def _denoiser_stage(self, latents: LatentSet) -> DenoiserStage:
        classes = len(self.data.images.class_names)
        if self.start:
            return MinimaxStage(self.config, self.start.denoiser.train(), latents, classes)
        shape, seed = tuple(latents.latents.shape[-3:]), derived_seed("denoiser", self.config.seed)
        return DenoiserStage(self.config, build_denoiser(self.config.denoiser, shape, classes, seed=seed), latents)

    def _make_autoencoder(self) -> None:
        network = self.start.autoencoder if self.start else self.pretrained
        if network is not None:
            if self.accelerator.is_main_process:
                save_autoencoder(network, self.folder)
            return
        seed = derived_seed("autoencoder", self.config.seed)
        network = build_autoencoder(self.config.autoencoder, self.data.image_size, seed=seed)
        stage = AutoencoderStage(self.config, network, self.data.images)
        share = None if self.request.seconds is None else AUTOENCODER_SHARE * self.request.seconds
        engine = self._engine(stage, Limits(stage.optimizer.steps, share, self.request.save_every_seconds))
        engine.run()
        with engine.ema_weights() as averaged:
            if self.accelerator.is_main_process:
                save_autoencoder(averaged, self.folder)

    def _engine(self, stage: Stage, limits: Limits) -> Trainer:
        return Trainer(
            stage,
            self.accelerator,
            self.folder / CHECKPOINTS,
            limits,
            compile_network=self.config.compile,
            progress=self.progress,
            on_record=self.log.write,
        )

    def _save_model(self, engine: Trainer, autoencoder: AutoencoderKL) -> None:
        """Keep the folder's model at the newest state, or, where scores are tracked, leave it at the best one."""
        if self.best is None:
            self._write_model(engine, autoencoder, {})

    def _track(self, engine: Trainer, autoencoder: AutoencoderKL) -> None:
        """Score the averaged weights; the best so far become the folder's model."""
        with engine.ema_weights() as averaged:
            model = Model(averaged.eval(), autoencoder, self._facts(engine, {}))
            score = self.tracking.score(model)
            averaged.train()
        if self.best is None or score < self.best:
            self.best = score
            self._write_model(engine, autoencoder, {self.tracking.name: score})
        self.log.write(Score(engine.step, self.tracking.name, score))  # last, as it says that all of this was done

    def _write_model(self, engine: Trainer, autoencoder: AutoencoderKL, metrics: Mapping[str, float]) -> None:
        with engine.ema_weights() as averaged:
            denoiser = plain_copy(averaged) if self.start else averaged
            save_model(Model(denoiser, autoencoder, self._facts(engine, metrics)), self.folder)

    def _facts(self, engine: Trainer, metrics: Mapping[str, float]) -> ModelFacts:
        return ModelFacts(
            dataset=self.data.name,
            class_names=self.data.images.class_names,
            image_size=self.data.image_size,
            prediction=self.config.objective.prediction,
            preset=self.request.preset,
            steps=engine.step,
            images_seen=engine.step * self.config.denoiser_optimizer.batch_size,
            dataset_sha256=self.data.sha256,
            metrics=metrics,
        )


def _best_score(folder: Path, tracking: Tracking | None, dataset_sha256: str) -> float | None:
    """The score of the model in the folder, where it was tracked by the same name and against the same images."""
    if tracking is None or not has_model(folder):
        return None
    facts = read_facts(folder)
    return facts.metrics.get(tracking.name) if facts.dataset_sha256 == dataset_sha256 else None


def _start(config: GeneratorConfig, class_names: Sequence[str]) -> Start:
    minimax = config.minimax
    start = start_from(minimax.init, class_names, full=minimax.full, chosen=dict(minimax.class_map))
    if start.generator.prediction != config.objective.prediction:
        raise UsageError(
            f"{start.source} predicts '{start.generator.prediction}', not '{config.objective.prediction}'.",
            "Set ObjectiveConfig.prediction to what it has learned.",
        )
    return start


@contextlib.contextmanager
def _accelerator(request: TrainingRequest) -> Iterator[Accelerator]:
    """accelerate's view of the processes and devices of this training, forgotten afterwards."""
    device = resolve_device(request.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu" and request.config.precision == "float16":
        raise UsageError("float16 is for GPUs.", "On a CPU take --precision bfloat16, or float32.")
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[request.config.precision]
    try:
        # No buffer here needs to be sent around: what has any computes the same on all processes. They wait for each
        # other for hours, as the first of them encodes the training set.
        settings = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        yield Accelerator(mixed_precision=precision, cpu=device.type == "cpu", kwargs_handlers=settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
