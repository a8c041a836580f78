"""Trials of sampling settings: searched by halving, saved, compared, drawn and used."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ddkit.errors import MissingDataError, UsageError
from ddkit.evaluation.evaluate import EvaluationSettings
from ddkit.generator.model_facts import model_hash
from ddkit.packing.bundle import BundleModel
from ddkit.packing.tune import (
    Candidate,
    Search,
    Trial,
    _append,
    best_of,
    draw_chart,
    evidence,
    read_trials,
    run_search,
    tune,
    with_best_settings,
)
from ddkit.runtime.device import describe_device, resolve_device

PRECISION = BundleModel("any", Path()).settings.sampling.precision


def trial(steps, *accuracies, guidance=1.0, **changes):
    settings = {"dataset": "colors", "model_sha256": "of-it", "sampler": "dpm++", "budget": 60.0, "epochs_setting": 20,
                "seed": 0, "device": "cpu", "images": (800 // steps,) * len(accuracies),
                "seconds": (57.0,) * len(accuracies), "images_per_class": None, "precision": "float32", "keep": 1.0,
                "mode_guidance": 0.0}  # fmt: skip
    return Trial(steps=steps, guidance=guidance, accuracies=accuracies, **(settings | changes))


def test_the_candidates_are_all_combinations():
    search = Search((2, 4), (1.0, 3.0), (None, 50), (1.0, 0.5))
    assert len(search.candidates) == 16 and Candidate(2, 3.0, 50, 0.5) in search.candidates
    assert str(Candidate(2, 3.0, 50, 0.5)) == "2 steps, guidance 3, 50 images a class, the most confident 50 %"
    assert str(Candidate(2, 3.0)) == "2 steps, guidance 3"
    guided = Search((2, 4), (1.0,), keep=(1.0,), mode_guidance=(0.0, 0.2))
    assert len(guided.candidates) == 4 and Candidate(4, 1.0, mode_guidance=0.2) in guided.candidates
    assert str(Candidate(4, 1.0, mode_guidance=0.2)) == "4 steps, guidance 1, mode guidance 0.2"
    for wrong in ({"steps": ()}, {"steps": (0,)}, {"guidance": (-1.0,)}, {"images_per_class": (0,)}, {"keep": (0.0,)},
                  {"mode_guidance": (-0.1,)},                  {"evaluation": EvaluationSettings(track=1)}):  # fmt: skip
        with pytest.raises(UsageError):
            Search(**wrong)


def test_each_stage_tries_half_as_many_candidates_with_twice_the_epochs():
    settings = EvaluationSettings(track=2, rounds=3, epochs_setting=20, time_budget=30.0)
    stages = Search((2, 4, 8), (1.0, 2.0, 3.0), keep=(1.0,), evaluation=settings).stages
    assert [count for count, _ in stages] == [9, 5, 3, 2]
    assert [(s.epochs_setting, s.number_of_rounds) for _, s in stages] == [(2, 1), (5, 1), (10, 1), (20, 3)]
    assert Search((2,), (1.0,), keep=(1.0,), evaluation=settings).stages == ((1, settings),)
    assert Search((2, 4, 8), (1.0, 2.0, 3.0), keep=(1.0,), evaluation=settings).longest_generation == (9 + 5 + 3 + 2 * 3) * 30.0


def test_trials_are_kept_line_by_line_and_a_torn_one_is_left_out(tmp_path):
    path = tmp_path / "deep" / "trials.jsonl"
    assert read_trials(path) == []
    _append(trial(4, 0.2, 0.3), path)
    _append(trial(8, 0.4, 0.3, guidance=2.0), path)
    path.write_text(path.read_text() + '{"dataset": "colo')
    assert read_trials(path) == [trial(4, 0.2, 0.3), trial(8, 0.4, 0.3, guidance=2.0)]
    assert trial(4, 0.2).conditions != trial(4, 0.2, device="another").conditions


def test_the_best_is_named_with_how_sure_that_is():
    trials = [trial(4, 0.20, 0.22), trial(8, 0.40, 0.42), trial(16, 0.301, 0.319)]
    assert best_of(trials).steps == 8
    assert "10.00 ± " in evidence(trials) and "exceeds the noise" in evidence(trials)
    assert best_of([trial(16, 0.3), trial(4, 0.3)]).steps == 4  # as good, and cheaper
    assert "single round" in evidence([trial(4, 0.3), trial(8, 0.2)]) and "Nothing else" in evidence(trials[:1])


def test_evidence_of_rounds_with_the_same_difference_gives_no_interval():
    assert "10.00 ± " in evidence([trial(4, 0.20, 0.22), trial(8, 0.301, 0.319)])
    assert "10.00 points better than the next in every round: the" in evidence([trial(4, 0.25, 0.5), trial(8, 0.35, 0.6)])
    assert "as good as the next in every round" in evidence([trial(4, 0.25, 0.5), trial(8, 0.25, 0.5)])


def test_guidance_of_a_model_without_label_dropout_is_not_tried(colors, colors_model, tmp_path):
    facts = json.loads((colors_model / "ddkit.json").read_text())
    (colors_model / "ddkit.json").write_text(json.dumps(facts | {"label_dropout": 0.0}))
    with pytest.raises(UsageError, match="without label dropout.*--guidance 1"):
        tune(BundleModel(colors, colors_model), Search(guidance=(1.0, 2.0)), tmp_path)


def test_a_search_goes_by_the_trials_that_are_there(colors, colors_model, tmp_path):
    """Nothing is run: the test set, which every trial needs, is none."""
    settings = EvaluationSettings(track=2, rounds=2, epochs_setting=8, time_budget=30.0)
    search = Search((2, 4, 8, 16), (1.0,), keep=(1.0,), evaluation=settings)
    here = describe_device(resolve_device("auto"))
    known = {"model_sha256": model_hash(colors_model), "budget": 30.0, "device": here, "precision": PRECISION}
    first = [trial(steps, mean, epochs_setting=4, **known) for steps, mean in ((2, 0.1), (4, 0.4), (8, 0.3), (16, 0.2))]
    last = [trial(4, 0.5, 0.6, epochs_setting=8, **known), trial(8, 0.7, 0.8, epochs_setting=8, **known)]
    path, heard = tmp_path / "trials.jsonl", []
    for one in (*first, *last, trial(16, 0.9, epochs_setting=9, **known)):
        _append(one, path)
    model = BundleModel(colors, colors_model)
    assert run_search(model, None, search, path, on_trial=heard.append) == tuple(last)
    assert heard == [*first, *last]
    best = with_best_settings(model, path).settings.sampling.steps
    assert best == 8, "the conditions of the last search count, though its trials were known"


def test_the_best_of_the_latest_conditions_is_packed(colors, colors_model, tmp_path):
    path, model = tmp_path / "trials.jsonl", BundleModel(colors, colors_model)
    _append(trial(2, 0.99), path)  # of another model
    with pytest.raises(MissingDataError, match="ddkit tune colors"):
        with_best_settings(model, path)
    sha256 = model_hash(colors_model)
    for one in (trial(32, 0.9, model_sha256=sha256, budget=600.0), trial(4, 0.3, model_sha256=sha256, precision="bfloat16"),
                trial(8, 0.5, guidance=1.5, sampler="dpm++", model_sha256=sha256, images_per_class=50,
                      keep=0.25, mode_guidance=0.2, precision="bfloat16")):  # fmt: skip
        _append(one, path)
    settings = with_best_settings(model, path).settings
    assert (settings.sampling.steps, settings.sampling.guidance, settings.sampling.mode_guidance) == (8, 1.5, 0.2)
    assert (settings.images_per_class, settings.keep, settings.sampling.precision) == (50, 0.25, "bfloat16")


def test_the_best_of_an_unfinished_search_is_taken_with_a_word(colors, colors_model, tmp_path):
    path, model, heard = tmp_path / "trials.jsonl", BundleModel(colors, colors_model), []
    settings = EvaluationSettings(track=2, rounds=1, epochs_setting=8, time_budget=30.0)
    made = {"model_sha256": model_hash(colors_model), "budget": 30.0, "epochs_setting": 8, "precision": PRECISION,
            "device": describe_device(resolve_device("auto"))}  # fmt: skip
    _append(trial(4, 0.5, **made, trials_left=1), path)
    assert with_best_settings(model, path, on_event=heard.append).settings.sampling.steps == 4
    assert len(heard) == 1 and "1 trial left" in heard[0] and "ddkit tune again" in heard[0]
    run_search(model, None, Search((4,), (1.0,), keep=(1.0,), evaluation=settings), path)  # a smaller one, which is finished
    with_best_settings(model, path, on_event=heard.append)
    assert len(heard) == 1


def test_tune_works_without_test_images(colors, colors_model, own_cache, tmp_path):
    (own_cache / colors / "test.safetensors").unlink()
    settings = EvaluationSettings(track=2, rounds=1, epochs_setting=8, time_budget=30.0)
    search = Search((2,), (1.0,), keep=(1.0,), evaluation=settings)
    known = trial(2, 0.5, model_sha256=model_hash(colors_model), budget=30.0, epochs_setting=8, precision=PRECISION,
                  device=describe_device(resolve_device("auto")))  # fmt: skip
    _append(known, tmp_path / "colors.jsonl")
    assert tune(BundleModel(colors, colors_model), search, tmp_path) == (known,)


def test_the_chart_is_a_picture(tmp_path):
    draw_chart([trial(4, 0.2, 0.3), trial(8, 0.4, 0.5), trial(4, 0.1, 0.1, guidance=2.0)], tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.format == "PNG" and picture.width > 400 and len(picture.convert("L").getcolors()) > 10


@pytest.mark.parametrize("change", [{"steps": "two"}, {"judged_on": "test images"}])
def test_lines_that_are_not_trials_of_this_version_are_left_out(tmp_path, change):
    path = tmp_path / "trials.jsonl"
    _append(trial(4, 0.2, 0.3), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    _append(trial(8, 0.5), path)
    assert read_trials(path) == [trial(8, 0.5)]
