"""Training a generator: the autoencoder, the latents, the denoiser, the model folder; each once, each resumable.

A run's folder is the model folder itself; beside its parts lie `config.json` (the settings it goes by),
`metrics.jsonl` (one StepRecord or Score a line), `training.png` (a chart of it) and `checkpoints/`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import AutoencoderKL

from ddkit import __version__
from ddkit.data.store import ImageSet
from ddkit.device import resolve_device
from ddkit.errors import BadFile, UsageError
from ddkit.files import explain_os_error, read_json, sha256_of, write_json
from ddkit.generator.autoencoder import build_autoencoder, load_pretrained
from ddkit.generator.chart import CHART_FILE, draw_chart, read_records
from ddkit.generator.checkpoints import list_checkpoints
from ddkit.generator.difffit import plain_copy
from ddkit.generator.engine import Engine, Limits, Stage
from ddkit.generator.latents import LATENTS_FILE, LatentSet, cached_latents
from ddkit.generator.networks import build_denoiser
from ddkit.generator.pipeline import (
    FACTS_FILE,
    INDEX_FILE,
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
from ddkit.generator.presets import GeneratorConfig, differences, from_json, to_json
from ddkit.generator.pretrained import Start, start_from
from ddkit.generator.seeds import derived_seed
from ddkit.generator.stages import AutoencoderStage, DenoiserStage, MinimaxStage
from ddkit.progress import Listener, ignore

try:
    import fcntl
except ImportError:  # Windows has no such locks; there two trainings in one folder are the user's care.
    fcntl = None

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
AUTOENCODER_SHARE = 0.15  # of a training time given in seconds
_NO_LIMIT = 10**9  # steps, where time is the limit
_OF_MODELS = (FACTS_FILE, INDEX_FILE, "vae", "transformer", "unet")


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
    ComputeError as `Engine.run` does, BadFile for what the system refuses.
    """
    minimax = request.config.minimax
    if minimax is not None:
        if Path(minimax.init).expanduser().resolve() == folder.resolve():
            raise UsageError(f"{folder} holds what fine-tuning starts from.", "Choose another folder with --out.")
        start = start or _start(request.config, data.images.class_names)
    with _accelerator(request) as accelerator, _alone(folder, accelerator):
        with accelerator.main_process_first():
            if fresh and accelerator.is_main_process:
                start_over(folder)
            _claim(folder, data, request)
        listener = progress if accelerator.is_main_process else ignore
        run = _Run(data, request, folder, accelerator, start, tracking, listener)
        autoencoder = run.autoencoder()
        run.denoiser(autoencoder, run.latents(autoencoder))
        if accelerator.is_main_process:
            draw_chart(run.log.records(), folder / CHART_FILE)
        accelerator.wait_for_everyone()
        return load_model(folder, dataset=data.name)


def start_over(folder: Path) -> None:
    """Remove what a training left in `folder`: its state, its records and its model. Other files stay.

    Raises UsageError where a folder that is there holds no training of ours.
    """
    if not folder.is_dir() or not any(path.name != LOCK_FILE for path in folder.iterdir()):
        return
    if not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"{folder} holds no training, so nothing is removed from it.", "Choose another --out.")
    try:
        # The settings go last: a kill halfway leaves a folder that --fresh still knows for its own.
        for name in (CHECKPOINTS, "vae", "transformer", "unet", "scheduler"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("ddkit.json", "model_index.json", CHART_FILE, METRICS_FILE, CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, folder) from error


def has_training(folder: Path) -> bool:
    """Whether a training was begun in that folder."""
    return (folder / CONFIG_FILE).is_file()


def recorded_preset(folder: Path) -> str | None:
    """The name of the preset a training in that folder was begun with; None where there is none."""
    return _record_of(folder).get("preset") if has_training(folder) else None


def recorded_config(folder: Path) -> GeneratorConfig | None:
    """The settings a training in that folder goes by; None where there is none."""
    return from_json(_record_of(folder)["config"]) if has_training(folder) else None


def _record_of(folder: Path) -> Mapping[str, Any]:
    """What a training has written of itself. Raises BadFile where it is something else."""
    value = read_json(folder / CONFIG_FILE)
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        raise BadFile(f"{folder / CONFIG_FILE} is not of a training of ddkit's.", "Choose another folder with --out.")
    return value


class _Run:
    """One call of `train`: what its steps share."""

    def __init__(
        self,
        data: TrainingData,
        request: TrainingRequest,
        folder: Path,
        accelerator: Accelerator,
        start: Start | None,
        tracking: Tracking | None,
        progress: Listener,
    ) -> None:
        self.data, self.request, self.config = data, request, request.config
        self.folder, self.accelerator, self.tracking, self.progress = folder, accelerator, tracking, progress
        self.start = start.generator if start else None
        self.latent_side = (
            self.start.denoiser.config.sample_size
            if self.start
            else self.config.autoencoder.latent_shape(data.image_size)[1]
        )
        self.best = _best_score(folder, tracking)
        self.log = _MetricsLog(folder, tensorboard=request.tensorboard and accelerator.is_main_process)

    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder, from the folder where it is finished."""
        if not (self.folder / "vae" / WEIGHTS_FILE).is_file() or self._may_improve_autoencoder():
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
        steps, seconds = stage.optimiser.steps, None
        if self.request.seconds is not None:
            steps, seconds = _NO_LIMIT, max(0.0, self.request.seconds - self._autoencoder_seconds())
        engine = self._engine(stage, Limits(steps, seconds, self.request.save_every_seconds))
        engine.on_save = lambda: self._save_model(engine, autoencoder)
        if self.tracking is not None:
            engine.every(self.tracking.every_steps, lambda: self._track(engine, autoencoder))
        engine.run()
        if self.tracking is not None and not self._scored(engine.step):
            if self.accelerator.is_main_process:
                self._track(engine, autoencoder)
            self.accelerator.wait_for_everyone()
        if not has_model(self.folder):
            engine.save()

    def _may_improve_autoencoder(self) -> bool:
        """Whether one of our own can train on: not once a denoiser has begun to learn from its latents."""
        trained_here = not self.start and not self.config.pretrained_autoencoder
        return trained_here and not list_checkpoints(self.folder / CHECKPOINTS, DenoiserStage.name)

    def _autoencoder_was_hurried(self) -> bool:
        """Whether it ended when its time was up, and would have more than twice as much now."""
        records = self._autoencoder_records()
        if self.request.seconds is None or not records or records[-1]["step"] >= self.config.autoencoder_optimiser.steps:
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
        if self.start or self.config.pretrained_autoencoder:
            network = self.start.autoencoder if self.start else load_pretrained(self.config.pretrained_autoencoder)
            if self.accelerator.is_main_process:
                save_autoencoder(network, self.folder)
            return
        seed = derived_seed("autoencoder", self.config.seed)
        network = build_autoencoder(self.config.autoencoder, self.data.image_size, seed=seed)
        stage = AutoencoderStage(self.config, network, self.data.images)
        share = None if self.request.seconds is None else AUTOENCODER_SHARE * self.request.seconds
        engine = self._engine(stage, Limits(stage.optimiser.steps, share, self.request.save_every_seconds))
        engine.run()
        with engine.ema_weights() as averaged:
            if self.accelerator.is_main_process:
                save_autoencoder(averaged, self.folder)

    def _engine(self, stage: Stage, limits: Limits) -> Engine:
        return Engine(
            stage,
            self.accelerator,
            self.folder / CHECKPOINTS,
            limits,
            compile_network=self.config.compile,
            progress=self.progress,
            on_record=self.log.write,
        )

    def _save_model(self, engine: Engine, autoencoder: AutoencoderKL) -> None:
        """Keep the folder's model at the newest state, or, where scores are tracked, leave it at the best one."""
        if self.best is None:
            self._write_model(engine, autoencoder, {})

    def _track(self, engine: Engine, autoencoder: AutoencoderKL) -> None:
        """Score the averaged weights; the best so far become the folder's model."""
        with engine.ema_weights() as averaged:
            model = Model(averaged.eval(), autoencoder, self._facts(engine, {}))
            score = self.tracking.score(model)
            averaged.train()
        self.log.write(Score(engine.step, self.tracking.name, score))
        if self.best is None or score < self.best:
            self.best = score
            self._write_model(engine, autoencoder, {self.tracking.name: score})

    def _write_model(self, engine: Engine, autoencoder: AutoencoderKL, metrics: Mapping[str, float]) -> None:
        with engine.ema_weights() as averaged:
            denoiser = plain_copy(averaged) if self.start else averaged
            save_model(Model(denoiser, autoencoder, self._facts(engine, metrics)), self.folder)

    def _facts(self, engine: Engine, metrics: Mapping[str, float]) -> ModelFacts:
        return ModelFacts(
            dataset=self.data.name,
            class_names=self.data.images.class_names,
            image_size=self.data.image_size,
            prediction=self.config.objective.prediction,
            preset=self.request.preset,
            steps=engine.step,
            images_seen=engine.step * self.config.denoiser_optimiser.batch_size,
            dataset_sha256=self.data.sha256,
            metrics=metrics,
        )


@dataclass(frozen=True)
class Score:
    """What Tracking found after `step` steps of the denoiser."""

    step: int
    name: str
    value: float
    stage: str = "score"


class _MetricsLog:
    """Records as JSON lines, and for TensorBoard where that is asked for."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self._path = folder / METRICS_FILE
        self._writer = _summary_writer(folder / "tensorboard") if tensorboard else None

    def records(self) -> list[dict[str, Any]]:
        """What is written so far, as `read_records` has it."""
        return read_records(self._path)

    def write(self, record: Any) -> None:
        """Append one dataclass; raises BadFile for what the system refuses."""
        values = dataclasses.asdict(record)
        values |= values.pop("figures", {})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise explain_os_error(error, self._path) from error
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{values['stage']}/{name}", value, values["step"])


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("TensorBoard is not installed.", "Install it: pip install 'ddkit[tensorboard]'") from error
    return SummaryWriter(folder)


def _best_score(folder: Path, tracking: Tracking | None) -> float | None:
    """The score of the model in the folder, where it was tracked by the same name."""
    if tracking is None or not has_model(folder):
        return None
    return read_facts(folder).metrics.get(tracking.name)


def _claim(folder: Path, data: TrainingData, request: TrainingRequest) -> None:
    """Record the settings in a run's folder; refuse one that was begun with others, listing them."""
    asked = {
        "ddkit_version": __version__,
        "dataset": data.name,
        "dataset_sha256": data.sha256,
        "class_names": list(data.images.class_names),
        "image_size": data.image_size,
        "preset": request.preset,
        "config": to_json(request.config),
    }
    if has_training(folder):
        recorded = _record_of(folder)
        if lines := _differences(asked, recorded, request.config):
            raise UsageError(
                f"{folder} holds a training with other settings: {'; '.join(lines)}.",
                "Give those, start over with --fresh, or choose another folder with --out.",
            )
        if recorded.get("dataset_sha256") != data.sha256:
            log.warning("'%s' was prepared anew since the training in %s began; it goes on with the new images.",
                        data.name, folder)  # fmt: skip
    elif found := [name for name in _OF_MODELS if (folder / name).exists()]:
        raise UsageError(
            f"{folder} holds a model that was not trained there ({found[0]}); it would be lost.",
            "Choose another folder with --out.",
        )
    write_json(folder / CONFIG_FILE, asked)


def _differences(asked: Mapping[str, Any], recorded: Mapping[str, Any], config: GeneratorConfig) -> list[str]:
    if recorded.get("dataset") != asked["dataset"]:
        return [f"dataset: {recorded.get('dataset')}, not {asked['dataset']}"]
    if recorded.get("class_names") != asked["class_names"]:
        return ["class_names: the dataset had other classes then"]
    if recorded.get("image_size") != asked["image_size"]:
        return [f"image_size: {recorded.get('image_size')}, not {asked['image_size']}"]
    found = differences(_comparable(config), _comparable(from_json(recorded["config"])))
    if found and recorded.get("preset") != asked["preset"]:
        return [f"preset: {recorded.get('preset')}, not {asked['preset']}"]
    return found


def _comparable(config: GeneratorConfig) -> GeneratorConfig:
    """The configuration with what may differ when a training goes on set equal: its lengths, compilation, and what
    helps against a loss that diverges."""
    minimax = config.minimax
    return replace(
        config,
        minimax=None if minimax is None else replace(minimax, epochs=1, lambda_r=0, lambda_d=0),
        autoencoder_optimiser=replace(config.autoencoder_optimiser, steps=1),
        denoiser_optimiser=replace(config.denoiser_optimiser, steps=1, learning_rate=1.0),
        compile=False,
    )


@contextmanager
def _alone(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """One training at a time in a folder. Raises UsageError where another is at work there."""
    if fcntl is None or not accelerator.is_main_process:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise explain_os_error(error, error.filename or folder) from error
    with lock:
        try:
            # Unlike flock's, these locks are not inherited by the processes that compile.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(
                f"Another process trains in {folder}.", "Wait for it, stop it, or choose another folder with --out."
            ) from None
        yield


def _start(config: GeneratorConfig, class_names: Sequence[str]) -> Start:
    minimax = config.minimax
    start = start_from(minimax.init, class_names, full=minimax.full, chosen=dict(minimax.class_map))
    if start.generator.prediction != config.objective.prediction:
        raise UsageError(
            f"{start.source} predicts '{start.generator.prediction}', not '{config.objective.prediction}'.",
            "Set ObjectiveConfig.prediction to what it has learned.",
        )
    return start


@contextmanager
def _accelerator(request: TrainingRequest) -> Iterator[Accelerator]:
    """accelerate's view of the processes and devices of this training, forgotten afterwards."""
    device = resolve_device(request.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[request.config.precision]
    try:
        # No buffer here needs to be sent around: what has any computes the same on all processes.
        settings = DistributedDataParallelKwargs(broadcast_buffers=False)
        yield Accelerator(mixed_precision=precision, cpu=device.type == "cpu", kwargs_handlers=[settings])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
