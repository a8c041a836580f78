"""The plan of an entry: its stages, and what each will take on this machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ddkit.challenge import TEST_IMAGES
from ddkit.data.images import normalize
from ddkit.data.store import ImageSet, dataset_spec, is_prepared, load_dataset
from ddkit.distill.estimate import RefineSpeed, expected_accuracy, measure_refinement
from ddkit.distill.settings import PRESETS, RefineLimits, RefineSettings
from ddkit.entering.recipe import IPC, Recipe, SetRecipe
from ddkit.errors import UsageError, counted
from ddkit.evaluation.estimate import estimate_evaluation
from ddkit.evaluation.evaluate import EvaluationSettings
from ddkit.evaluation.sources import FixedSet
from ddkit.evaluation.test_sets import TestSet
from ddkit.generator.config import GeneratorConfig
from ddkit.generator.presets import preset
from ddkit.metrics.features import CLASSIFIER, is_cached, training_images
from ddkit.runtime.device import resolve_device
from ddkit.runtime.progress import Listener, Progress, ignore, time_option
from ddkit.sets.distilled import class_labels

LEAST_STEPS = 20  # of a refinement; the preset says those of a generator's training
MARGIN = 1.2  # for what comes after the stages whose length the time decides
_SHARE_OF_EVALUATION = 0.5  # of the time, at most, where the plan chooses how to evaluate
_SHARE_OF_VALIDATION = 0.25  # of a refinement's time, at most, where the plan chooses how to validate
_VAL_EPOCHS = (300, 200, 100, 40, 20, 10)
_EVALUATIONS = {1: ((1000, 3), (1000, 1), (200, 1), (50, 1)), 2: ((100, 3), (100, 1), (20, 1), (5, 1))}  # E, rounds
_TRIED = 1.0  # seconds of an evaluation's training
_REAL_PER_CLASS = 40  # made-up images to measure with
# Assumptions where a measurement would take longer than the stage.
_SECONDS_OF_PREPARING, _SECONDS_OF_DRAWING = 60.0, 5.0
_SECONDS_PER_ROW, _SECONDS_OF_START, _SECONDS_OF_REPORT = 0.006, 2.0, 5.0
_SECONDS_TO_FIRST_IMAGE, _SECONDS_OF_MODES = 10.0, 5e-4  # of a bundle; the latter for each training image
_IMAGES_ELSEWHERE = 1000


@dataclass(frozen=True)
class Speeds:
    """Seconds that parts of the work for one dataset take on this machine.

    refine: of a refinement. per_epoch, per_test_image: of an evaluation. training: images a second of each stage of the
    generator's training, in order. sampled: images a second that a generator of that size samples, with a bundle's
    settings on track 2. least_training: seconds of the training; `ddkit train` refuses less by the same rule.
    classifier_is_there: True if an earlier bundle has left the classifier in the cache.
    """

    refine: RefineSpeed
    per_epoch: float
    per_test_image: float
    training: tuple[float, ...] = ()
    sampled: float = 0.0
    least_training: float = 0.0
    classifier_is_there: bool = False


@dataclass(frozen=True)
class Outline:
    """A plan as numbers, which is kept to resume an entry.

    recipe: with what the plan has chosen. seconds: for everything; None where the recipe has all lengths.
    expected: seconds of each stage by its name. flexible: names of the stages whose length the time decides.
    speeds: by dataset. notes: sentences on what was chosen, and why.
    """

    recipe: Recipe
    seconds: float | None
    expected: Mapping[str, float]
    flexible: tuple[str, ...] = ()
    speeds: Mapping[str, Speeds] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def draft(
    datasets: Sequence[str],
    *,
    track: int = 1,
    epochs_setting: int | None = None,
    rounds: int | None = None,
    time_budget: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Recipe:
    """The best known way for a track, with lengths that the time will decide.

    Track 1: random real images, refined. Track 2: a generator. Raises UsageError for an unknown dataset or track, and for
    evaluations that make no sense.
    """
    refining = dataclasses.replace(PRESETS["track1"], seed=seed)

    def draft_set(name: str) -> SetRecipe:
        if track == 1:
            return SetRecipe(name, refine=refining)
        from ddkit.generator.training.plan import preset_for  # imports diffusers, which takes seconds

        spec = dataset_spec(name)
        return SetRecipe(name, preset=preset_for(spec.image_size, spec.num_classes, device)[0])

    recipe = Recipe(tuple(map(draft_set, datasets)), track, seed, epochs_setting, rounds, time_budget)
    _ = evaluation_settings(recipe)
    return recipe


def make_outline(
    recipe: Recipe, seconds: float | None, *, device: str, spent: float = 0.0, begun: bool = False, progress: Listener = ignore
) -> Outline:
    """Measure this machine briefly, and plan.

    seconds: for everything, of which `spent` are used; None where the recipe has all lengths. begun: keep what the recipe
    says on validation, because refinements have begun with it. Raises UsageError for too little time, saying the least, and
    for evaluations that make no sense, and MissingDataError for a dataset of which only the test split is prepared.
    """
    _ = evaluation_settings(recipe)  # refused before anything is measured
    began, chosen = time.monotonic(), resolve_device(device)
    speeds = {}
    for done, each in enumerate(recipe.sets):
        progress(Progress("Measuring this machine", done, len(recipe.sets), "datasets"))
        speeds[each.dataset] = _measure(each, recipe.track, chosen)
    return outline_at(speeds, recipe, seconds, spent=spent + time.monotonic() - began, begun=begun)


def outline_at(
    speeds: Mapping[str, Speeds], recipe: Recipe, seconds: float | None, *, spent: float = 0.0, begun: bool = False
) -> Outline:
    """Plan for a machine of these speeds, by dataset. The arguments are those of `make_outline`."""
    planner = _Planner(recipe, speeds)
    return planner.with_lengths() if seconds is None else planner.within(seconds, spent, begun=begun)


def refine_limit(speed: RefineSpeed, settings: RefineSettings, seconds: float) -> float:
    """The seconds of work of a refinement that takes `seconds` in all, with its validations."""
    work = seconds
    for _ in range(4):
        steps, _ = speed.within(RefineLimits(seconds=max(work, 1e-9)), settings)
        work = max(0.0, seconds - speed.validations(settings, steps))
    return work


class _Planner:
    def __init__(self, recipe: Recipe, speeds: Mapping[str, Speeds]) -> None:
        self._recipe, self._speeds = recipe, speeds
        self._notes: list[str] = []

    def with_lengths(self) -> Outline:
        """The plan of a recipe that has all lengths."""
        recipe = self._recipe
        expected = self._fixed(recipe)
        for each in recipe.sets:
            speeds = self._speeds[each.dataset]
            if each.preset:
                config = training_config(each)
                recipe = recipe.with_set(dataclasses.replace(each, train_steps=config.denoiser_optimizer.steps))
                optimizers = (config.autoencoder_optimizer, config.denoiser_optimizer)[-len(speeds.training) :]
                expected[f"train {each.dataset}"] = sum(
                    stage.steps * stage.batch_size / speed for stage, speed in zip(optimizers, speeds.training, strict=True)
                )
            if each.refine is not None:
                if each.refine_steps is None:
                    raise UsageError(
                        f"The recipe does not say for how long the set of {each.dataset} is refined.",
                        "Add refine_steps = 4000, or another number, to it.",
                    )
                steps, seconds = speeds.refine.within(RefineLimits(each.refine_steps), each.refine)
                expected[f"refine {each.dataset}"] = seconds + speeds.refine.validations(each.refine, steps)
        return Outline(recipe, None, expected, (), self._speeds, tuple(self._notes))

    def within(self, seconds: float, spent: float, *, begun: bool) -> Outline:
        """The plan for a time, which decides the lengths of the trainings and refinements."""
        least = sum(map(self._least, self._recipe.sets))
        room = seconds - spent - least  # for the stages whose length the time does not decide
        recipe = self._choose_evaluation(self._recipe, seconds, room)
        expected = self._choose_comparisons(recipe, seconds, room)
        fixed = sum(expected.values()) * MARGIN
        if room < fixed:
            needed = spent + fixed + least
            made, budget = ("refining", "") if recipe.track == 1 else ("training", " or --time-budget")
            # The time that was given is not repeated, since rounding it up could show the time that is needed.
            raise UsageError(
                f"The time is too short: this entry needs {time_option(needed)} at least on this machine, "
                f"{time_option(least)} for {made} and {time_option(spent + fixed)} for the rest.",
                f"Give --time {time_option(needed)} or more, smaller --epochs-setting, --rounds{budget}, or fewer --datasets.",
            )
        share, flexible = (room - fixed + least) / len(recipe.sets), []
        for each in recipe.sets:
            parts = [f"train {each.dataset}"] * bool(each.preset) + [f"refine {each.dataset}"] * (each.refine is not None)
            expected |= dict.fromkeys(parts, share / max(1, len(parts)))
            flexible += parts
            if each.refine is not None and not begun:
                recipe = recipe.with_set(self._with_validation(each, each.refine, expected[parts[-1]]))
        return Outline(recipe, seconds, expected, tuple(flexible), self._speeds, tuple(self._notes))

    def _fixed(self, recipe: Recipe, *, comparisons: bool = True) -> dict[str, float]:
        """Seconds of the stages whose length the time does not decide, by name.

        comparisons: also evaluate the sets on track 1 that the submission is compared with.
        """
        expected: dict[str, float] = {}
        checked = 0.0
        for each in recipe.sets:
            name, spec, speeds = each.dataset, dataset_spec(each.dataset), self._speeds[each.dataset]
            rows = IPC * spec.num_classes
            unprepared = _SECONDS_OF_PREPARING if spec.in_challenge else _SECONDS_OF_DRAWING
            expected[f"prepare {name}"] = 0.0 if is_prepared(name) else unprepared
            if recipe.track == 2:
                expected[f"evaluate {name}"] = self._generator_seconds(recipe, each)
                proof = _SECONDS_TO_FIRST_IMAGE + spec.num_classes / each.bundle_settings.keep / speeds.sampled
                checked += min(proof, evaluation_settings(recipe).budget or 0.0) + _SECONDS_OF_START
                if each.bundle_settings.has_classifier and not speeds.classifier_is_there:
                    images = training_images(spec, CLASSIFIER, _images(name, "train"))
                    checked += CLASSIFIER.epochs * images / rows * speeds.per_epoch
                if each.bundle_settings.sampling.mode_guidance:
                    checked += _SECONDS_OF_MODES * _images(name, "train")
                continue
            checked += _SECONDS_OF_START + _SECONDS_PER_ROW * rows
            expected[f"random real images {name}"] = _SECONDS_OF_START
            if each.preset:
                modes = _SECONDS_OF_MODES * _images(name, "train") if each.sampling_settings.mode_guidance else 0.0
                expected[f"generate {name}"] = _SECONDS_OF_START + rows / speeds.sampled + modes
            others = ["generated"] * bool(each.preset and each.refine is not None) + ["baseline"]
            for what in ("submission", *others * comparisons):
                expected[f"evaluate {what} {name}"] = self._set_seconds(recipe, each) + _SECONDS_PER_ROW * rows
        return expected | {"check and pack": checked, "report": _SECONDS_OF_REPORT}

    def _set_seconds(self, recipe: Recipe, each: SetRecipe) -> float:
        """Seconds of one evaluation of a set on track 1."""
        speeds, settings = self._speeds[each.dataset], evaluation_settings(recipe)
        training = (settings.training.epochs_setting + 1) * speeds.per_epoch
        return settings.number_of_rounds * (training + speeds.per_test_image * _images(each.dataset, "test"))

    def _generator_seconds(self, recipe: Recipe, each: SetRecipe) -> float:
        """Seconds of one evaluation of a generator on track 2."""
        spec, speeds, settings = dataset_spec(each.dataset), self._speeds[each.dataset], evaluation_settings(recipe)
        budget = settings.budget or 0.0
        per_second, wanted = speeds.sampled * each.bundle_settings.keep, each.bundle_settings.images_per_class
        if wanted is not None:
            budget = min(budget, _SECONDS_TO_FIRST_IMAGE + wanted * spec.num_classes / per_second)
        epoch = speeds.per_epoch * budget * per_second / (IPC * spec.num_classes)
        test = speeds.per_test_image * _images(each.dataset, "test")
        return settings.number_of_rounds * (budget + (settings.training.epochs_setting + 1) * epoch + test)

    def _choose_evaluation(self, recipe: Recipe, seconds: float, room: float) -> Recipe:
        """The recipe with the first of _EVALUATIONS that takes at most half of the time and fits into `room` with the rest,
        else with the last. What the recipe says of the evaluation is kept.
        """
        if recipe.epochs_setting is not None and recipe.rounds is not None:
            return recipe
        official = _EVALUATIONS[recipe.track][0]
        for epochs, count in _EVALUATIONS[recipe.track]:
            epochs = epochs if recipe.epochs_setting is None else recipe.epochs_setting
            count = count if recipe.rounds is None else recipe.rounds
            found = dataclasses.replace(recipe, epochs_setting=epochs, rounds=count)
            expected = self._fixed(found, comparisons=False)
            if _evaluation_seconds(expected) <= _SHARE_OF_EVALUATION * seconds and MARGIN * sum(expected.values()) <= room:
                break
        if (epochs, count) != official:
            whole = dataclasses.replace(recipe, epochs_setting=official[0], rounds=official[1])
            uses = f"E = {epochs} and {counted(count, 'round', 'rounds')}"
            takes = f"would take {time_option(_evaluation_seconds(self._fixed(whole, comparisons=False)))}"
            if any(dataset_spec(name).in_challenge for name in recipe.datasets):
                command = "ddkit evaluate" + " --track 2" * (recipe.track == 2)
                self._notes.append(
                    f"The evaluation uses {uses}, which is not official: an official one {takes}. Evaluate officially "
                    f"afterwards: {command}"
                )
            else:
                most = "E = {} and {} rounds".format(*official)
                self._notes.append(f"The evaluation uses {uses}; the challenge's {most} {takes}.")
        return found

    def _choose_comparisons(self, recipe: Recipe, seconds: float, room: float) -> dict[str, float]:
        """What `_fixed` returns, with comparisons if they fit: all evaluations into half of the time, and all into `room`."""
        expected, alone = self._fixed(recipe), self._fixed(recipe, comparisons=False)
        more = _evaluation_seconds(expected) - _evaluation_seconds(alone)
        fits = _evaluation_seconds(expected) <= _SHARE_OF_EVALUATION * seconds and MARGIN * sum(expected.values()) <= room
        if fits or more == 0:
            return expected
        files = " ".join(f"baseline/{name}.pt" for name in recipe.datasets)
        settings, seed = evaluation_settings(recipe), f" --seed {recipe.seed}" if recipe.seed else ""
        self._notes.append(
            f"Random real images are not evaluated under the same settings, which would take {time_option(more)} more. To "
            f"compare the submission with them, type in its folder: ddkit evaluate {files} "
            f"--epochs-setting {settings.training.epochs_setting} --rounds {settings.number_of_rounds}{seed}"
        )
        return alone

    def _least(self, each: SetRecipe) -> float:
        """The least seconds of the stages of a set whose length the time decides."""
        speed, seconds = self._speeds[each.dataset].refine, self._speeds[each.dataset].least_training
        if each.refine is not None:
            settings = dataclasses.replace(each.refine, val_epochs=_VAL_EPOCHS[-1])
            seconds += speed.within(RefineLimits(LEAST_STEPS), settings)[1] + speed.validations(settings, LEAST_STEPS)
        return seconds

    def _with_validation(self, each: SetRecipe, refine: RefineSettings, seconds: float) -> SetRecipe:
        """The set's recipe with validations that take a part of the refinement's time only."""
        speed = self._speeds[each.dataset].refine
        for epochs in _VAL_EPOCHS:
            settings = dataclasses.replace(refine, val_epochs=min(epochs, refine.val_epochs))
            if speed.validations(settings, 1) <= _SHARE_OF_VALIDATION * seconds:
                break
        steps, _ = speed.within(RefineLimits(seconds=(1 - _SHARE_OF_VALIDATION) * seconds), settings)
        if (accuracy := expected_accuracy(each.dataset, IPC, settings, steps)) is not None:
            self._notes.append(f"Recorded refinements suggest an official accuracy of about {accuracy:.0%} on {each.dataset}.")
        return dataclasses.replace(each, refine=settings)


def _evaluation_seconds(expected: Mapping[str, float]) -> float:
    return sum(seconds for name, seconds in expected.items() if name.startswith("evaluate"))


def evaluation_settings(recipe: Recipe, device: str = "auto") -> EvaluationSettings:
    """How a recipe's sets or bundles are evaluated. Raises UsageError for values that make no sense."""
    return EvaluationSettings(
        recipe.track, recipe.rounds, recipe.epochs_setting, recipe.seed, device=device, time_budget=recipe.time_budget
    )


def training_config(each: SetRecipe) -> GeneratorConfig:
    """The configuration of a set's generator, with the recipe's lengths."""
    config = preset(each.preset).config(dataset_spec(each.dataset).image_size)
    first, last = config.autoencoder_optimizer, config.denoiser_optimizer
    first = first if each.autoencoder_steps is None else dataclasses.replace(first, steps=each.autoencoder_steps)
    last = last if each.train_steps is None else dataclasses.replace(last, steps=each.train_steps)
    return dataclasses.replace(config, autoencoder_optimizer=first, denoiser_optimizer=last)


def _images(name: str, split: str) -> int:
    """The number of real images in a split, estimated where the dataset is not prepared."""
    if is_prepared(name):
        return len(load_dataset(name, split))
    if not dataset_spec(name).in_challenge:
        return _IMAGES_ELSEWHERE
    return TEST_IMAGES if split == "test" else CLASSIFIER.images


def _measure(each: SetRecipe, of_track: int, device: torch.device) -> Speeds:
    """Measure with made-up images, which take as long as real ones. of_track: the entry's track."""
    spec = dataset_spec(each.dataset)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (_REAL_PER_CLASS * spec.num_classes, *spec.image_shape), dtype=torch.uint8, generator=generator)
    labels = class_labels(spec.num_classes, _REAL_PER_CLASS)
    real = ImageSet(pixels, labels, tuple(map(str, range(spec.num_classes))))
    images = normalize(pixels[: IPC * spec.num_classes], spec)
    evaluation = estimate_evaluation(
        FixedSet(images, class_labels(spec.num_classes, IPC)), spec.name, TestSet(pixels, labels, spec),
        EvaluationSettings(rounds=1, device=str(device)), tried_seconds=_TRIED,
    )  # fmt: skip
    per_test_image = evaluation.test_seconds / len(pixels)
    speed = RefineSpeed({}, 0.0, 0.0)
    if each.refine is not None:
        # How long the experts of "mtt" train cannot be measured briefly.
        settings = RefineSettings(batch_real=each.refine.batch_real) if each.refine.objective == "mtt" else each.refine
        speed = measure_refinement(images, spec, real, settings, device=device)
        train = len(load_dataset(spec.name, "train")) if is_prepared(spec.name) else len(pixels)
        speed = dataclasses.replace(speed, per_test=per_test_image * settings.held_out * train)
    speeds = Speeds(speed, evaluation.seconds_per_epoch, per_test_image)
    if not each.preset:
        return speeds
    from ddkit.entering.training import sampling_speed
    from ddkit.generator.training.estimate import estimate
    from ddkit.generator.training.plan import suitable_precision

    config = training_config(each)
    config = dataclasses.replace(config, precision=each.train_precision or suitable_precision(config, device))
    costs = estimate(config, spec.image_size, spec.num_classes, device)
    sampling = each.bundle_settings.sampling if of_track == 2 else each.sampling_settings
    return dataclasses.replace(
        speeds,
        training=tuple(stage.images_per_second or 1.0 for stage in costs.stages),
        least_training=costs.least_seconds(preset(each.preset).least_steps),
        sampled=sampling_speed(config, spec, sampling, device),
        classifier_is_there=of_track == 2
        and is_prepared(spec.name)
        and is_cached(load_dataset(spec.name, "train"), spec, CLASSIFIER, device=resolve_device("auto")),
    )
