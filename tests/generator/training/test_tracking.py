"""Following the Frechet distance during training, and the chart of it."""

import dataclasses

import pytest
from PIL import Image

from ddkit.data.store import load_dataset
from ddkit.generator.config import TRACKING
from ddkit.generator.model_facts import read_facts
from ddkit.generator.sampling import SamplingSettings
from ddkit.generator.training.records import draw_chart, read_records
from ddkit.generator.training.tracking import SCORE_PRECISIONS, track_frechet, track_frechet_in
from ddkit.generator.training.train import TrainingRequest, train

SAMPLING = SamplingSettings(steps=2, batch_size=6)


def mean_colors(images):
    """(N, 3, S, S) uint8 -> (N, 3): features enough for flat colors."""
    return images.float().mean(dim=(2, 3))


def test_tracking_scores_samples_of_the_same_classes(images, make_model):
    calls = []

    def make_features():
        calls.append("made")
        return mean_colors

    tracking = track_frechet(images, make_features, every_steps=1, sampling=SAMPLING)
    assert calls == []
    first, again = tracking.score(make_model()), tracking.score(make_model())
    assert first == again > 0
    assert calls == ["made"]
    assert tracking.score(make_model("dit")) != first


def test_model_without_a_null_class_is_scored_without_guidance(images, make_model):
    model = make_model()
    model = dataclasses.replace(model, facts=dataclasses.replace(model.facts, label_dropout=0.0))
    assert track_frechet(images, lambda: mean_colors, every_steps=1, sampling=TRACKING).score(model) > 0


@pytest.mark.slow
def test_a_continued_training_is_scored_in_features_of_the_recorded_precision(colors):
    real = load_dataset(colors, "train")
    for name in ("frechet", "frechet_bfloat16"):
        assert track_frechet_in("convnet", colors, real, every_steps=1, recorded=name).name == name
    new = track_frechet_in("convnet", colors, real, every_steps=1)
    assert new.name in SCORE_PRECISIONS


def test_tracked_training_keeps_the_best_model_and_draws_a_chart(data, config, tmp_path):
    tracking = track_frechet(data.images, lambda: mean_colors, every_steps=2, sampling=SAMPLING)
    train(data, TrainingRequest(config, tmp_path), tracking=tracking)
    scores = {record["step"]: record["value"] for record in read_records(tmp_path / "metrics.jsonl")
              if record["stage"] == "score"}  # fmt: skip
    assert set(scores) == {2, 4, 6}
    facts = read_facts(tmp_path)
    assert facts.metrics == {"frechet": min(scores.values())} and scores[facts.steps] == min(scores.values())
    with Image.open(tmp_path / "training.png") as chart:
        assert chart.format == "PNG" and chart.width > 2 * chart.height


@pytest.mark.slow
def test_chart_shows_a_fine_tuning_that_has_two_losses(tmp_path):
    losses = [{"stage": "minimax", "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for name, shown in (("nothing", []), ("one", losses[:1]), ("two", losses[:2]), ("three", losses)):
        draw_chart(shown, tmp_path / f"{name}.png")
    assert {path.stem for path in tmp_path.iterdir()} == {"two", "three"}
    assert (tmp_path / "two.png").read_bytes() != (tmp_path / "three.png").read_bytes()
