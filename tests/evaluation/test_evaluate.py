"""Whole evaluations: what they return, how they are continued after a kill, who shares their rounds."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from ddkit.challenge import GLYPHS, DatasetSpec
from ddkit.data.images import normalize
from ddkit.data.store import ImageSet
from ddkit.errors import BadDataError, ComputeError, InterruptedRunError, InvalidSubmissionError, UsageError
from ddkit.evaluation.estimate import estimate_evaluation
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder, _key, evaluate, evaluate_generator
from ddkit.evaluation.rounds import RoundSettings
from ddkit.evaluation.sources import FixedSet
from ddkit.evaluation.test_sets import as_test_set
from ddkit.evaluation.tracks import Generated
from ddkit.network.autotune import _ENGINES
from ddkit.network.plan import EnginePlan
from ddkit.network.training import TrainingRun, TrainingSettings
from ddkit.results import append, read
from ddkit.runtime.progress import ignore

# Small images of few classes: an epoch takes milliseconds.
SPEC = DatasetSpec("blobs", 4, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def blobs(n, seed):
    """Pixels in which each class has a color of its own, under noise."""
    random = torch.Generator().manual_seed(seed)
    colors = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]])
    labels = torch.arange(n) % 4
    noise = torch.randint(-40, 40, (n, 3, 16, 16), generator=random)
    return (colors[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


def training_set():
    pixels, labels = blobs(16, seed=1)
    order = labels.argsort(stable=True)
    return normalize(pixels[order], SPEC), labels[order]


def real_images():
    pixels, labels = blobs(40, seed=2)
    return ImageSet(pixels, labels, ("a", "b", "c", "d"))


def evaluated(**options):
    return evaluate(*training_set(), real_images(), **{"spec": SPEC, "epochs_setting": 3, "rounds": 2, **options})


def same(first, second):
    """Equal in all but the time they took, and the form in which the test images came."""
    compared = [dataclasses.replace(e, seconds=0.0, generation_seconds=(), test_sha256="") for e in (first, second)]
    return compared[0] == compared[1]


@pytest.mark.slow
def test_evaluation_trains_fresh_networks_and_tests_them():
    reports = []
    outcome = evaluated(epochs_setting=12, rounds=3, progress=reports.append)
    assert len(outcome.accuracies) == 3 and len(set(outcome.loss_curves)) == 3
    assert outcome.mean > 0.9  # colors are easy
    assert outcome.mean == pytest.approx(sum(outcome.accuracies) / 3)
    # Rounds that all came to the same leave no interval.
    assert (outcome.interval is None) == (len(set(outcome.accuracies)) == 1)
    low, high = outcome.interval or (outcome.mean, outcome.mean)
    assert low <= outcome.mean <= high
    assert outcome.per_class == pytest.approx(
        [1 - sum(n for true, _, n in outcome.confusions if true == c) / 10 for c in range(4)]
    )
    assert all(len(curve) == 13 and curve[-1] < curve[0] for curve in outcome.loss_curves)
    assert (reports[-1].done, reports[-1].total) == (39, 39)
    assert {"round", "loss"} <= set(reports[-1].figures)


def test_the_track_decides_on_rounds_and_epochs():
    for track, epochs in ((1, 1001), (2, 101)):
        settings = EvaluationSettings(track)
        assert (settings.number_of_rounds, settings.training.epochs) == (3, epochs)


@pytest.mark.slow
def test_a_seed_repeats_an_evaluation_and_another_does_not():
    first = evaluated(seed=5)
    assert same(first, evaluated(seed=5))
    assert first.loss_curves != evaluated(seed=6).loss_curves


def test_pixels_and_a_reference_file_of_the_same_images_score_the_same():
    pixels = real_images()
    normalized = normalize(pixels.images, SPEC)
    outcomes = [
        evaluate(*training_set(), tests, spec=SPEC, epochs_setting=2, rounds=1)
        for tests in (pixels, {"images_val": normalized, "labels_val": pixels.labels}, (normalized, pixels.labels))
    ]
    assert same(outcomes[0], outcomes[1]) and same(outcomes[0], outcomes[2])


def test_the_order_of_the_test_images_does_not_matter():
    tests = real_images()
    backwards = ImageSet(tests.images.flip(0), tests.labels.flip(0), tests.class_names)
    first, second = (evaluate(*training_set(), t, spec=SPEC, epochs_setting=2, rounds=1) for t in (tests, backwards))
    assert first.accuracies == second.accuracies


def test_unofficial_evaluation_names_its_deviations():
    outcome = evaluated(augment=False, network="alexnet")
    assert not outcome.official
    reasons = "; ".join(outcome.deviations)
    for reason in ("dataset blobs", "4 images per class instead of 10", "2 rounds instead of 3", "E = 3 instead of 1000",
                   "network alexnet", "no augmentation"):  # fmt: skip
        assert reason in reasons


def test_record_of_an_evaluation_is_read_back_equal(tmp_path):
    outcome = evaluated()
    result = outcome.result("blobs", "0" * 64, "blobs.pt", kind="random-real", made_by={"seed": 1})
    append(result, tmp_path / "results.jsonl")
    (again,) = read(tmp_path / "results.jsonl").results
    assert again == result
    assert again.accuracies == outcome.accuracies and again.kind == "random-real" and again.track == 1


def test_a_finished_evaluation_is_not_repeated_and_more_rounds_only_add(tmp_path):
    state = StateFolder(tmp_path)
    first = evaluated(state=state)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert len(times) == 2
    # Even the seconds are those of the first time.
    assert evaluated(state=state) == first
    three = evaluated(state=state, rounds=3)
    assert three.loss_curves[:2] == first.loss_curves
    assert three.loss_curves == evaluated(rounds=3).loss_curves  # as of three rounds from the beginning
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_other_images_settings_or_tests_are_another_evaluation(tmp_path):
    for changes in ({}, {"seed": 1}, {"augment": False}, {"epochs_setting": 2}):
        evaluated(state=StateFolder(tmp_path), rounds=1, **changes)
    (images, labels), real = training_set(), real_images()
    mirrored = ImageSet(real.images.flip(3), real.labels, real.class_names)
    for trained_on, tests in ((images + 0.01, real), (images, mirrored)):
        evaluate(trained_on, labels, tests, spec=SPEC, epochs_setting=3, rounds=1, state=StateFolder(tmp_path))
    assert len(list(tmp_path.iterdir())) == 6


def test_damaged_state_is_ignored_with_a_warning(tmp_path, caplog):
    first = evaluated(state=StateFolder(tmp_path), rounds=1)
    (file,) = tmp_path.rglob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    assert same(evaluated(state=StateFolder(tmp_path), rounds=1), first)
    assert "starts over" in caplog.text


PROGRAM = """
import json, os, sys
sys.path[:0] = {folders!r}
from {module} import SPEC, real_images, training_set
from ddkit.errors import InterruptedRunError
from ddkit.evaluation.evaluate import StateFolder, evaluate
def progress(report):
    # In one write: print may end a line in a second one, between which another process's report can come.
    os.write(sys.stdout.fileno(), f"{{report.done}}\\n".encode())
try:
    outcome = evaluate(*training_set(), real_images(), spec=SPEC, epochs_setting={epochs}, rounds=2,
                       state=StateFolder({state!r}, 0.0), progress=progress)
except InterruptedRunError as error:
    sys.exit(error.exit_code)
with open({state!r} + os.environ.get("RANK", "0") + ".json", "w") as file:
    json.dump([outcome.accuracies, outcome.loss_curves], file)
"""


def write_script(state, epochs_setting):
    """A program that evaluates, keeping its state after every epoch, and leaves its outcome beside the state."""
    program = PROGRAM.format(
        folders=[str(folder) for folder in Path(__file__).parents[:2]],
        module=Path(__file__).stem,
        epochs=epochs_setting,
        state=str(state),
    )
    script = state.with_suffix(".py")
    script.write_text(program)
    return script


def read_until(process, done):
    """Read its reports until so many epochs are done."""
    for line in process.stdout:
        if float(line) >= done:
            return
    pytest.fail(process.stderr.read())


@pytest.mark.slow
def test_killed_evaluation_continues_to_the_same_bits(tmp_path):
    undisturbed = evaluated(epochs_setting=9)
    state = tmp_path / "state"
    for number, status, done in ((signal.SIGKILL, -signal.SIGKILL, 4), (signal.SIGTERM, 130, 14)):
        process = processes.start(write_script(state, 9))
        read_until(process, done)  # in the first round, in the second
        process.send_signal(number)
        process.communicate()
        assert process.returncode == status
    reports = []
    assert same(evaluated(epochs_setting=9, state=StateFolder(state, 0.0), progress=reports.append), undisturbed)
    assert reports[0].done >= 10  # the first round is not repeated


@pytest.mark.slow
def test_processes_share_the_rounds(tmp_path):
    alone = evaluated()
    for done in processes.run_together(write_script(tmp_path / "state", 3)):
        assert done.returncode == 0, done.stderr
        assert list(map(float, done.stdout.split())) == [1, 2, 3, 4]  # epochs: each did a round of its own
    first, second = (json.loads((tmp_path / f"state{rank}.json").read_text()) for rank in range(2))
    assert first == second  # both know all
    assert len(first[0]) == 2
    for shared, own in zip(first[1], alone.loss_curves, strict=True):
        # Each process computes with one thread here, and so rounds differently.
        assert shared == pytest.approx(own, abs=1e-2)


def made_by_round(seed, budget):
    images, labels = training_set()
    keep = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:10]
    return Generated(images[keep], labels[keep], 1.0)


def track2(generate=made_by_round, **options):
    settings = EvaluationSettings(track=2, epochs_setting=2, rounds=2, **options)
    return lambda state=None, progress=ignore: evaluate_generator(
        generate, as_test_set(real_images(), SPEC), settings, name="entry", state=state, progress=progress
    )


def test_track_2_generates_images_for_each_round():
    seeds = []

    def generate(seed, budget):
        seeds.append(seed)
        assert budget == 600
        images, labels = training_set()
        every = 3 - len(seeds)  # more in the second round
        return Generated(images[::every], labels[::every], 1.5)

    outcome = track2(generate)()
    assert len(set(seeds)) == 2 and outcome.generated == (8, 16) and outcome.images_per_class == (2, 4)
    assert outcome.generation_seconds == (1.5, 1.5)
    reasons = "; ".join(outcome.deviations)
    assert "per class" not in reasons and "budget" not in reasons and "E = 2 instead of 100" in reasons


def test_another_time_budget_reaches_the_generator_and_is_not_official():
    budgets = []

    def generate(seed, budget):
        budgets.append(budget)
        return made_by_round(seed, budget)

    outcome = track2(generate, time_budget=30.0)()
    assert budgets == [30.0, 30.0]
    assert "a time budget of 30 s instead of 600 s" in outcome.deviations


def test_continued_round_trains_on_the_images_that_it_began_with(tmp_path):
    calls = []

    def generate(seed, budget):
        calls.append(seed)
        return made_by_round(seed, budget)

    def stop_at_once(report):
        os.kill(os.getpid(), signal.SIGTERM)

    whole = track2()()
    with pytest.raises(InterruptedRunError):
        track2(generate)(StateFolder(tmp_path), stop_at_once)
    assert len(list(tmp_path.rglob("*-images.pt"))) == 1
    assert same(track2(generate)(StateFolder(tmp_path)), whole)
    assert len(calls) == 2
    assert not list(tmp_path.rglob("*-images.pt")), "a finished round has no use for them"


def test_two_evaluations_with_one_state_follow_each_other(tmp_path, caplog):
    """The second begins while the first trains, and then reads its rounds."""
    calls, second = [], {}

    def generate(seed, budget):
        calls.append(seed)
        return made_by_round(seed, budget)

    def evaluate_again():
        second["outcome"] = track2(generate)(StateFolder(tmp_path))

    other = threading.Thread(target=evaluate_again)

    def begin_the_second(report):
        if not other.ident:
            other.start()
            other.join(1.5)

    first = track2(generate)(StateFolder(tmp_path), begin_the_second)
    other.join()
    assert same(first, second["outcome"]) and len(calls) == 2
    assert "another process that makes the same evaluation" in caplog.text


def test_settings_of_numpy_are_recorded_as_plain_numbers():
    settings = EvaluationSettings(rounds=np.int64(2), epochs_setting=np.int32(3), seed=np.int64(1))
    assert [type(value) for value in (settings.rounds, settings.epochs_setting, settings.seed)] == [int] * 3


def test_images_that_cannot_be_trained_on_are_refused_and_not_kept(tmp_path):
    def generate(seed, budget):
        made = made_by_round(seed, budget)
        return dataclasses.replace(made, labels=made.labels.float())

    with pytest.raises(InvalidSubmissionError, match="float32 labels"):
        track2(generate)(StateFolder(tmp_path))
    assert not list(tmp_path.rglob("*.pt"))


def pixels_by_round(seed, budget):
    return Generated(*blobs(12, seed=seed % 1000), 1.0)


def test_a_generator_of_pixels_scores_as_one_of_their_normalized_floats(tmp_path):
    def floats_by_round(seed, budget):
        made = pixels_by_round(seed, budget)
        return dataclasses.replace(made, images=normalize(made.images, SPEC))

    whole = track2(floats_by_round)()
    assert same(track2(pixels_by_round)(), whole)
    assert same(track2(pixels_by_round)(StateFolder(tmp_path)), whole)


@pytest.mark.slow
def test_a_gpus_memory_is_free_before_the_next_generator_runs(gpu):
    released = []

    def generate(seed, budget):
        released.append(gpu.released)
        assert not [run for run in gc.get_objects() if type(run) is TrainingRun and run._engine is not None]
        return pixels_by_round(seed, budget)

    track2(generate, device="cuda")()
    assert len(released) == 2 and released[1] > released[0]


@pytest.mark.slow
def test_an_evaluation_on_a_gpu_gives_the_accuracies_of_a_cpu(gpu):
    outcome, on_cpu = (evaluated(device=device, epochs_setting=5) for device in ("cuda", "cpu"))
    assert outcome.mean == pytest.approx(on_cpu.mean, abs=0.05)
    for curve, wanted in zip(outcome.loss_curves, on_cpu.loss_curves, strict=True):
        assert curve == pytest.approx(wanted, abs=0.02)
    assert outcome.device == "NVIDIA Pretended"


@pytest.mark.slow
def test_tensors_that_lie_on_a_gpu_are_evaluated_there(gpu):
    tests = normalize(real_images().images, SPEC), real_images().labels
    here, there = [t.cuda() for t in training_set()], tuple(t.cuda() for t in tests)
    assert evaluate(*here, there, spec=SPEC, epochs_setting=1, rounds=1, device="cuda").test_images == len(tests[1])


@pytest.fixture
def compute_with(gpu, own_cache, tmp_path, monkeypatch):
    """Makes evaluations on the pretended GPU take a plan, as if it had been measured to be the fastest."""
    remembered = tmp_path / "cache" / "_engines.json"
    key = f"NVIDIA Pretended, torch {torch.__version__}, 16 pixels, batches of 256, float32, float32, engines of {_ENGINES}"

    def choose(plan):
        shutil.copytree(own_cache, remembered.parent)
        known = json.loads(remembered.read_text()) if remembered.exists() else {}
        known = {other: value for other, value in known.items() if "Pretended" not in other}
        remembered.write_text(json.dumps(known | {key: vars(plan) | {"seconds": 0.0}}))
        monkeypatch.setenv("DDKIT_CACHE", str(remembered.parent))

    yield choose
    assert [other for other in json.loads(remembered.read_text()) if "Pretended" in other] == [key]


def stop_after(epochs):
    def listen(report):
        if report.done == epochs:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


@pytest.mark.slow
@pytest.mark.parametrize("plan", [
    EnginePlan(), EnginePlan("cuda_graph", channels_last=True), EnginePlan("cuda_graph", chunk=6),
], ids=str)  # fmt: skip
def test_an_evaluation_on_a_second_gpu_is_stopped_and_continued_with_any_engine(gpu, second_gpu, tmp_path, compute_with, plan):
    compute_with(plan)
    whole, state = evaluated(device=second_gpu), StateFolder(tmp_path / "state", 0.0)
    with pytest.raises(InterruptedRunError):
        evaluated(device=second_gpu, state=state, progress=stop_after(4))
    continued = evaluated(device="cuda:0", state=state)
    for curve, wanted in zip(continued.loss_curves, whole.loss_curves, strict=True):
        assert curve == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "cuda_graph"])
def test_an_epoch_of_an_evaluation_waits_once_for_each_round(gpu, second_gpu, compute_with, kind):
    compute_with(EnginePlan(kind))
    waits = []
    for epochs in (2, 7):
        gpu.reset()
        evaluated(device=second_gpu, epochs_setting=epochs, rounds=3)
        waits.append(gpu.waits_in_all)
    assert waits[1] - waits[0] == 5 * 3, gpu.waits


def test_dry_run_of_an_evaluation_measures_the_gpu_asked_for(gpu, second_gpu, compute_with):
    compute_with(EnginePlan())
    settings = EvaluationSettings(device=second_gpu, rounds=2)
    found = estimate_evaluation(
        FixedSet(*training_set()), "blobs.pt", as_test_set(real_images(), SPEC), settings, tried_seconds=0.1
    )
    assert (found.memory, found.free_memory) == (2 * 2**20, 70 * 2**30) and found.seconds > 0


@pytest.mark.slow
def test_an_evaluation_on_a_gpu_with_little_memory_computes_in_smaller_chunks(gpu, compute_with, caplog):
    compute_with(EnginePlan("cuda_graph"))
    plenty = evaluated(device="cuda")
    gpu.largest_tensor = 8 * 128 * 16 * 16 * 4  # bytes of the first maps of eight images
    short = evaluated(device="cuda")
    for curve, wanted in zip(short.loss_curves, plenty.loss_curves, strict=True):
        assert curve == pytest.approx(wanted, abs=1e-3)
    assert "Not enough memory: computing 8 images at a time" in caplog.text
    gpu.largest_tensor = 1000
    with pytest.raises(ComputeError, match="not enough memory") as caught:
        evaluated(device="cuda")
    assert caught.value.remedy == "Choose another --device."


@pytest.mark.slow
def test_tf32_products_are_not_switched_on_and_are_a_deviation(gpu):
    outcome = evaluated(device="cuda", epochs_setting=1, rounds=1)
    assert torch.get_float32_matmul_precision() == "highest" and torch.backends.cudnn.allow_tf32
    assert not any("TF32" in deviation for deviation in outcome.deviations)
    # PyTorch's newer way to switch them on; what it says of the older way is an error then.
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        outcome = evaluated(device="cuda", epochs_setting=1, rounds=1)
    finally:
        products.fp32_precision = before
    assert "matrix products in TF32 instead of float32" in outcome.deviations


MEASURE = """
import resource, sys, torch
from pathlib import Path
from ddkit.challenge import TINYIMAGENET
from ddkit.evaluation.sources import TimedGenerator
from ddkit.evaluation.tracks import Generated
from ddkit.network.networks import build_network
from ddkit.network.plan import EnginePlan
from ddkit.network.training import TrainingRun, TrainingSettings
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def train(images, labels):
    network = build_network("convnet", 200, 64, seed=0)
    settings = TrainingSettings(0, batch_size=8)
    run = TrainingRun(network, images, labels, settings, torch.Generator(), EnginePlan("plain", chunk=8), TINYIMAGENET)
    steps = run.steps()
    for _ in range(3):
        next(steps)
train(torch.zeros(32, 3, 64, 64, dtype=torch.uint8), torch.arange(32))
before = peak()
def generate(seed, budget):
    return Generated(torch.full((20_000, 3, 64, 64), 7, dtype=torch.uint8), torch.arange(20_000) % 200, 1.0)
kept = Path(sys.argv[1], "images.pt")
for _ in range(2):  # made, and continued with
    made = TimedGenerator(generate, "entry", 600.0, TINYIMAGENET).for_round(0, kept)
    train(made.images, made.labels)
print((peak() - before) / made.images.nbytes)
"""


@pytest.mark.slow
def test_pixels_of_a_generator_take_their_own_size_in_memory(tmp_path):
    finished = processes.run("-c", MEASURE, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) < 1.2


def test_generator_on_track_1_raises_usage_error():
    with pytest.raises(UsageError, match="track 2"):
        evaluate_generator(made_by_round, as_test_set(real_images(), SPEC), EvaluationSettings(), name="entry")


@pytest.mark.parametrize(
    "options",
    [{"rounds": 0}, {"epochs_setting": -1}, {"network": "convent"}, {"precision": "float16"}, {"track": 3}, {"time_budget": 5},
     {"rounds": 1.5}, {"epochs_setting": 1.5}, {"seed": -1}, {"seed": 2**31}, {"seed": "a"}],
)  # fmt: skip
def test_settings_out_of_range_raise_usage_error(options):
    with pytest.raises(UsageError):
        EvaluationSettings(**{"rounds": 2, "epochs_setting": 3, **options})


@pytest.mark.parametrize("change, said", [
    (lambda images, labels: (images[:, :, :8], labels), "shape"),
    (lambda images, labels: ((images * 50).to(torch.int16), labels), "torch.int16"),
    (lambda images, labels: (images, labels.float()), "labels"),
    (lambda images, labels: (images, labels[:-1]), "labels"),
    (lambda images, labels: (images, labels + 1), "0 ... 3"),
    (lambda images, labels: (images.index_fill(0, torch.tensor([2]), torch.inf), labels), "NaN or infinite"),
    (lambda images, labels: (images[:0], labels[:0]), "labels"),
])  # fmt: skip
def test_unusable_training_set_raises(change, said):
    with pytest.raises(InvalidSubmissionError, match=said):
        evaluate(*change(*training_set()), real_images(), spec=SPEC, epochs_setting=0)


@pytest.mark.parametrize("change, said", [
    (lambda images, labels: (images[:, :, :8], labels), "shape"),
    (lambda images, labels: (images * 0.25 + 0.5, labels), "not normalized"),
    (lambda images, labels: (images, labels + 1), "labels from 1 to 4"),
    (lambda images, labels: (images, labels[1:]), "labels of shape"),
    (lambda images, labels: {"images": images, "labels": labels}, "images_val"),
])  # fmt: skip
def test_unusable_reference_raises(change, said):
    pixels = real_images()
    reference = change(normalize(pixels.images, SPEC), pixels.labels)
    with pytest.raises(BadDataError, match=said):
        evaluate(*training_set(), reference, spec=SPEC, epochs_setting=0)


def test_built_in_datasets_are_recognized_by_classes_and_size():
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    tests = ImageSet(images, torch.arange(10), tuple("abcdefghij"))
    assert as_test_set(tests).spec == GLYPHS
    with pytest.raises(UsageError, match="spec="):
        as_test_set(real_images())
    assert as_test_set(as_test_set(real_images(), SPEC)).spec == SPEC


def test_images_in_bfloat16_are_evaluated(tmp_path):
    images, labels = training_set()
    tests, state = real_images(), StateFolder(tmp_path)
    assert evaluate(images.bfloat16(), labels, tests, spec=SPEC, epochs_setting=1, rounds=1, state=state).rounds == 1


def test_states_of_different_gpus_have_the_same_name():
    source, tests = FixedSet(*training_set()), as_test_set(real_images(), SPEC)
    keys = {_key(source, tests, RoundSettings("convnet", TrainingSettings(3), 0, device))
            for device in ("cuda", "cuda:0", "cuda:1")}  # fmt: skip
    assert len(keys) == 1 and _key(source, tests, RoundSettings("convnet", TrainingSettings(3), 0, "cpu")) not in keys
