"""From nothing to a packed and reported entry, in one call that continues where an earlier one was stopped."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ddkit.data.store import dataset_spec
from ddkit.distill.state import STATE_FILE
from ddkit.entering.plan import MARGIN, Outline, make_outline, refine_limit
from ddkit.entering.recipe import Recipe, write_recipe
from ddkit.entering.stages import PACK, REPORT, Stage, Workplace
from ddkit.errors import BadFileError, InterruptedRunError, UsageError
from ddkit.history import RECIPE_FILE
from ddkit.network.autotune import prescribed_plans, remembered_plans
from ddkit.network.plan import EnginePlan
from ddkit.reporting.report import Leaderboard
from ddkit.runtime.device import describe_device, resolve_device
from ddkit.runtime.environment import versions
from ddkit.runtime.files import exclusive, read_json, write_json
from ddkit.runtime.interrupt import time_is_up, time_limit
from ddkit.runtime.progress import Listener, Progress, ignore
from ddkit.runtime.records import read_record

_STATE_FILE = Path("runs", "entry.json")
_OVERTIME = 1.1  # of the time; an evaluation that is nearly finished is worth it
_SECONDS_BETWEEN_SAVES = 10.0
_LEAST_WORK = 1.0  # seconds, of a stage whose length the time decides


@dataclass(frozen=True)
class StageState:
    """How far a stage is.

    status: "to come", "running", "done", "stopped" or "left out", the last two by the end of the time. expected: seconds.
    seconds: that it took, over all calls; None if it has not run, or was found done.
    """

    name: str
    status: str
    expected: float
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What an entry will do: its stages, in order, and sentences on what was chosen.

    seconds: for everything; None where the recipe has all lengths.
    """

    recipe: Recipe
    seconds: float | None
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    def states(self) -> tuple[StageState, ...]:
        """What is done, as the files show it. A stage is to come if one is whose files it uses, which may change them."""
        to_come: set[str] = set()
        for each in self.stages:
            if to_come.intersection(each.after) or not each.is_done():
                to_come.add(each.name)
        return tuple(StageState(each.name, "to come" if each.name in to_come else "done", each.seconds) for each in self.stages)


@dataclass(frozen=True)
class Entry:
    """A finished entry.

    files: the zip, the page and the recipe. seconds: of all calls together. unfinished: names of the stages that the end
    of the time stopped or left out. lacks_official: True if an official evaluation can be had and was not made.
    """

    recipe: Recipe
    stages: tuple[StageState, ...]
    leaderboard: Leaderboard
    files: tuple[Path, ...]
    seconds: float
    lacks_official: bool

    @property
    def unfinished(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.stages if each.status in ("stopped", "left out"))


@dataclass
class _State:
    """What an entry keeps in its folder: what was asked for, the plan, and how far it is.

    asked: the recipe as plain values. recipe: with the lengths that are known by now. limits: seconds of work in all of
    stages whose length the time decided, once they have begun. spent: seconds of all calls. took: seconds by stage.
    """

    asked: dict[str, Any]
    outline: Outline
    recipe: Recipe
    limits: dict[str, float] = field(default_factory=dict)
    spent: float = 0.0
    took: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> _State | None:
        """None where no entry has begun. Raises BadFileError for a damaged file."""
        path = folder / _STATE_FILE
        if not path.exists():
            return None
        values = read_json(path)
        try:
            return read_record(cls, values)
        except (UsageError, BadFileError) as error:
            raise BadFileError(
                f"{path} is not the state of an entry by this version of ddkit.", "Delete it to plan again."
            ) from error

    def save(self, folder: Path) -> None:
        write_json(folder / _STATE_FILE, asdict(self))


def plan_entry(
    recipe: Recipe, folder: Path, *, seconds: float | None = None, device: str = "auto", progress: Listener = ignore
) -> Plan:
    """The plan of an entry in `folder`, which an earlier call may have begun; nothing is written.

    recipe: what to make, for example from `ddkit.entering.plan.draft`. seconds: for everything; None for a recipe that has
    all lengths. An entry that was begun within a time keeps its presets of training. Raises UsageError for too little
    time, for a folder with another entry, and for a recipe that was made with other images than those that are prepared;
    BadFileError for a folder that cannot be made.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise BadFileError(
            f"{folder} cannot be made: you may not write to {there}, or it is a file.", "Choose another folder with --folder."
        )
    recipe.require_datasets()
    state = _begin_or_resume(recipe, folder, seconds, device, progress)
    return _Run(state, folder, device, lambda text: None).plan


def enter(
    recipe: Recipe,
    folder: Path,
    *,
    seconds: float | None = None,
    device: str = "auto",
    progress: Listener = ignore,
    watch: Callable[[Sequence[StageState]], None] = lambda states: None,
    on_event: Callable[[str], None] = lambda text: None,
) -> Entry:
    """Carry out the plan of an entry: prepare data, make, refine, evaluate, check, pack and report.

    The arguments are those of `plan_entry`. The same call continues after an interruption or a kill; with more `seconds`
    it refines further. When the time is up inside a stage, its state is kept, and what there is is packed and reported.
    watch: called with the state of all stages whenever it changes. on_event: called with a sentence on each choice,
    warning and result. The folder's recipe.toml makes the same entry again.
    Raises what `plan_entry` and the stages raise, and InterruptedRunError once asked to stop, or if the time is up before
    there is anything to pack.
    """
    here = {**versions(), "device": describe_device(resolve_device(device))}
    if others := [
        f"{name} {made}, here {here[name]}" for name, made in recipe.versions.items() if here.get(name, made) != made
    ]:
        on_event(f"warning: the recipe was made with other versions ({'; '.join(others)}): the sets may differ.")
    recipe.require_datasets()
    with exclusive(folder.absolute(), "makes an entry", elsewhere="--folder"), prescribed_plans(recipe.engines):
        state = _begin_or_resume(recipe, folder, seconds, device, progress)
        state.save(folder)
        return _Run(state, folder, device, on_event).carry_out(recipe, progress, watch)


def _begin_or_resume(recipe: Recipe, folder: Path, seconds: float | None, device: str, progress: Listener) -> _State:
    began, state = time.monotonic(), _State.read(folder)
    if state is not None and seconds is not None and state.recipe.track == recipe.track:
        # The presets were chosen for the memory that was free when it began.
        presets = {each.dataset: each.preset for each in state.recipe.sets}
        sets = tuple(replace(each, preset=presets.get(each.dataset, each.preset)) for each in recipe.sets)
        recipe = replace(recipe, sets=sets)
    asked = recipe.to_json()
    if state is None:
        outline = make_outline(recipe, seconds, device=device, progress=progress)
        return _State(asked, outline, outline.recipe, spent=time.monotonic() - began)
    if differences := [name for name in sorted({*asked, *state.asked}) if asked.get(name) != state.asked.get(name)]:
        raise UsageError(
            f"{folder.absolute()} holds an entry with other settings ({', '.join(differences)}).",
            "Repeat the command that began it, or choose another folder with --folder.",
        )
    if (seconds is None) != (state.outline.seconds is None):
        raise UsageError(
            f"{folder.absolute()} holds an entry that was begun {'with' if seconds is None else 'without'} --time.",
            "Repeat the command that began it, or choose another folder with --folder.",
        )
    if seconds == state.outline.seconds:
        return state
    # With another time the lengths are decided again; what has been refined and trained is continued.
    sets = tuple(
        replace(each, autoencoder_steps=None, train_steps=None, refine_steps=None, refine=now.refine)
        for each, now in zip(recipe.sets, state.recipe.sets, strict=True)
    )
    begun = any((folder / "runs" / f"{name}-refine" / STATE_FILE).exists() for name in recipe.datasets)
    again = replace(recipe, sets=sets)
    state.outline = make_outline(again, seconds, device=device, spent=state.spent, begun=begun, progress=progress)
    state.recipe, state.limits = state.outline.recipe, {}
    state.spent += time.monotonic() - began
    return state


class _Run:
    """One call of `enter`."""

    def __init__(self, state: _State, folder: Path, device: str, on_event: Callable[[str], None]) -> None:
        self._state, self._folder, self._device, self._on_event = state, folder, device, on_event
        self._place = Workplace(folder, state.recipe, device, self._limit, on_event)
        outline = state.outline
        self.plan = Plan(state.recipe, outline.seconds, self._place.stages(outline.expected), outline.notes)
        self._states: dict[str, StageState] = {}
        self._began = self._saved = time.monotonic()

    def carry_out(self, asked: Recipe, progress: Listener, watch: Callable[[Sequence[StageState]], None]) -> Entry:
        """Run every stage that is not done."""
        state = self._state
        for note in self.plan.notes:
            self._on_event(note)
        self._states = states = {each.name: each for each in self.plan.states()}

        def set_status(name: str, status: str) -> None:
            states[name] = replace(states[name], status=status, seconds=state.took.get(name))
            watch(tuple(states.values()))

        watch(tuple(states.values()))
        self._began = time.monotonic() - state.spent  # so that what was spent earlier counts
        for stage in self.plan.stages:
            if stage.is_done():  # asked now, as an earlier stage may have made another set, or the same one again
                if states[stage.name].status != "done":
                    set_status(stage.name, "done")
            elif stage.stoppable and self._left() <= 0:
                set_status(stage.name, "left out")
            else:
                set_status(stage.name, "running")
                set_status(stage.name, "done" if self._run(stage, progress) else "stopped")
        recipe = self._finish(asked)
        leaderboard = self._place.leaderboard
        assert leaderboard is not None  # the report is the last stage
        files = (self._place.zip_file, self._place.page, self._folder / RECIPE_FILE)
        return Entry(recipe, tuple(states.values()), leaderboard, files, state.spent, self._place.lacks_official())

    def _run(self, stage: Stage, progress: Listener) -> bool:
        """Run a stage; False if the time was up before its end."""
        state, began = self._state, time.monotonic()
        earlier = state.took.get(stage.name, 0.0)
        if stage.name == PACK and not self._place.sets_are_there():
            made = "set" if state.recipe.track == 1 else "generator"
            raise InterruptedRunError(
                f"The time is up before there was a {made} to pack; the state is kept.",
                "Run the same command again with a longer --time.",
            )
        if stage.name in (PACK, REPORT):
            self._write_recipe()  # which the record of the zip names, and the page shows

        def listener(report: Progress) -> None:
            if time.monotonic() - self._saved >= _SECONDS_BETWEEN_SAVES:
                self._save(stage, earlier + time.monotonic() - began)
            progress(report)

        try:
            with time_limit(max(0.0, self._left())) if stage.stoppable else contextlib.nullcontext():
                try:
                    stage.run(listener)
                except InterruptedRunError as error:
                    if not time_is_up():  # what a stage advises speaks of the options of its own command
                        raise InterruptedRunError(error.message, "Run the same command again to continue.") from error
                    self._on_event(f"The time is up in the stage '{stage.name}'; its state is kept.")
                    return False
            return True
        finally:
            with contextlib.suppress(BadFileError):  # a full disk is reported by the stage itself
                self._save(stage, earlier + time.monotonic() - began)

    def _left(self) -> float:
        """Seconds until the time is up, overtime included."""
        seconds = self._state.outline.seconds
        return math.inf if seconds is None else _OVERTIME * seconds - (time.monotonic() - self._began)

    def _save(self, stage: Stage, took: float) -> None:
        self._saved = time.monotonic()
        state = self._state
        state.recipe, state.spent, state.took[stage.name] = self._place.recipe, self._saved - self._began, took
        state.save(self._folder)

    def _limit(self, name: str, earlier: float) -> float:
        """How many seconds a stage may work, over all calls, where the time decides; asked when it begins or continues."""
        state, outline = self._state, self._state.outline
        to_come = [each for each in self._states.values() if each.status in ("to come", "running")]
        flexible = sum(each.expected for each in to_come if each.name in outline.flexible)
        fixed = sum(each.expected for each in to_come if each.name not in outline.flexible)
        left = (outline.seconds or 0.0) - (time.monotonic() - self._began) - MARGIN * fixed
        seconds = max(0.0, left) * outline.expected[name] / flexible
        verb, _, dataset = name.rpartition(" ")
        settings = state.recipe.set_of(dataset).refine
        if verb == "refine" and settings is not None:
            seconds = refine_limit(outline.speeds[dataset].refine, settings, seconds)
        # What a kill has cost shortens the rest; a stage that has begun is never made longer.
        state.limits[name] = min(state.limits.get(name, math.inf), earlier + max(_LEAST_WORK, seconds))
        state.save(self._folder)
        return state.limits[name]

    def _write_recipe(self) -> Recipe:
        """Write the recipe that makes the sets that are there again."""
        recipe = self._place.exact_recipe()
        device = resolve_device(self._device)
        sizes = {f", {dataset_spec(name).image_size} pixels," for name in recipe.datasets}
        # The recipe's own plans count more than what has been measured since.
        plans = {**remembered_plans(device), **self._state.recipe.engines}
        names = EnginePlan.__dataclass_fields__
        engines = {
            key: {name: value for name, value in plan.items() if name in names}
            for key, plan in plans.items()
            if any(size in key for size in sizes)
        }
        recipe = replace(recipe, versions={**versions(), "device": describe_device(device)}, engines=engines)
        write_recipe(recipe, self._folder / RECIPE_FILE)
        return recipe

    def _finish(self, asked: Recipe) -> Recipe:
        """Write the recipe, and say whether a recipe's sets came out the same."""
        recipe = self._write_recipe()
        for before, now in zip(asked.sets, recipe.sets, strict=True):
            if before.sha256:
                same = "is the same to the bit as" if before.sha256 == now.sha256 else "differs from"
                what = "set of" if recipe.track == 1 else "bundle for"
                self._on_event(f"The {what} {now.dataset} {same} the one that the recipe was made with.")
        return recipe
