"""Training a generator: the autoencoder, the latents, the denoiser, the model folder; each once, each resumable."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from diffusers import AutoencoderKL

from ddkit.data.prepare import open_dataset
from ddkit.data.store import ImageSet, train_sha256
from ddkit.errors import ComputeError, UsageError, counted
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.config import SECONDS_WORTH_COMPILING, GeneratorConfig
from ddkit.generator.difffit import plain_copy
from ddkit.generator.model_facts import WEIGHTS_FILE, ModelFacts, has_model, read_facts
from ddkit.generator.model_folder import Model, load_autoencoder, load_model, save_autoencoder, save_model
from ddkit.generator.networks import build_denoiser
from ddkit.generator.pretrained import Pretrained, Start, load_pretrained_autoencoder, start_from
from ddkit.generator.training.checkpoints import list_checkpoints
from ddkit.generator.training.latents import LATENTS_FILE, LatentSet, cached_latents, latents_identity
from ddkit.generator.training.records import MetricsLog, Score, draw_chart, require_tensorboard
from ddkit.generator.training.run_folder import (
    CHART_FILE,
    CHECKPOINTS,
    RunRecord,
    read_run_record,
    start_over,
    write_run_record,
)
from ddkit.generator.training.stages import AutoencoderStage, DenoiserStage, MinimaxStage, Stage
from ddkit.generator.training.tracking import Tracking, track_frechet_in
from ddkit.generator.training.trainer import Callback, StepRecord, Trainer, require_even_parts
from ddkit.runtime.device import own_device, resolve_device, shortage_explained
from ddkit.runtime.distributed import LONGEST_WAIT
from ddkit.runtime.files import exclusive, sha256_of
from ddkit.runtime.progress import Listener, ignore
from ddkit.runtime.seeds import derived_seed

log = logging.getLogger(__name__)

AUTOENCODER_SHARE = 0.15  # of a training time given in seconds
_NO_LIMIT = 10**9  # steps, when time is the limit
_MOST_OF_START = 0.5  # of the averaged weights, above which training has changed them little
# All trainings compile at the same step: one that a time limits computes the same as one of as many steps, and a resumed
# one the same as one never stopped. Compiling takes up to a minute.
_PLAIN_STEPS = 200


@dataclass(frozen=True)
class TrainingData:
    """The images to train on. name: the dataset's. sha256: hash of its prepared training split."""

    name: str
    images: ImageSet
    sha256: str

    def __post_init__(self) -> None:
        if not len(self.images):
            raise UsageError(f"The training split of '{self.name}' has no images.")

    @classmethod
    def open(cls, dataset: str, *, progress: Listener = ignore) -> TrainingData:
        """The training split of a dataset, which is prepared on first use. Raises what `open_dataset` raises."""
        return cls(dataset, open_dataset(dataset, "train", progress=progress), train_sha256(dataset))

    @property
    def image_size(self) -> int:
        return self.images.images.shape[-1]

    @property
    def num_classes(self) -> int:
        return len(self.images.class_names)


@dataclass(frozen=True)
class TrainingRequest:
    """A training: its configuration, its folder, and the limits of this call, which may grow from call to call.

    preset: the name the configuration came from, for the records.
    seconds: training time of both stages together, of which the autoencoder takes up to AUTOENCODER_SHARE; None for the
        configuration's steps.
    device: a name for `resolve_device`. fresh: remove the training in the folder first, as `start_over` does.
    track_every: steps between two scores of the model, 0 for never. features: what the score is computed in, as
        `track_frechet_in` takes it.
    start: the generator that `config.minimax.init` names, if it has been read already; it is trained in place.
    choices: sentences that say which defaults were chosen for this machine, and why.
    """

    config: GeneratorConfig
    folder: Path
    preset: str = ""
    seconds: float | None = None
    device: str = "cpu"
    save_every_seconds: float = 300.0
    tensorboard: bool = False
    fresh: bool = False
    track_every: int = 0
    features: str = "convnet"
    start: Start | None = None
    choices: tuple[str, ...] = ()


def train(
    data: TrainingData, request: TrainingRequest, *, tracking: Tracking | None = None, progress: Listener = ignore
) -> Model:
    """Train a generator in the request's folder, continuing what is there; returns the model that is then in the folder.

    tracking: how to score the model; by default as the request says.
    Raises UsageError when the folder holds a training with other settings (each is listed), a model that was not trained
    there, or the generator to start from, and when another process trains in it; InterruptedRunError and ComputeError
    as `Trainer.run` does; BadFileError when a file cannot be read or written.
    """
    config, folder, start = request.config, request.folder, request.start
    if config.minimax is not None:
        if Path(config.minimax.init).expanduser().resolve() == folder.resolve():
            raise UsageError(f"{folder} holds the generator that fine-tuning starts from.", "Choose another folder with --out.")
        start = start or start_from(config.minimax, data.images.class_names)
        if start.generator.prediction != config.objective.prediction:
            raise UsageError(
                f"{start.source} predicts '{start.generator.prediction}', not '{config.objective.prediction}'.",
                "Set ObjectiveConfig.prediction to what the generator has learned.",
            )
    if request.tensorboard:
        require_tensorboard()
    if tracking is None and request.track_every and len(data.images) > 1:
        device = own_device(resolve_device(request.device))
        before = None if request.fresh else read_run_record(folder)
        tracking = track_frechet_in(
            request.features, data.name, data.images, every_steps=request.track_every,
            recorded=before.score if before else "", device=device, progress=progress,
        )  # fmt: skip
    with (
        _accelerator(request) as accelerator,
        exclusive(folder, "trains", elsewhere="--out", is_main=accelerator.is_main_process),
    ):
        # All that can fail does so before anything is removed.
        require_even_parts(config.denoiser_optimizer, accelerator.num_processes)
        source, pretrained = config.pretrained_autoencoder, None
        if source and (request.fresh or not (folder / "vae" / WEIGHTS_FILE).is_file()):
            pretrained = load_pretrained_autoencoder(source)
        elif not source and start is None:
            require_even_parts(config.autoencoder_optimizer, accelerator.num_processes)
        with accelerator.main_process_first():
            if request.fresh and accelerator.is_main_process:
                start_over(folder)
            record = RunRecord(
                data.name, data.sha256, data.images.class_names, data.image_size, request.preset, config,
                *((tracking.every_steps, tracking.name) if tracking else (0, "")),
            )  # fmt: skip
            write_run_record(folder, record)
        listener = progress if accelerator.is_main_process else ignore
        run = _Run(data, request, accelerator, start.generator if start else None, tracking, listener)
        with contextlib.closing(run.log), shortage_explained(lambda: _shortage(accelerator.device)):
            autoencoder = run.autoencoder(pretrained)
            run.train_denoiser(autoencoder, run.latents(autoencoder))
        if accelerator.is_main_process:
            draw_chart(run.log.records(), folder / CHART_FILE)
        accelerator.wait_for_everyone()
        return load_model(folder, dataset=data.name)


class _Run(Callback):
    """One call of `train`: what its steps share. As a callback it keeps the records."""

    def __init__(
        self,
        data: TrainingData,
        request: TrainingRequest,
        accelerator: Accelerator,
        start: Pretrained | None,
        tracking: Tracking | None,
        progress: Listener,
    ) -> None:
        self.data, self.request, self.config, self.folder = data, request, request.config, request.folder
        self.accelerator, self.start, self.tracking, self.progress = accelerator, start, tracking, progress
        self.log = MetricsLog(self.folder, tensorboard=request.tensorboard and accelerator.is_main_process)

    def on_record(self, trainer: Trainer, record: StepRecord) -> None:
        self.log.write(record)

    def autoencoder(self, pretrained: AutoencoderKL | None) -> AutoencoderKL:
        """The autoencoder: from the folder if it is finished, else the given one, else trained here."""
        missing = not (self.folder / "vae" / WEIGHTS_FILE).is_file()
        trained_here = not self.start and not self.config.pretrained_autoencoder
        # Its training may continue until a denoiser has begun to learn from its latents.
        begun = bool(list_checkpoints(self.folder / CHECKPOINTS, DenoiserStage.name))
        self.accelerator.wait_for_everyone()  # all processes have looked before one writes
        if missing or (trained_here and not begun):
            network = self.start.autoencoder if self.start else pretrained
            if network is None:
                seed = derived_seed("autoencoder", self.config.seed)
                untrained = build_autoencoder(self.config.autoencoder, self.data.image_size, seed=seed)
                stage = AutoencoderStage(self.config, untrained, self.data.images)
                seconds = None if self.request.seconds is None else AUTOENCODER_SHARE * self.request.seconds
                trainer = self._trainer(stage, stage.optimizer.steps, seconds)
                trainer.run()
                with trainer.ema_weights() as averaged:
                    if self.accelerator.is_main_process:
                        save_autoencoder(averaged, self.folder)
            elif self.accelerator.is_main_process:
                save_autoencoder(network, self.folder)
            self.accelerator.wait_for_everyone()
        elif self.request.seconds is not None and (records := self._autoencoder_records()):
            unfinished = records[-1]["step"] < self.config.autoencoder_optimizer.steps
            if unfinished and AUTOENCODER_SHARE * self.request.seconds > 2 * self._autoencoder_seconds():
                log.warning("The autoencoder was trained for a short time and cannot be trained further, because the "
                            "denoiser has learned from its latents. --fresh trains both for longer.")  # fmt: skip
        return load_autoencoder(self.folder / "vae").to(self.accelerator.device).eval()

    def latents(self, autoencoder: AutoencoderKL) -> LatentSet:
        """The training set's latents; sets the autoencoder's latent scale from them."""
        weights = sha256_of(self.folder / "vae" / WEIGHTS_FILE)
        side = (
            self.start.denoiser.config.sample_size
            if self.start
            else self.config.autoencoder.latent_shape(self.data.image_size)[1]
        )
        with self.accelerator.main_process_first():
            latents = cached_latents(
                self.folder / CHECKPOINTS / LATENTS_FILE,
                autoencoder,
                self.data.images,
                side,
                flips=self.config.flips,
                identity=latents_identity(self.data.sha256, weights, flips=self.config.flips),
                progress=self.progress,
            )
        if self.start:
            # A trained network is right for the latent scale that it learned with.
            return replace(latents, std=1 / autoencoder.config.scaling_factor)
        autoencoder.register_to_config(scaling_factor=1 / latents.std)
        return latents

    def train_denoiser(self, autoencoder: AutoencoderKL, latents: LatentSet) -> None:
        """Train the denoiser; the model folder is written whenever a checkpoint is."""
        stage: Stage
        if self.start and self.config.minimax:
            network = self.start.denoiser.train()
            stage = MinimaxStage(self.config, self.config.minimax, network, latents, self.data.num_classes)
        else:
            shape, seed = tuple(latents.latents.shape[-3:]), derived_seed("denoiser", self.config.seed)
            network = build_denoiser(self.config.denoiser, shape, self.data.num_classes, seed=seed)
            stage = DenoiserStage(self.config, network, latents)
        steps, seconds = stage.optimizer.steps, None
        if self.request.seconds is not None:
            used = min(AUTOENCODER_SHARE * self.request.seconds, self._autoencoder_seconds())
            steps, seconds = _NO_LIMIT, self.request.seconds - used
        keeper = _ModelKeeper(self, autoencoder)
        trainer = self._trainer(stage, steps, seconds, keeper)
        resumed_at = trainer.step
        if keeper.every and resumed_at and resumed_at % keeper.every == 0 and not keeper.other_score:  # stopped unscored
            keeper.score_once(trainer)
        trainer.run()
        decay = self.config.ema_decay or 0.0
        if (kept := decay**trainer.step) > _MOST_OF_START:
            log.warning("The averaged weights, which are the result, are still %.0f %% those of the beginning: a decay of %g "
                        "is slow for %s. Train longer, or start over with --fresh --ema-width 0.1.",
                        100 * kept, decay, counted(trainer.step, "step", "steps"))  # fmt: skip
        if keeper.other_score and trainer.step == resumed_at:  # the weights of the best step may be nowhere else
            log.warning("The model in %s was chosen by its score %s and stays as it is: nothing was left to train.",
                        self.folder, keeper.other_score)  # fmt: skip
            return
        keeper.score_once(trainer)
        if self.accelerator.is_main_process and not (has_model(self.folder) and read_facts(self.folder).steps == trainer.step):
            keeper.on_save(trainer)  # which a kill between the last checkpoint and its model has left out

    def _trainer(self, stage: Stage, steps: int, seconds: float | None, *callbacks: Callback) -> Trainer:
        compiles = self.config.compile and (self.request.seconds or math.inf) >= SECONDS_WORTH_COMPILING
        return Trainer(
            stage,
            self.accelerator,
            self.folder / CHECKPOINTS,
            steps=steps,
            seconds=seconds,
            save_every_seconds=self.request.save_every_seconds,
            compile_after=_PLAIN_STEPS if compiles else None,
            progress=self.progress,
            callbacks=(self, *callbacks),
        )

    def _autoencoder_records(self) -> list[dict[str, Any]]:
        return [record for record in self.log.records() if record["stage"] == AutoencoderStage.name]

    def _autoencoder_seconds(self) -> float:
        return max((record["seconds"] for record in self._autoencoder_records()), default=0.0)


class _ModelKeeper(Callback):
    """Keeps the folder's model at the newest state, or, with tracking, at the best score.

    best: the score of the model in the folder, if it was tracked by the same name on the same images.
    other_score: the name of another score of these images by which that model was chosen.
    """

    def __init__(self, run: _Run, autoencoder: AutoencoderKL) -> None:
        self.run, self.autoencoder = run, autoencoder
        self.best: float | None = None
        self.other_score = ""
        name = None
        if run.tracking is not None:
            self.every, name = run.tracking.every_steps, run.tracking.name
        if has_model(run.folder) and (facts := read_facts(run.folder)).dataset_sha256 == run.data.sha256:
            self.best = facts.metrics.get(name) if name else None
            if self.best is None:
                self.other_score = ", ".join(facts.metrics)

    def on_save(self, trainer: Trainer) -> None:
        if self.best is None:
            self._write_model(trainer, {})

    def on_interval(self, trainer: Trainer) -> None:
        """Score the averaged weights; the best so far become the folder's model."""
        tracking = self.run.tracking
        if tracking is None:
            return
        with trainer.ema_weights() as averaged:
            score = tracking.score(Model(averaged.eval(), self.autoencoder, self._facts(trainer, {})))
            averaged.train()
        if self.best is None or score < self.best:
            self.best = score
            self._write_model(trainer, {tracking.name: score})
        self.run.log.write(Score(trainer.step, tracking.name, score))  # last: it says that all of this was done

    def score_once(self, trainer: Trainer) -> None:
        """Score the model unless that was done at this step."""
        if self.run.accelerator.is_main_process and self.run.tracking is not None:
            wanted = ("score", trainer.step, self.run.tracking.name)
            if all((r["stage"], r["step"], r.get("name")) != wanted for r in self.run.log.records()):
                self.on_interval(trainer)
        self.run.accelerator.wait_for_everyone()

    def _write_model(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        with trainer.ema_weights() as averaged:
            denoiser = plain_copy(averaged) if self.run.start else averaged
            save_model(Model(denoiser, self.autoencoder, self._facts(trainer, metrics)), self.run.folder)

    def _facts(self, trainer: Trainer, metrics: Mapping[str, float]) -> ModelFacts:
        data, config = self.run.data, self.run.config
        return ModelFacts(
            dataset=data.name,
            class_names=data.images.class_names,
            image_size=data.image_size,
            prediction=config.objective.prediction,
            preset=self.run.request.preset,
            steps=trainer.step,
            images_seen=trainer.step * config.denoiser_optimizer.batch_size,
            dataset_sha256=data.sha256,
            metrics=metrics,
            label_dropout=config.objective.label_dropout,
        )


def _shortage(device: torch.device) -> ComputeError:
    """The error when memory runs out outside of a training step, which has its own advice."""
    return ComputeError(
        f"Out of memory on {device} while preparing the training.",
        "Close other programs that use it, choose a smaller --preset, or another --device.",
    )


@contextlib.contextmanager
def _accelerator(request: TrainingRequest) -> Iterator[Accelerator]:
    """accelerate's view of the processes and devices of this training; its global state is reset afterwards."""
    device = resolve_device(request.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu" and request.config.precision == "float16":
        raise UsageError("float16 needs a GPU.", "On a CPU use --precision bfloat16 or float32.")
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[request.config.precision]
    try:
        # All processes compute the same buffers, so none need to be sent around. Processes wait for each other for hours
        # while the first of them encodes the training set.
        settings = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        yield Accelerator(mixed_precision=precision, cpu=device.type == "cpu", kwargs_handlers=settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
