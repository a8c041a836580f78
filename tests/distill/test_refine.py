"""Refinement improves a set, resumes to the same bits, and loses nothing."""

import dataclasses
import json
import os
import signal

import pytest
import torch

from ddkit.data.images import denormalize, normalize
from ddkit.data.prepare import prepare
from ddkit.data.store import dataset_spec, load_dataset, train_sha256
from ddkit.distill.generate import FromReal, generate
from ddkit.distill.holdout import TrainHoldout
from ddkit.distill.matching import dm_loss
from ddkit.distill.refine import Refined, refine
from ddkit.distill.settings import ExpertSettings, PoolSettings, RefineLimits, RefineSettings, StudentSettings
from ddkit.distill.spectrum import Spectrum
from ddkit.distill.state import RECORDS_FILE
from ddkit.errors import BadFileError, ComputeError, InterruptedRunError, InvalidSubmissionError, MissingDataError, UsageError
from ddkit.network.embedding import build_embedder
from ddkit.network.networks import build_network
from ddkit.runtime.files import sha256_of
from ddkit.sets.distilled import set_files

QUICK = RefineSettings(
    batch_real=4, val_every=3, val_epochs=1, held_out=0.2,
    pool=PoolSettings(size=2, updates=1, max_age=3, from_step=3),
    experts=ExpertSettings(count=1, steps=4, batch_size=4, keep_every=1, span=2), student=StudentSettings(2, 1),
)  # fmt: skip
DM = dataclasses.replace(QUICK, objective="dm")
RANDOM_NETWORKS = dataclasses.replace(QUICK, dm_steps=1, pool=PoolSettings(size=0))
IN_BFLOAT16 = dataclasses.replace(RANDOM_NETWORKS, precision="bfloat16")
WITH_POOL = dataclasses.replace(QUICK, dm_steps=1)
MTT = dataclasses.replace(QUICK, objective="mtt", dm_steps=1)


@pytest.fixture
def start(colors, tmp_path):
    return generate(colors, 2, FromReal("first"), tmp_path / "submission" / "colors.pt").tensor


def read(path):
    return torch.load(path, weights_only=True)


def run(path, folder, steps, settings=QUICK, **options):
    return refine(path, "colors", settings, RefineLimits(steps), folder, **options)


def test_gain_says_if_no_step_was_better(tmp_path):
    there = set_files(tmp_path / "colors.pt")
    assert Refined(there, there, 30, 20, 0.25, 0.2, 1.0, 0).gain == "20.00% before, 25.00% at step 20 of 30"
    assert Refined(there, there, 30, 0, 0.2, 0.2, 1.0, 0).gain.startswith("20.00% before, and no better in 30 steps")


@pytest.mark.slow
def test_refine_writes_the_set_and_its_provenance_and_keeps_the_original(start, tmp_path):
    before, facts_before = start.read_bytes(), json.loads(start.with_suffix(".json").read_text())
    refined = run(start, tmp_path / "run", 4)
    assert read(start).shape == (4, 3, 16, 16)
    assert start.read_bytes() != before == refined.before.tensor.read_bytes()
    facts = json.loads(refined.files.provenance.read_text())
    assert (facts["kind"], facts["batch_real"], facts["sha256"]) == ("refined", 4, sha256_of(start))
    assert facts["before"] == facts_before
    assert facts["dataset_sha256"] == train_sha256("colors")
    assert refined.files.sheet.exists() and refined.before.sheet.exists()
    records = [json.loads(line) for line in (tmp_path / "run" / RECORDS_FILE).read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 3, 4]
    best = max(records, key=lambda record: (record["accuracy"], record["step"]))
    assert (refined.best_step, refined.accuracy) == (best["step"], best["accuracy"])
    assert refined.accuracy_before == records[0]["accuracy"]


@pytest.mark.slow
def test_refined_images_come_closer_to_real_ones_in_a_network_never_seen(letters, tmp_path):
    start = generate(letters, 1, FromReal("random"), tmp_path / "glyphs.pt").tensor
    settings = dataclasses.replace(QUICK, batch_real=16, val_every=1000, val_epochs=0, held_out=0.01)
    before = read(start)
    refine(start, letters, settings, RefineLimits(steps=10), tmp_path / "run")
    after = read(tmp_path / "run" / "state.pt")["images"]
    real, spec = load_dataset(letters, "train"), dataset_spec(letters)
    some = real.labels.argsort(stable=True).view(10, -1)[:, :20].flatten()
    embed = build_embedder(build_network("convnet", 10, 32, seed=12345), len(before))
    distances = [dm_loss(embed, images, normalize(real.images[some], spec), 10).item() for images in (before, after)]
    assert distances[1] < 0.9 * distances[0]


@pytest.mark.slow
def test_a_refinement_that_diverges_stops_and_writes_the_best_set(start, tmp_path):
    before = read(start)
    with pytest.raises(ComputeError, match="diverged at step 1: its pixels"):
        run(start, tmp_path / "run", 9, dataclasses.replace(QUICK, learning_rate=1e6))
    assert torch.equal(read(start), before)
    assert json.loads(start.with_suffix(".json").read_text())["kind"] == "first-real"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [DM, IN_BFLOAT16, WITH_POOL, MTT])
def test_a_resumed_refinement_has_the_same_bits_as_one_without_a_stop(start, tmp_path, settings):
    copy = tmp_path / "other" / "colors.pt"
    copy.parent.mkdir()
    copy.write_bytes(start.read_bytes())
    run(start, tmp_path / "whole", 5, settings)
    run(copy, tmp_path / "parts", 2, settings)
    refined = run(copy, tmp_path / "parts", 5, settings)
    assert refined.steps == 5
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")]
    for name in ("images", "velocity", "average"):
        assert torch.equal(states[0][name], states[1][name]), name
    assert states[0]["pool"].keys() == states[1]["pool"].keys()
    for name, kept in states[0]["pool"].items():
        assert torch.equal(kept, states[1]["pool"][name]), name
    assert bool(states[0]["pool"]) == (settings is WITH_POOL)
    assert states[0]["student_lr"] == states[1]["student_lr"]
    assert (states[0]["student_lr"] is None) == (settings.objective != "mtt")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["Training experts (once)", "Trying students' learning rates"])
def test_a_refinement_interrupted_while_it_prepares_mtt_loses_no_step(start, tmp_path, task):
    copy = tmp_path / "other" / "colors.pt"
    copy.parent.mkdir()
    copy.write_bytes(start.read_bytes())
    told = []

    def listen(report):
        told.append(report.task)
        if report.task == task and told.count(task) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match="after step 1"):
        run(copy, tmp_path / "parts", 2, MTT, progress=listen)
    assert told.count(task) == 1, "it stopped at once"
    run(copy, tmp_path / "parts", 2, MTT)
    run(start, tmp_path / "whole", 2, MTT)
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")]
    assert states[0]["student_lr"] == states[1]["student_lr"]
    assert torch.equal(states[0]["images"], states[1]["images"])


def test_a_finished_refinement_run_again_changes_nothing(start, tmp_path):
    run(start, tmp_path / "run", 3)
    written, records = start.read_bytes(), (tmp_path / "run" / RECORDS_FILE).read_text()
    refined = run(start, tmp_path / "run", 3)
    assert refined.steps == 3
    assert (start.read_bytes(), (tmp_path / "run" / RECORDS_FILE).read_text()) == (written, records)


@pytest.mark.slow
@pytest.mark.parametrize("objective, method", [("dm", "distribution"), ("frepo", "regression"), ("mtt", "trajectory")])
def test_the_provenance_names_the_method_of_each_objective(start, tmp_path, objective, method):
    before = read(start)
    # So slowly that the validations cannot differ, of which the later one then counts.
    settings = dataclasses.replace(MTT, objective=objective, dm_steps=0, ema=0.0, learning_rate=1e-3)
    run(start, tmp_path / "run", 1, settings)
    assert not torch.equal(read(tmp_path / "run" / "state.pt")["images"], before)
    facts = json.loads(start.with_suffix(".json").read_text())
    assert facts["objective"] == objective and method in facts["method"]


@pytest.mark.slow
def test_dm_comes_first_and_frepo_follows(start, tmp_path):
    both = dataclasses.replace(QUICK, dm_steps=2)
    folders = {"both": both, "dm": dataclasses.replace(QUICK, objective="dm")}
    images = {}
    for steps in (2, 3):
        for name, settings in folders.items():
            run(start, tmp_path / name, steps, settings, out=tmp_path / f"{name}.pt")
            images[name, steps] = read(tmp_path / name / "state.pt")["images"]
    assert torch.equal(images["both", 2], images["dm", 2])
    assert not torch.allclose(images["both", 3], images["dm", 3])
    slowly = dataclasses.replace(both, ema=0.0, val_every=3, learning_rate=1e-3)
    run(start, tmp_path / "told", 3, slowly, out=tmp_path / "told.pt")
    assert (
        json.loads((tmp_path / "told.json").read_text())["method"]
        == "distribution matching, then neural feature regression with pooling"
    )


def test_the_moving_average_of_the_images_is_validated_and_written(start, tmp_path):
    x0, states = read(start), []
    for steps in (1, 2):
        settings = dataclasses.replace(QUICK, ema=0.15, val_every=1)
        run(start, tmp_path / "run", steps, settings)
        states.append(read(tmp_path / "run" / "state.pt"))
    x1, x2 = (state["images"] for state in states)
    first = 0.1 * x0 + 0.9 * x1
    assert torch.allclose(states[0]["average"], first, atol=1e-6)
    assert torch.allclose(states[1]["average"], 0.15 * first + 0.85 * x2, atol=1e-6)
    averages = [x0, *(state["average"] for state in states)]
    best = max(states[1]["validations"], key=lambda validation: (validation["accuracy"], validation["step"]))
    assert torch.equal(read(start), averages[best["step"]])
    alone = dataclasses.replace(QUICK, ema=0.0)
    run(start, tmp_path / "alone", 1, alone, out=tmp_path / "alone.pt")
    state = read(tmp_path / "alone" / "state.pt")
    assert torch.equal(state["average"], state["images"])


@pytest.mark.slow
def test_pixels_move_along_weighted_gradients_with_momentum_and_more_slowly_towards_the_end(start, tmp_path):
    settings = dataclasses.replace(DM, spectrum=0.0, final_rate=0.5, ema=0.0, val_epochs=0, precision="float32")
    velocities, images = {}, [read(start)]
    for name, changes in (("plain", {}), ("momentum", {"momentum": 0.0}), ("spectrum", {"spectrum": 1.0})):
        folder = tmp_path / name
        for steps in (1, 2):
            run(start, folder, steps, dataclasses.replace(settings, **changes), out=tmp_path / f"{name}.pt")
            state = read(folder / "state.pt")
            velocities[name, steps] = state["velocity"]
            images += [] if changes else [state["images"]]
    first, second = velocities["plain", 1], velocities["plain", 2]
    torch.testing.assert_close(images[0] - images[1], 6.0 * first, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(images[1] - images[2], 6.0 * 0.75 * second, rtol=1e-3, atol=1e-5)  # halfway to half the rate
    torch.testing.assert_close(second - velocities["momentum", 2], 0.5 * first, rtol=1e-3, atol=1e-5)
    holdout = TrainHoldout(load_dataset("colors", "train"), dataset_spec("colors"), held_out=0.2, seed=0)
    weighted = Spectrum(holdout.sample(8000), 1.0).weigh(first)
    torch.testing.assert_close(velocities["spectrum", 1], weighted, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(weighted, first, rtol=0.1)


def test_displayable_keeps_pixels_within_the_range_of_a_picture(start, tmp_path):
    original = read(start)
    for displayable in (False, True):
        torch.save(10 * original, start)
        settings = dataclasses.replace(QUICK, displayable=displayable, learning_rate=300.0)
        folder = tmp_path / str(displayable)
        run(start, folder, 3, settings, out=tmp_path / f"{displayable}.pt")
        for name in ("images", "average", "best_images"):
            pixels = denormalize(read(folder / "state.pt")[name], dataset_spec("colors"))
            inside = -1e-5 <= pixels.min() and pixels.max() <= 1 + 1e-5
            assert inside == displayable, name


def test_a_set_that_does_not_improve_is_not_changed(start, tmp_path):
    files = [start.with_suffix(suffix) for suffix in (".pt", ".json", ".png")]
    before = [file.read_bytes() for file in files]
    run(start, tmp_path / "run", 0, QUICK)
    elsewhere = tmp_path / "elsewhere.pt"
    run(start, tmp_path / "run", 0, QUICK, out=elsewhere)
    assert [file.read_bytes() for file in files] == before
    assert [elsewhere.with_suffix(file.suffix).read_bytes() for file in files] == before


def test_a_set_that_only_became_displayable_names_no_method(start, tmp_path):
    torch.save(3 * read(start), start)
    settings = dataclasses.replace(QUICK, displayable=True, objective="frepo", dm_steps=0)
    run(start, tmp_path / "run", 0, settings)
    facts = json.loads(start.with_suffix(".json").read_text())
    assert (facts["method"], facts["refined_steps"]) == ("clamped to the range of pixels", 0)


@pytest.mark.slow
@pytest.mark.parametrize("settings, expected", [(DM, 1), (RANDOM_NETWORKS, 1), (WITH_POOL, 1), (MTT, 2)])
def test_a_step_on_a_gpu_waits_for_it_once(start, tmp_path, gpu, second_gpu, settings, expected):
    """Trajectory matching waits a second time, as it moves no pixel before it knows that the student's rate is finite."""
    waits = []

    def listen(report):
        if report.task == "Refining":
            waits.append(dict(gpu.waits))
        gpu.reset()

    settings = dataclasses.replace(settings, val_every=1000, val_epochs=0)
    run(start, tmp_path / "run", 12, settings, device=second_gpu, progress=listen)
    # The first steps of each kind measure engines and fill buffers.
    assert [sum(each.values()) for each in waits[6:]] == [expected] * 6, waits[6:]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [WITH_POOL, MTT])
def test_a_state_from_a_gpu_resumes_on_the_cpu_and_on_another_gpu(start, tmp_path, gpu, second_gpu, settings):
    for steps, device in ((4, "cuda"), (6, "cpu"), (8, second_gpu)):
        assert run(start, tmp_path / "run", steps, settings, device=device).steps == steps


@pytest.mark.slow
def test_refining_on_a_gpu_that_is_too_small_is_one_message_before_anything_is_written(start, tmp_path, gpu, second_gpu):
    before = start.read_bytes()
    gpu.memory = [(2**20, 4 * 2**30), (70 * 2**30, 80 * 2**30)]
    with pytest.raises(ComputeError, match="GiB of memory, and 0.0 GiB are free") as caught:
        run(start, tmp_path / "run", 4, DM, device="cuda")
    assert caught.value.remedy.endswith("Try --device cuda:1, which has 80.0 GiB.")
    assert start.read_bytes() == before and not (tmp_path / "run").exists()
    assert run(start, tmp_path / "run", 4, DM, device=second_gpu).steps == 4


@pytest.mark.slow
def test_memory_that_runs_out_while_refining_loses_nothing(start, tmp_path, gpu):
    def take_the_memory(report):
        if report.task == "Refining" and report.done == 3:
            gpu.largest_tensor = 1000

    with pytest.raises(ComputeError, match="Out of memory") as caught:
        run(start, tmp_path / "run", 9, DM, device="cuda", progress=take_the_memory)
    assert caught.value.remedy.startswith("Close other programs that use it, and run the same command again")
    assert json.loads(start.with_suffix(".json").read_text())["kind"] in ("refined", "first-real")
    gpu.largest_tensor = None
    assert run(start, tmp_path / "run", 9, DM, device="cuda").steps == 9


def test_precision_is_chosen_once_and_named_in_the_provenance(start, tmp_path):
    images = {}
    for precision in ("float32", "bfloat16"):
        settings = dataclasses.replace(RANDOM_NETWORKS, precision=precision, ema=0.0, learning_rate=1e-3)
        run(start, tmp_path / precision, 2, settings, out=tmp_path / f"{precision}.pt")
        facts = json.loads((tmp_path / f"{precision}.json").read_text())
        assert (facts["precision"], facts["computed_in"]) == (precision, precision)
        images[precision] = read(tmp_path / precision / "state.pt")["images"]
    assert torch.allclose(*images.values(), atol=1e-2) and not torch.equal(*images.values())
    automatic = dataclasses.replace(RANDOM_NETWORKS, precision="auto")
    run(start, tmp_path / "auto", 1, automatic, out=tmp_path / "auto.pt")
    assert read(tmp_path / "auto" / "state.pt")["precision"] in images


@pytest.mark.slow
@pytest.mark.parametrize("ipc", [1, 5])
def test_sets_of_one_and_of_all_images_per_class_are_refined_through_a_pool(colors, tmp_path, ipc):
    path = generate(colors, ipc, FromReal("first"), tmp_path / "colors.pt").tensor
    assert run(path, tmp_path / "run", 5, WITH_POOL).steps == 5
    state = read(tmp_path / "run" / "state.pt")
    assert state["images"].shape == (2 * ipc, 3, 16, 16) and state["pool_start"] == 3


class TestRefused:
    def test_other_settings_than_those_recorded(self, start, tmp_path):
        run(start, tmp_path / "run", 1)
        with pytest.raises(UsageError, match="momentum: 0.5, not 0.9"):
            run(start, tmp_path / "run", 2, dataclasses.replace(QUICK, momentum=0.9))

    def test_the_copy_that_the_folder_keeps(self, start, tmp_path):
        run(start, tmp_path / "run", 1)
        kept = tmp_path / "run" / "before.pt"
        before = kept.read_bytes()
        for fresh in (False, True):
            with pytest.raises(UsageError, match="is the copy of the original set that"):
                run(kept, tmp_path / "run", 2, fresh=fresh)
        assert kept.read_bytes() == before

    def test_out_with_the_result_of_another_refinement(self, start, colors, tmp_path):
        torch.save(3 * read(start), start)
        changing, other = dataclasses.replace(QUICK, displayable=True), tmp_path / "other.pt"
        run(start, tmp_path / "run", 0, changing, out=other)
        made = read(other)
        second = generate(colors, 2, FromReal("random", seed=5), tmp_path / "second.pt").tensor
        with pytest.raises(UsageError, match="the result of another refinement"):
            run(second, tmp_path / "elsewhere", 0, changing, out=other)
        assert torch.equal(read(other), made)
        run(start, tmp_path / "run", 0, changing, out=other)

    def test_out_with_a_set_that_ddkit_did_not_make(self, start, tmp_path):
        out = tmp_path / "mine.pt"
        torch.save(-read(start), out)
        with pytest.raises(UsageError, match="a set that ddkit did not make"):
            run(start, tmp_path / "run", 1, DM, out=out)
        assert torch.equal(read(out), -read(start))
        (tmp_path / "notes.json").write_text("[]")
        with pytest.raises(UsageError, match="notes.json does not belong to a set that ddkit made"):
            run(start, tmp_path / "run", 1, DM, out=tmp_path / "notes.pt")
        with pytest.raises(MissingDataError, match=r"notes\.pt"):  # a set that is missing, which nothing would overwrite
            run(tmp_path / "notes.pt", tmp_path / "run", 1, DM)

    def test_out_with_the_result_of_other_settings(self, start, tmp_path):
        out, slower = tmp_path / "out.pt", dataclasses.replace(DM, learning_rate=1e-3)
        run(start, tmp_path / "first", 1, slower, out=out)
        made = read(out)
        faster = dataclasses.replace(slower, learning_rate=2e-3)
        with pytest.raises(UsageError, match="the result of another refinement"):
            run(start, tmp_path / "second", 1, faster, out=out)
        assert torch.equal(read(out), made)
        run(start, tmp_path / "first", 1, faster, out=out, fresh=True)
        assert not torch.equal(read(out), made)
        assert torch.equal(read(tmp_path / "first" / "refined.pt"), made)

    def test_the_refinement_of_another_set(self, start, colors, tmp_path):
        run(start, tmp_path / "run", 1)
        generate(colors, 2, FromReal("random", seed=5), start, replace=True)
        with pytest.raises(UsageError, match="of a set other than"):
            run(start, tmp_path / "run", 2)

    def test_real_images_that_changed_since(self, start, colors, tmp_path):
        run(start, tmp_path / "run", 1)
        (tmp_path / "pictures" / "train" / "red" / "0.png").unlink()
        prepare(colors, tmp_path / "pictures", force=True)
        with pytest.raises(UsageError, match="real images have changed"):
            run(start, tmp_path / "run", 2)

    def test_a_damaged_state(self, start, tmp_path):
        run(start, tmp_path / "run", 1)
        state = tmp_path / "run" / "state.pt"
        state.write_bytes(state.read_bytes()[:1000])
        with pytest.raises(BadFileError, match="--fresh"):
            run(start, tmp_path / "run", 2)

    @pytest.mark.parametrize("wrong", [torch.zeros(4, 3, 8, 8), torch.full((4, 3, 16, 16), torch.nan)])
    def test_a_set_that_check_refuses(self, start, tmp_path, wrong):
        torch.save(wrong, start)
        with pytest.raises(InvalidSubmissionError):
            run(start, tmp_path / "run", 1)
        assert [file.name for file in (tmp_path / "run").glob("[!.]*")] == []

    @pytest.mark.parametrize(
        "wrong",
        [
            {"objective": "mean"},
            {"krr_lambda": 0.0},
            {"dm_steps": -1},
            {"precision": "float8"},
            {"final_rate": 0.0},
            {"held_out": 0.0},
            {"ema": 1.0},
            {"learning_rate": 0.0},
            {"val_every": 0},
            {"momentum": 1.0},
            {"val_epochs": -1},
            {"val_margin": -0.1},
        ],
    )
    def test_wrong_settings_raise_usage_error(self, wrong):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            dataclasses.replace(QUICK, **wrong)


@pytest.mark.parametrize("limits", [{"steps": -1}, {"seconds": -0.5}, {"seconds": float("nan")}])
def test_limits_that_are_never_reached_raise_usage_error(limits):
    with pytest.raises(UsageError, match=f"RefineLimits.{[*limits][0]} must not be negative"):
        RefineLimits(**limits)


@pytest.mark.parametrize("limits", [RefineLimits(0), RefineLimits(seconds=0.0)])
def test_limit_of_nothing_is_reached_before_the_first_step(limits):
    assert limits.progress(0, 0.0) >= 1
