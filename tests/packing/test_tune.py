"""Trials of steps and guidance: kept, compared, drawn and used."""

import json

import pytest
from PIL import Image

from ddkit.errors import BadFileError, MissingDataError, UsageError
from ddkit.evaluation.evaluate import EvaluationSettings
from ddkit.generator.model_folder import model_hash
from ddkit.packing.bundle import EntryModel
from ddkit.packing.tune import Grid, Trial, _append, best_of, draw_chart, explore, lead, read_trials, tuned
from ddkit.runtime.device import describe_device, resolve_device


def trial(steps, *accuracies, guidance=1.0, **changes):
    settings = {"dataset": "colors", "model_sha256": "of-it", "sampler": "dpm++", "budget": 60.0, "epochs_setting": 20,
                "seed": 0, "device": "cpu", "images": (800 // steps,) * len(accuracies),
                "seconds": (57.0,) * len(accuracies)}  # fmt: skip
    return Trial(steps=steps, guidance=guidance, accuracies=accuracies, **(settings | changes))


def test_a_grid_is_all_combinations():
    assert Grid((2, 4), (1.0, 3.0)).points == ((2, 1.0), (2, 3.0), (4, 1.0), (4, 3.0))
    for wrong in ({"steps": ()}, {"steps": (0,)}, {"guidance": (-1.0,)}, {"evaluation": EvaluationSettings(track=1)}):
        with pytest.raises(UsageError):
            Grid(**wrong)


def test_trials_are_kept_line_by_line_and_a_torn_one_is_left_out(tmp_path):
    path = tmp_path / "deep" / "trials.jsonl"
    assert read_trials(path) == []
    _append(trial(4, 0.2, 0.3), path)
    _append(trial(8, 0.4, 0.3, guidance=2.0), path)
    path.write_text(path.read_text() + '{"dataset": "colo')
    assert read_trials(path) == [trial(4, 0.2, 0.3), trial(8, 0.4, 0.3, guidance=2.0)]
    assert trial(4, 0.2).conditions != trial(4, 0.2, device="another").conditions
    path.write_text('{"dataset": "colors"}\n')
    with pytest.raises(BadFileError, match="line 1"):
        read_trials(path)


def test_the_best_is_named_with_how_sure_that_is():
    trials = [trial(4, 0.20, 0.22), trial(8, 0.40, 0.42), trial(16, 0.301, 0.319)]
    assert best_of(trials).steps == 8
    comparison = lead(trials)
    assert comparison.difference == pytest.approx(0.1) and comparison.exceeds_noise
    assert best_of([trial(16, 0.3), trial(4, 0.3)]).steps == 4  # as good, and cheaper
    assert lead([trial(4, 0.3), trial(8, 0.2)]) is None and lead(trials[:1]) is None


def test_what_was_tried_is_not_tried_again(colors, colors_model, tmp_path):
    """Nothing is run: the test set, which every trial needs, is none."""
    settings = EvaluationSettings(track=2, rounds=2, epochs_setting=3, time_budget=30.0)
    grid = Grid((2, 4), (1.0,), settings)
    here = describe_device(resolve_device("auto"))
    kept = {"model_sha256": model_hash(colors_model), "budget": 30.0, "epochs_setting": 3, "device": here}
    done = [trial(2, 0.5, 0.6, **kept), trial(4, 0.7, 0.8, **kept)]
    for one in (*done, trial(8, 0.9, 0.9, **kept), trial(4, 0.1, 0.1, **(kept | {"budget": 31.0}))):
        _append(one, tmp_path / "trials.jsonl")
    model = EntryModel(colors, colors_model)
    assert explore(model, None, grid, tmp_path / "trials.jsonl") == tuple(done)
    best = tuned(model, tmp_path / "trials.jsonl").settings.sampling.steps
    assert best == 8, "what was asked for last counts, though it was known"


def test_the_best_of_the_latest_conditions_is_packed(colors, colors_model, tmp_path):
    path, model = tmp_path / "trials.jsonl", EntryModel(colors, colors_model)
    _append(trial(2, 0.99), path)  # of another model
    with pytest.raises(MissingDataError, match="ddkit tune colors"):
        tuned(model, path)
    sha256 = model_hash(colors_model)
    for one in (trial(32, 0.9, model_sha256=sha256, budget=600.0), trial(4, 0.3, model_sha256=sha256),
                trial(8, 0.5, guidance=1.5, sampler="dpm++", model_sha256=sha256)):  # fmt: skip
        _append(one, path)
    sampling = tuned(model, path).settings.sampling
    assert (sampling.steps, sampling.guidance) == (8, 1.5)


def test_the_chart_is_a_picture(tmp_path):
    draw_chart([trial(4, 0.2, 0.3), trial(8, 0.4, 0.5), trial(4, 0.1, 0.1, guidance=2.0)], tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.format == "PNG" and picture.width > 400 and len(picture.convert("L").getcolors()) > 10


@pytest.mark.parametrize("line", [b'{"accuracies": []}', b'{"steps": "two"}', b"[1]"])
def test_lines_that_are_no_trials_are_named(tmp_path, line):
    path = tmp_path / "trials.jsonl"
    _append(trial(4, 0.2, 0.3), path)
    whole = json.loads(path.read_text())
    change = json.loads(line)
    path.write_text(json.dumps(whole | change if isinstance(change, dict) else change) + "\n")
    with pytest.raises(BadFileError, match="line 1"):
        read_trials(path)


def test_a_line_torn_within_a_letter_is_left_out(tmp_path):
    path = tmp_path / "trials.jsonl"
    _append(trial(4, 0.2, 0.3), path)
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    assert read_trials(path) == [trial(4, 0.2, 0.3)]
