"""Files evaluated by one call, as a notebook does it."""

import processes
import pytest
import torch

from ddkit.data.images import normalize
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.errors import MissingDataError, UsageError
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
from ddkit.evaluation.job import JobOutcome, JobSettings, evaluate_files
from ddkit.evaluation.published import Conversion
from ddkit.results import read
from ddkit.sets.distilled import save_set

QUICK = EvaluationSettings(rounds=2, epochs_setting=1, device="cpu")


@pytest.fixture
def folder(colors, tmp_path):
    """A submission folder with two images of each class of the small dataset `colors`."""
    real, spec = load_dataset(colors, "train"), dataset_spec(colors)
    images = normalize(real.images.unflatten(0, (2, -1))[:, :2].flatten(0, 1), spec)
    save_set(tmp_path / "submission" / "colors.pt", images, spec, {"method": "first images"})
    return tmp_path / "submission"


@pytest.fixture
def settings(tmp_path):
    return JobSettings(QUICK, results=tmp_path / "results.jsonl", state=StateFolder(tmp_path / "state"))


def with_(settings, **changes):
    return JobSettings(**{**vars(settings), **changes})


@pytest.mark.slow
def test_a_given_name_is_recorded_and_noted_if_another_set_has_it(folder, settings):
    path, events = folder / "colors.pt", []
    named = with_(settings, name="mine")
    evaluate_files([path], named, on_event=events.append)
    evaluate_files([path], named, on_event=events.append)
    assert not any("was used on" in event for event in events)
    torch.save(torch.load(path, weights_only=True).flip(3).contiguous(), path)
    evaluate_files([path], named, on_event=events.append)
    assert any("The name 'mine' was used on" in event for event in events)
    assert {result.name for result in read(settings.results).results} == {"mine"}


@pytest.mark.slow
def test_a_set_that_was_renamed_is_recorded_under_its_new_path_and_again_only_then(folder, settings):
    events = []
    first, second = folder / "colors_refined.pt", folder / "colors.pt"
    second.rename(first)
    settings = with_(settings, dataset="colors")
    for path in (first, first, second):
        if not path.exists():
            first.rename(path)
        evaluate_files([path], settings, on_event=events.append)
    said = [event for event in events if " %, " in event]
    assert [event.endswith("%, recorded.") for event in said] == [True, False, True]
    assert said[1].endswith(f"which {settings.results} holds already.")
    assert [result.source for result in read(settings.results).results] == [str(first), str(second)]


@pytest.mark.slow
def test_without_files_every_set_of_the_folder_is_evaluated(folder, settings):
    torch.save(torch.zeros(3), folder / "notes.pt")
    events = []
    outcome = evaluate_files([], settings, folder=folder, on_event=events.append)
    assert [result.source for result in outcome.results] == [str(folder / "colors.pt")]
    assert any("ignored" in event and "notes.pt" in event for event in events)
    with pytest.raises(MissingDataError, match=r"no \.pt file"):
        evaluate_files([], settings, folder=folder / "nothing")


def test_generators_are_compared_without_pairs(result):
    made = (result("a", "cifar100", 0.3, 0.31, track=2), result("b", "cifar100", 0.2, 0.22, track=2))
    ((*_, comparison),) = JobOutcome(made).comparisons
    assert not comparison.paired and comparison.half_width > 0


def test_the_challenges_score_is_the_mean_of_official_results_on_both_datasets(result):
    cifar100 = result("mine", "cifar100", 0.3, 0.31, 0.32)
    assert JobOutcome((cifar100, result("mine", "tinyimagenet", 0.1, 0.12, 0.11))).scores == {"mine": pytest.approx(0.21)}
    for other in (
        result("other", "tinyimagenet", 0.1, 0.12, 0.11),
        result("mine", "tinyimagenet", 0.1, epochs_setting=50),
        result("mine", "tinyimagenet", 0.1, 0.12, 0.11, kind="random-real"),
    ):
        assert JobOutcome((cifar100, other)).scores == {}


def test_of_two_files_for_a_dataset_the_score_is_of_the_one_that_is_packed_or_there_is_none(result):
    other = result("mine", "tinyimagenet", 0.1, 0.12, 0.11)
    packed = result("mine", "cifar100", 0.3, 0.31, 0.32)
    first, second = (result("mine", "cifar100", value, 0.4, 0.4, source=f"mine/{value}.pt") for value in (0.4, 0.5))
    assert JobOutcome((packed, first, other)).scores == {"mine": pytest.approx(0.21)}
    assert JobOutcome((first, second, other)).scores == {}
    assert JobOutcome((first, other)).scores == {"mine": pytest.approx(0.255)}


@pytest.mark.parametrize("changes, said", [
    ({"evaluation": EvaluationSettings(augment=False), "ranking": True}, "--ranking needs"),
    ({"evaluation": EvaluationSettings(track=2), "ranking": True}, "--ranking needs"),
    ({"full_epochs_setting": 3}, "--full-epochs-setting needs --ranking"),
    ({"evaluation": EvaluationSettings(track=2), "conversion": Conversion(argmax=True)}, "--argmax.* need --track 1"),
    ({"evaluation": EvaluationSettings(track=2), "ignore_codes": ("C001",)}, "--ignore need --track 1"),
])  # fmt: skip
def test_settings_that_exclude_each_other_raise_usage_error(settings, changes, said):
    with pytest.raises(UsageError, match=said):
        with_(settings, **changes)


def test_a_tensor_on_track_2_raises_usage_error(folder, settings):
    with pytest.raises(UsageError, match="generators, not tensors"):
        evaluate_files([folder / "colors.pt"], with_(settings, evaluation=EvaluationSettings(track=2)))


OPENS = """
import sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from ddkit.evaluation.evaluate import EvaluationSettings, StateFolder
from ddkit.evaluation.job import JobSettings, evaluate_files
settings = JobSettings(EvaluationSettings(rounds=1, epochs_setting=0), results=Path("results.jsonl"))
evaluate_files([Path(sys.argv[1])], settings)
print(opened.count(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_set_is_opened_once_to_hash_and_once_to_load_it(folder, tmp_path):
    finished = processes.run("-c", OPENS, folder / "colors.pt", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) <= 2
