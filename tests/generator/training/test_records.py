"""The records of a training."""

import json

import pytest

from ddkit.errors import BadFileError
from ddkit.generator.training.records import MetricsLog, Score, read_records
from ddkit.generator.training.train import Tracking, TrainingRequest, train


@pytest.mark.slow
def test_tensorboard_has_every_figure_at_its_step(data, config, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = Tracking("frechet", lambda model: 2.5, every_steps=6)
    train(data, TrainingRequest(config, tmp_path, tensorboard=True), tracking=tracking)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (loss,) = (record["loss"] for record in read_records(tmp_path / "metrics.jsonl") if record["stage"] == "denoiser")
    (shown,) = events.Scalars("denoiser/loss")
    assert (shown.step, shown.value) == (6, pytest.approx(loss))
    assert [(event.step, event.value) for event in events.Scalars("score/value")] == [(6, 2.5)]
    assert {"autoencoder/mse", "denoiser/mse", "denoiser/rate"} <= set(events.Tags()["scalars"])


def test_read_records_returns_each_once_and_skips_what_is_not_a_record(tmp_path):
    log = tmp_path / "metrics.jsonl"
    lines = [{"stage": "denoiser", "step": step, "loss": loss} for step, loss in ((10, 1.0), (20, 0.9), (10, 0.8))]
    log.write_text("\n".join(map(json.dumps, [*lines, 5, [], {"step": 3}])) + '\n{"stage": "den')
    assert [(record["step"], record["loss"]) for record in read_records(log)] == [(10, 0.8), (20, 0.9)]
    assert read_records(tmp_path / "none.jsonl") == []
    with pytest.raises(BadFileError):
        read_records(tmp_path)


def test_read_records_keeps_scores_of_two_names_around_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "den')
    log = MetricsLog(tmp_path, tensorboard=False)
    for name, value in (("frechet", 2.0), ("frechet_inception", 9.0), ("frechet", 1.0)):
        log.write(Score(10, name, value))
    assert [(record["name"], record["value"]) for record in log.records()] == [("frechet", 1.0), ("frechet_inception", 9.0)]
