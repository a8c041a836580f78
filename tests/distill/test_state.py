"""The state of a refinement: starting over restores the original set and removes nothing else."""

import dataclasses
import json
import shutil

import pytest
import torch

from ddkit.distill.generate import FromReal, generate
from ddkit.distill.refine import recorded_settings, refine
from ddkit.distill.settings import PoolSettings, RefineLimits, RefineSettings
from ddkit.distill.state import RefinementState, start_over
from ddkit.errors import BadFileError, DDKitError, InvalidSubmissionError, MissingDataError, UsageError
from ddkit.runtime.files import sha256_of
from ddkit.sets.distilled import read_provenance, set_files

# So slowly that the validations cannot differ, of which the latest then counts.
SETTINGS = RefineSettings(batch_real=2, val_every=2, val_epochs=0, held_out=0.2, learning_rate=1e-3)


@pytest.fixture
def start(colors, tmp_path):
    return generate(colors, 2, FromReal("first"), tmp_path / "submission" / "colors.pt").tensor


def run(path, folder, steps, **options):
    return refine(path, "colors", SETTINGS, RefineLimits(steps), folder, **options)


def contents(path):
    return [file.read_bytes() for file in vars(set_files(path)).values()]


def test_start_over_restores_the_original_set(start, tmp_path):
    before = contents(start)
    run(start, tmp_path / "run", 2)
    refined = contents(start)
    assert refined != before
    start_over(start, tmp_path / "run")
    assert contents(start) == before
    assert contents(tmp_path / "run" / "refined.pt") == refined, "what was given up is kept"
    assert run(start, tmp_path / "run", 1).steps == 1


def test_refinement_whose_copy_of_the_original_is_gone_resumes(start, tmp_path):
    run(start, tmp_path / "run", 1)
    (tmp_path / "run" / "before.pt").unlink()
    assert run(start, tmp_path / "run", 2).steps == 2
    assert read_provenance(start)["kind"] == "refined" and read_provenance(start)["before"] == {}


def test_a_kill_while_starting_over_loses_neither_set(start, tmp_path):
    folder, before = tmp_path / "run", contents(start)
    run(start, folder, 2)
    refined = contents(start)
    kept = {file: file.read_bytes() for file in folder.iterdir()}
    start_over(start, folder)
    for file, content in kept.items():  # as if killed when the tensor had been given back and nothing else yet
        file.write_bytes(content)
    for file, content in list(zip(vars(set_files(start)).values(), refined, strict=True))[1:]:
        file.write_bytes(content)
    start_over(start, folder)
    assert contents(start) == before and contents(folder / "refined.pt") == refined


def test_start_over_keeps_the_refined_set_from_where_it_was_written(start, tmp_path):
    folder, out, before = tmp_path / "run", tmp_path / "elsewhere" / "colors.pt", contents(start)
    run(start, folder, 2, out=out)
    refined = contents(out)
    run(start, folder, 0, out=out, fresh=True)
    assert contents(start) == before and contents(folder / "refined.pt") == refined
    out.write_bytes(b"another's")
    with pytest.raises(UsageError, match="a set that ddkit did not make, which would be lost"):
        run(start, folder, 0, out=out, fresh=True)
    assert out.read_bytes() == b"another's" and contents(folder / "refined.pt") == refined
    assert RefinementState.read(folder).step == 0, "the refinement is not discarded"


def test_a_start_that_fails_discards_nothing(start, tmp_path):
    folder = tmp_path / "run"
    run(start, folder, 2)
    kept = {file: file.read_bytes() for file in (*folder.iterdir(), *start.parent.iterdir())}
    with pytest.raises(DDKitError, match="PyTorch cannot use a GPU|There is no GPU 'cuda:77'"):
        run(start, folder, 1, fresh=True, device="cuda:77")
    assert {file: file.read_bytes() for file in (*folder.iterdir(), *start.parent.iterdir())} == kept


def test_start_over_leaves_other_files_alone(start, tmp_path):
    folder = tmp_path / "run"
    run(start, folder, 1)
    (folder / "notes.txt").write_text("mine")
    start_over(start, folder)
    assert {"notes.txt"} == {file.name for file in folder.iterdir()} - {".lock", "refined.pt", "refined.json", "refined.png"}


def test_the_only_copy_of_a_set_is_never_removed(start, colors, tmp_path):
    folder, before = tmp_path / "run", contents(start)
    run(start, folder, 2)
    generate(colors, 2, FromReal("random", seed=5), start, replace=True)
    other, kept = contents(start), {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UsageError, match="the refinement of a set other than"):
        run(start, folder, 1, fresh=True)
    with pytest.raises(MissingDataError, match="does not exist"):
        run(tmp_path / "nowhere.pt", folder, 1, fresh=True)
    assert contents(start) == other
    assert {file: file.read_bytes() for file in folder.iterdir()} == kept
    assert contents(folder / "before.pt") == before


def test_a_damaged_set_is_refused_and_starts_over_from_its_original(start, tmp_path):
    folder, before = tmp_path / "run", contents(start)
    run(start, folder, 2)
    start.write_bytes(damaged := start.read_bytes()[:3000])
    with pytest.raises(InvalidSubmissionError, match="damaged"):
        run(start, folder, 3)
    run(start, folder, 0, fresh=True)
    assert contents(start) == before and (folder / "refined.pt").read_bytes() == damaged
    (folder / "before.pt").write_bytes(damaged)
    with pytest.raises(InvalidSubmissionError, match="before.pt"):
        run(start, folder, 0, fresh=True)
    assert contents(start) == before


def test_an_original_whose_state_is_gone_is_not_replaced_and_can_be_started_over_from(start, tmp_path):
    folder, before = tmp_path / "run", contents(start)
    run(start, folder, 2)
    refined = contents(start)
    (folder / "state.pt").unlink()
    with pytest.raises(UsageError, match="whose state.pt is gone"):
        run(start, folder, 3)
    assert contents(start) == refined and contents(folder / "before.pt") == before
    run(start, folder, 0, fresh=True)
    assert contents(start) == before and contents(folder / "refined.pt") == refined


def test_start_over_recognizes_its_result_without_provenance(start, tmp_path):
    folder, before = tmp_path / "run", contents(start)
    run(start, folder, 2)
    set_files(start).provenance.unlink()
    start_over(start, folder)
    assert contents(start) == before


def test_start_over_without_a_refinement_changes_nothing(start, tmp_path):
    before = contents(start)
    start_over(start, tmp_path / "nowhere")
    assert contents(start) == before and not (tmp_path / "nowhere").exists()


def test_refine_recognizes_its_result_without_provenance(start, tmp_path):
    folder = tmp_path / "run"
    run(start, folder, 2)
    set_files(start).provenance.unlink()
    assert run(start, folder, 3).steps == 3


def test_refine_recognizes_an_earlier_result(start, tmp_path):
    run(start, tmp_path / "run", 2)
    earlier = tmp_path / "earlier" / "colors.pt"
    shutil.copytree(start.parent, earlier.parent)
    run(start, tmp_path / "run", 4)
    assert run(earlier, tmp_path / "run", 5).steps == 5


def test_the_latest_of_equal_validations_is_the_best(start, tmp_path):
    images = torch.load(start, weights_only=True)
    state = RefinementState.begin(start, images, tmp_path / "run", dataclasses.asdict(SETTINGS), "hash")
    for step, accuracy in ((0, 0.1), (2, 0.3), (4, 0.3), (6, 0.2)):
        state.step, state.average = step, images + step
        assert not state.validated
        state.record(accuracy)
        assert state.validated
    assert (state.first.step, state.best.step) == (0, 4)
    assert torch.equal(state.best_images, images + 4)
    state.save()
    again = RefinementState.read(tmp_path / "run")
    again.require(start, dataclasses.asdict(SETTINGS), "hash")
    assert again.validations == state.validations and torch.equal(again.best_images, state.best_images)
    assert again.start_sha256 == sha256_of(start) == sha256_of(again.before.tensor)


@pytest.mark.parametrize(
    ("margin", "accuracies", "best"),
    [
        (0.0, (0.1, 0.3, 0.29, 0.2), 2),
        (0.02, (0.1, 0.3, 0.29, 0.2), 4),
        (0.02, (0.1, 0.3, 0.29, 0.275), 4),
        (0.02, (0.3, 0.29, 0.285, 0.1), 0),
        (0.02, (0.3, 0.29, 0.31, 0.295), 4),
    ],
)
def test_a_later_set_is_preferred_within_the_margin(start, tmp_path, margin, accuracies, best):
    images = torch.load(start, weights_only=True)
    settings = dataclasses.asdict(dataclasses.replace(SETTINGS, val_margin=margin))
    state = RefinementState.begin(start, images, tmp_path / "run", settings, "hash")
    for number, accuracy in enumerate(accuracies):
        state.step, state.average = 2 * number, images + 2 * number
        state.record(accuracy)
    assert state.best.step == best and torch.equal(state.best_images, images + best)


def test_when_to_validate_may_change_and_how_may_not(start, tmp_path):
    run(start, tmp_path / "run", 2)
    rarely = dataclasses.replace(SETTINGS, val_every=1000, val_margin=0.5)
    assert refine(start, "colors", rarely, RefineLimits(4), tmp_path / "run").steps == 4
    assert recorded_settings(tmp_path / "run") == rarely
    with pytest.raises(UsageError, match="val_epochs: 0, not 1"):
        refine(start, "colors", dataclasses.replace(rarely, val_epochs=1), RefineLimits(5), tmp_path / "run")


def as_of_0_1_0(folder):
    """Write the state in the folder as ddkit 0.1.0 wrote it."""
    state = torch.load(folder / "state.pt", weights_only=True)
    new = json.loads(state["settings"])
    names = {
        "krr_lambda": "ridge", "dm_steps": "means_first", "batch_real": "real_per_class", "ema": "average",
        "val_every": "check_every", "val_epochs": "check_epochs",
    }  # fmt: skip
    old = {
        names.get(name, name): value
        for name, value in new.items()
        if name not in ("pool", "final_rate", "precision", "val_margin")
    }
    old["objective"] = {"dm": "means", "frepo": "regression", "mtt": "trajectories"}[new["objective"]]
    old["student"] = {name: value for name, value in new["student"].items() if name != "lr_momentum"} | {"rate_share": 0.05}
    old |= {"trained_share": 0.0, "attention": 0.0, "recognition": 0.0}
    state = {name: state[name] for name in (*VECTORS, "start_sha256", "dataset_sha256", "step", "seconds")} | {
        "version": 8, "settings": json.dumps(old), "student_rate": None, "judgements": state["validations"],
    }  # fmt: skip
    torch.save(state, folder / "state.pt")
    return old


VECTORS = ("images", "velocity", "average", "best_images")


@pytest.mark.slow
def test_a_refinement_of_0_1_0_resumes_with_its_settings(start, tmp_path):
    settings = dataclasses.replace(SETTINGS, dm_steps=1, pool=PoolSettings(size=0), precision="float32")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    refine(start, "colors", settings, RefineLimits(4), whole, out=tmp_path / "whole.pt")
    refine(start, "colors", settings, RefineLimits(2), parts, out=tmp_path / "parts.pt")
    as_of_0_1_0(parts)
    recorded = recorded_settings(parts)
    assert recorded == dataclasses.replace(settings, val_margin=0.0)
    assert refine(start, "colors", recorded, RefineLimits(4), parts, out=tmp_path / "parts.pt").steps == 4
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (whole, parts)]
    for name in VECTORS:
        assert torch.equal(states[0][name], states[1][name]), name
    assert [each["step"] for each in states[1]["validations"]] == [0, 2, 4]


def test_a_refinement_of_0_1_0_with_what_was_removed_says_how_to_start_over(start, tmp_path):
    run(start, tmp_path / "run", 2)
    old = as_of_0_1_0(tmp_path / "run") | {"attention": 100.0}
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    torch.save(state | {"settings": json.dumps(old)}, tmp_path / "run" / "state.pt")
    with pytest.raises(BadFileError, match="attention, which have been removed. Start over with --fresh"):
        recorded_settings(tmp_path / "run")


def test_recorded_settings_that_are_unknown_raise_bad_file_error_that_names_them(start, tmp_path):
    run(start, tmp_path / "run", 1)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    settings = json.loads(state["settings"])
    settings["pool"]["depth"] = 3
    torch.save(state | {"settings": json.dumps(settings)}, tmp_path / "run" / "state.pt")
    with pytest.raises(BadFileError, match="state.pt has settings .* pool: unknown fields depth") as raised:
        recorded_settings(tmp_path / "run")
    assert "--fresh" in raised.value.remedy
