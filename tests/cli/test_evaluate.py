"""`ddkit evaluate` on a small dataset of the user's own, as people call it."""

import json
import os
import signal

import processes
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ddkit.cli import main
from ddkit.cli.evaluate import _verdict
from ddkit.data.images import normalize
from ddkit.data.prepare import prepare
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.evaluation.job import JobOutcome
from ddkit.results import Result, read
from ddkit.sets.distilled import save_set

COLORS = {"blue": (40, 60, 210), "green": (40, 200, 60), "red": (210, 50, 40), "yellow": (200, 190, 40)}
QUICK = ("--epochs-setting", "4", "--rounds", "2")


@pytest.fixture(scope="session")
def blobs_cache(tmp_path_factory):
    """A cache in which a dataset `blobs` of four colors, 16 pixels, is prepared."""
    folder, cache = tmp_path_factory.mktemp("blobs"), tmp_path_factory.mktemp("blobs-cache")
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 10)):
        for name, color in COLORS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(-40, 40, (16, 16, 3), generator=random)
                pixels = (torch.tensor(color) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / f"{index:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDKIT_CACHE", str(cache))
        prepare("blobs", folder)
    return cache


@pytest.fixture
def work(tmp_path, blobs_cache, monkeypatch):
    """An empty working folder with blobs at hand."""
    monkeypatch.setenv("DDKIT_CACHE", str(blobs_cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(path, start=0, mistaken=0, **facts):
    """A set of two real images a class from `start` on. mistaken: how many of the two are of the next class."""
    real, spec = load_dataset("blobs", "train"), dataset_spec("blobs")
    chosen = real.images.unflatten(0, (4, -1))[:, start : start + 2].clone()
    chosen[:, :mistaken] = chosen[:, :mistaken].roll(1, 0)
    images = normalize(chosen.flatten(0, 1), spec)
    save_set(path, images, spec, facts)
    return str(path)


def run(*arguments, status=0):
    """The command in this process: what it wrote to standard output, and what to standard error."""
    finished = CliRunner().invoke(main, ["evaluate", *arguments])
    assert finished.exit_code == status, finished.output
    return finished.stdout, finished.stderr


def start(*arguments):
    return processes.start("-m", "ddkit", "evaluate", *arguments)


@pytest.mark.slow
def test_without_arguments_the_sets_in_submission_are_evaluated(work):
    save(work / "submission" / "blobs.pt")
    output, errors = run("--json", *QUICK)
    (result,) = json.loads(output)["results"]
    assert (result["name"], result["dataset"], len(result["accuracies"])) == ("submission", "blobs", 2)
    assert result["kind"] == "submission" and result["official"] is False and len(result["per_class"]) == 4
    assert "2 rounds of 5 epochs" in errors and "10/10 epochs" in errors and "next: ddkit check" in errors
    (kept,) = read(work / "runs" / "results.jsonl").results
    assert list(kept.accuracies) == result["accuracies"]
    (work / "submission" / "cifar100.pt").write_bytes(b"not a set")
    output, _ = run("--json", *QUICK, "--dataset", "blobs")
    assert [each["dataset"] for each in json.loads(output)["results"]] == ["blobs"]


def test_second_run_repeats_nothing_and_records_nothing_twice(work):
    path = save(work / "blobs.pt")
    first, _ = run(path, *QUICK, "--json")
    again, _ = run(path, *QUICK, "--json")
    assert json.loads(again)["results"][0]["seconds"] == json.loads(first)["results"][0]["seconds"]
    run(path, "--epochs-setting", "4", "--rounds", "3")
    assert [result.rounds for result in read("runs/results.jsonl").results] == [2, 3]


def test_gpu_that_is_not_there_or_that_another_process_has_is_one_message(gpu, work):
    path = save(work / "blobs.pt")
    _, said = run(path, *QUICK, "--device", "cuda:1", status=3)
    assert "There is no GPU 'cuda:1': PyTorch can use only cuda:0 here." in said and "Try --device cuda:0" in said
    gpu.driver = "busy"
    _, said = run(path, *QUICK, "--device", "cuda", status=3)
    assert "The GPU is busy: another process has it for itself." in said and "choose another --device" in said
    assert "bug" not in said and not (work / "runs" / "results.jsonl").exists()


def test_set_of_real_images_is_recorded_as_a_baseline(work):
    run(save(work / "blobs.pt", kind="random-real", seed=3), *QUICK)
    (result,) = read("runs/results.jsonl").results
    assert result.kind == "random-real" and result.made_by["seed"] == 3


def test_two_sets_are_compared_round_by_round(work):
    first, second = save(work / "a" / "blobs.pt"), save(work / "b" / "blobs.pt", start=5)
    output, _ = run(first, second, *QUICK, "--json")
    data = json.loads(output)
    (comparison,) = data["comparisons"]
    accuracies = [result["accuracies"] for result in data["results"]]
    assert [comparison[name] for name in ("dataset", "first", "second")] == ["blobs", str(first), str(second)]
    assert data["scores"] == {}  # no official results
    assert comparison["paired"] and comparison["differences"] == pytest.approx(
        [a - b for a, b in zip(*accuracies, strict=True)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistaken", "verdict"),
    [(0, "{better} and {worse} differ by {numbers}, which does not exceed the noise."),
     (1, "{better} is better than {worse} by {numbers}.")],
)  # fmt: skip
def test_comparison_says_if_a_difference_exceeds_the_noise(work, mistaken, verdict):
    save(work / "a" / "blobs.pt")
    save(work / "b" / "blobs.pt", start=5, mistaken=mistaken)
    options = ("a/blobs.pt", "b/blobs.pt", "--epochs-setting", "1", "--rounds", "4")
    (comparison,) = json.loads(run(*options, "--json")[0])["comparisons"]
    low, high = comparison["interval"]
    numbers = (
        f"{abs(100 * comparison['difference']):.2f} ± {50 * (high - low):.2f} points (95 %, 4 paired rounds, "
        f"p = {comparison['p_value']:.2g})"
    )
    shown = " ".join(run(*options)[0].split())
    better, worse = sorted(options[:2], reverse=comparison["difference"] < 0)
    assert verdict.format(better=better, worse=worse, numbers=numbers) in shown


@pytest.mark.parametrize("second, said", [
    ((0.0, 0.0, 0.0), "a.pt is better than b.pt by 100.00 points in each of 3 paired rounds: the difference does not vary"),
    ((1.0, 1.0, 1.0), "a.pt is as good as b.pt in each of 3 paired rounds: the difference does not vary"),
])  # fmt: skip
def test_verdict_on_rounds_that_do_not_vary_gives_no_interval(second, said):
    a, b = (
        Result(name=name, source=f"{name}.pt", dataset="blobs", track=1, sha256=name, images=4, images_per_class=(2, 2),
               epochs_setting=1, accuracies=accuracies)
        for name, accuracies in (("a", (1.0, 1.0, 1.0)), ("b", second))
    )  # fmt: skip
    ((first, other, comparison),) = JobOutcome((a, b)).comparisons
    shown = _verdict(first, other, comparison)
    assert said in shown and "noise" not in shown and "±" not in shown


def test_all_sets_are_checked_before_the_first_is_trained_on(work):
    good, bad = save(work / "a" / "blobs.pt"), save(work / "b" / "blobs.pt")
    torch.save(torch.zeros(3), bad)
    _, errors = run(good, bad, *QUICK, status=1)
    assert "b/blobs.pt" in errors and "Evaluating" not in errors
    assert read("runs/results.jsonl").results == ()


@pytest.mark.slow
def test_each_result_is_recorded_before_the_next_set_begins(work):
    first, second = save(work / "a" / "blobs.pt"), save(work / "b" / "blobs.pt", start=2)
    process = start(first, second, "--epochs-setting", "70", "--rounds", "1")
    for line in process.stderr:
        if "Evaluating" in line and "b/blobs.pt" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert process.returncode == 130
    (kept,) = read("runs/results.jsonl").results
    assert kept.source == first


def test_contradicting_options_exit_with_status_2_before_training(work):
    real = save(work / "blobs.pt", kind="random-real")
    _, errors = run(real, *QUICK, "--time-budget", "30s", status=2)
    assert "A time budget needs track 2" in errors
    torch.save(torch.zeros(1000, 3, 32, 32), "cifar100.pt")
    _, errors = run(real, "cifar100.pt", *QUICK, "--reference", "blobs_test.pt", status=2)
    assert "the sets are for blobs and cifar100" in " ".join(errors.split())
    assert not (work / "runs" / "results.jsonl").exists()


@pytest.mark.slow
def test_the_reasons_for_not_being_official_are_shown(work):
    shown, errors = run(save(work / "blobs.pt"), *QUICK, "--no-augment", "--precision", "bfloat16")
    shown = " ".join(shown.split())
    assert "Not official: " in shown and "no augmentation" in shown and "bfloat16 instead of float32" in shown
    assert "next: ddkit report" in errors  # it is not in the submission folder


def test_dataset_option_names_the_dataset_of_any_file(work):
    path = work / "mine.pt"
    save(path)
    path.with_suffix(".json").unlink()
    _, errors = run(str(path), *QUICK, status=2)
    assert "not named after a known dataset" in errors and "--dataset NAME" in errors
    (work / "mine.zip").write_bytes(b"")
    assert "mine.zip is a zip" in run("mine.zip", *QUICK, status=2)[1]
    run(str(path), "--dataset", "blobs", *QUICK)


def test_reference_file_replaces_the_prepared_test_set(work):
    tests, spec = load_dataset("blobs", "test"), dataset_spec("blobs")
    reference = {"images_val": normalize(tests.images, spec), "labels_val": tests.labels}
    torch.save(reference, "blobs_test.pt")
    path = save(work / "blobs.pt")
    outputs = [run(path, *QUICK, "--json", *more)[0] for more in ((), ("--reference", "blobs_test.pt"))]
    accuracies = [json.loads(output)["results"][0]["accuracies"] for output in outputs]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("content, said", [
    (b"no such thing", "cannot be read as a reference file"),
    ({"images": torch.zeros(4, 3, 16, 16)}, "images_val"),
    ({"images_val": torch.rand(4, 3, 16, 16), "labels_val": torch.arange(4)}, "not normalized"),
    ({"images_val": torch.randn(4, 3, 32, 32), "labels_val": torch.arange(4)}, "shape"),
    ({"images_val": torch.randn(4, 3, 16, 16), "labels_val": torch.arange(4) + 1}, "labels from 1 to 4"),
])  # fmt: skip
def test_unusable_reference_is_named(work, content, said):
    if isinstance(content, bytes):
        (work / "bad_test.pt").write_bytes(content)
    else:
        torch.save(content, "bad_test.pt")
    _, errors = run(save(work / "blobs.pt"), "--reference", "bad_test.pt", status=3)
    assert "bad_test.pt" in errors and said in errors
    assert not (work / "runs").exists()


def test_set_that_check_refuses_is_refused_with_the_same_message(work):
    path = save(work / "blobs.pt")
    broken = torch.load(path, weights_only=True)
    broken[3, 0, 0, 0] = torch.nan
    torch.save(broken, path)
    _, errors = run(path, *QUICK, status=1)
    checked = CliRunner().invoke(main, ["check", path, "--ipc", "2", "--json"])
    messages = [finding["message"] for finding in json.loads(checked.stdout)["findings"]]
    assert any(message in errors for message in messages)


@pytest.mark.parametrize("arguments, status, said", [
    ((), 3, "There is no .pt file in submission/"),
    (("--dataset", "blobs"), 3, "There is no blobs.pt in submission/"),
    (("--dataset", "blob"), 2, "Did you mean 'blobs'?"),
    (("missing.pt",), 3, "missing.pt does not exist"),
    (("blobs.pt", "missing.pt"), 3, "missing.pt does not exist"),
    ((".",), 2, ". is a folder"),
    (("--rounds", "0"), 2, "--rounds"),
    (("--track", "3"), 2, "--track"),
])  # fmt: skip
def test_mistake_gives_a_message_and_a_status(work, arguments, status, said):
    save(work / "blobs.pt")
    _, errors = run(*arguments, status=status)
    assert said in errors and "Evaluating" not in errors


def test_unknown_network_exits_with_the_nearest_name(work):
    _, errors = run(save(work / "blobs.pt"), "--network", "resnet_18", status=2)
    assert "Did you mean 'resnet18'?" in errors


def test_torn_line_of_results_is_kept_reported_and_followed(work):
    (work / "runs").mkdir()
    results = work / "runs" / "results.jsonl"
    results.write_bytes(b'{"format": 99}\n{"name": "torn')
    _, errors = run(save(work / "blobs.pt"), *QUICK)
    assert "line 1" in errors and "line 2" in errors
    assert results.read_bytes().startswith(b'{"format": 99}\n{"name": "torn\n')
    assert len(read(results).results) == 1


@pytest.mark.slow
def test_interrupted_command_continues_when_run_again(work):
    path = save(work / "blobs.pt")
    arguments = (path, "--epochs-setting", "30", "--rounds", "2", "--save-every", "0.01s", "--state", "states")
    process = start(*arguments)
    for line in process.stderr:
        if "training on blobs" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Run the same command again" in errors and "Error" not in errors
    assert not os.path.exists("runs/results.jsonl")
    continued, _ = run(*arguments, "--json")
    undisturbed, _ = run(path, "--epochs-setting", "30", "--rounds", "2", "--state", "other", "--json")
    first, second = (json.loads(output)["results"][0] for output in (continued, undisturbed))
    assert first["accuracies"] == second["accuracies"] and first["loss_curves"] == second["loss_curves"]


SCRIPT = """
import argparse, pathlib, shutil
parser = argparse.ArgumentParser()
for name in ("dataset", "out", "time-budget", "seed", "device"):
    parser.add_argument(f"--{name}")
arguments = parser.parse_args()
shutil.copy(pathlib.Path(__file__).with_name(f"{int(arguments.seed) % 2}.pt"), arguments.out)
"""


@pytest.mark.slow
def test_track_2_runs_the_entry_for_each_round(work):
    (work / "entry").mkdir()
    (work / "entry" / "generate.py").write_text(SCRIPT)
    labels = torch.arange(4).repeat(3)
    levels = torch.tensor([[-1.0, -1, 1], [-1, 1, -1], [1, -1, -1], [1, 1, -1]])
    for number in range(2):
        noise = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(number)) / 5
        images = levels[labels][:, :, None, None] + noise
        torch.save({"images": images, "labels": labels}, work / "entry" / f"{number}.pt")
    output, errors = run("entry/generate.py", "--dataset", "blobs", "--track", "2", *QUICK, "--time-budget", "2m", "--json")
    (result,) = json.loads(output)["results"]
    assert result["track"] == 2 and result["images"] == 12 and len(result["generation_seconds"]) == 2
    assert "a time budget of 120 s instead of 600 s" in result["deviations"]
    assert "generating" in errors
    assert result["mean"] > 0.5  # its colors are those of the classes


def published(path, count=3, way=lambda pixels: pixels / 255):
    """A list of real images, in [0, 1], and labels in no order, with `count` images for the last class and 3 for the others."""
    real = load_dataset("blobs", "train")
    rows = torch.cat([torch.arange(label * 12, label * 12 + (count if label == 3 else 3)) for label in range(4)]).flip(0)
    torch.save([way(real.images[rows]), real.labels[rows]], path)
    return str(path)


def test_published_set_is_converted_and_evaluated_and_not_official(work):
    path = published(work / "DM_result.pt")
    _, errors = run(path, *QUICK, status=2)
    assert "--dataset NAME" in errors
    output, errors = run(path, "--dataset", "blobs", *QUICK, "--json")
    (result,) = json.loads(output)["results"]
    assert result["name"] == "DM_result" and result["images"] == 12 and result["images_per_class"] == [3, 3]
    (why,) = [text for text in result["deviations"] if text.startswith("converted from")]
    assert "a list of images and labels" in why and "[0, 1]" in why
    said = " ".join(errors.split())
    assert "holds a list of images and labels" in said and "[0, 1]" in said and "converted to the challenge's" in said
    listed = CliRunner().invoke(main, ["report"], env={"COLUMNS": "200"}).stdout
    assert "converted from a list of images and labels" in " ".join(listed.split())
    again, _ = run(published(work / "DM_result.pt", way=lambda x: x), "--dataset", "blobs", *QUICK, "--json")
    assert json.loads(again)["results"][0]["accuracies"] == pytest.approx(result["accuracies"], abs=0.1)


def test_published_set_in_two_files_is_named_after_its_folder(work):
    """The two files have the same names in every project."""
    real = load_dataset("blobs", "train")
    (work / "DATM").mkdir()
    torch.save(real.images[::12] / 255, work / "DATM" / "images_best.pt")
    torch.save(real.labels[::12], work / "DATM" / "labels_best.pt")
    output, _ = run("DATM/images_best.pt", "--dataset", "blobs", *QUICK, "--json")
    assert json.loads(output)["results"][0]["name"] == "DATM"


def test_published_set_with_unequal_classes_is_evaluated(work):
    output, _ = run(published(work / "blobs.pt", count=7), *QUICK, "--json")
    assert json.loads(output)["results"][0]["images_per_class"] == [3, 7]


def test_folder_of_images_is_evaluated(work):
    real = load_dataset("blobs", "train")
    for row in range(0, 48, 6):
        folder = work / "theirs-0.1" / real.class_names[int(real.labels[row])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(real.images[row].permute(1, 2, 0).numpy()).save(folder / f"{row}.png")
    output, errors = run("theirs-0.1", "--dataset", "blobs", *QUICK, "--json")
    (result,) = json.loads(output)["results"]
    assert result["images"] == 8 and result["name"] == "theirs-0.1"
    assert "converted from a folder of <class>/<image>" in result["deviations"] and "8-bit pixels" in errors


def test_soft_labels_are_refused_unless_reduced(work):
    real = load_dataset("blobs", "train")
    soft = torch.full((4, 4), 0.1).fill_diagonal_(0.7)
    torch.save({"images": real.images[::12], "labels": soft}, "blobs.pt")
    _, errors = run("blobs.pt", *QUICK, status=1)
    assert "soft labels" in errors and "--argmax" in errors
    run("blobs.pt", "--argmax", *QUICK)


def test_check_and_pack_still_refuse_a_published_set(work):
    (work / "submission").mkdir()
    path = published(work / "submission" / "blobs.pt")
    checked = CliRunner().invoke(main, ["check", path, "--ipc", "3", "--json"])
    assert checked.exit_code == 1 and "T001" in checked.stdout
    assert CliRunner().invoke(main, ["pack"]).exit_code == 1


@pytest.mark.slow
def test_dry_run_says_time_memory_and_if_it_is_official_and_records_nothing(work, short_measurements):
    path = save(work / "blobs.pt")
    shown, _ = run(path, "--dry-run", *QUICK)
    shown = " ".join(shown.split())
    assert "2 of 5" in shown and "GiB" in shown and "E = 4 instead of 1000" in shown
    (estimate,) = json.loads(run(path, "--dry-run", *QUICK, "--json")[0])
    assert estimate["official"] is False and estimate["seconds"] > 0 and estimate["images"] == 8
    assert not (work / "runs" / "results.jsonl").exists()
    _, errors = run(path, "--dry-run", "--track", "2", status=2)
    assert "--dry-run needs --track 1" in errors
    _, errors = run(path, "--dry-run", "--ranking", status=2)
    assert "Leave --ranking out" in errors


def test_tensor_on_track_2_exits_with_status_2(work):
    _, errors = run(save(work / "blobs.pt"), "--track", "2", status=2)
    assert "generate.py" in errors


def test_help_names_every_network():
    from ddkit.network.networks import NETWORKS

    shown = " ".join(CliRunner().invoke(main, ["evaluate", "--help"]).stdout.split())
    assert all(name in shown for name in NETWORKS)
