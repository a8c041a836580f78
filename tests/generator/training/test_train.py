"""Training: resumed as if never stopped, whatever stops it, with whatever number of processes."""

import dataclasses
import json
import shutil
import signal
import textwrap

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddkit.data.store import ImageSet
from ddkit.errors import BadFileError, ComputeError, InterruptedRunError, MissingModelError, UsageError
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.model_facts import read_facts
from ddkit.generator.model_folder import load_model, save_autoencoder
from ddkit.generator.training import train as training
from ddkit.generator.training.checkpoints import list_checkpoints, load_latest
from ddkit.generator.training.run_folder import read_run_record
from ddkit.generator.training.tracking import Tracking
from ddkit.generator.training.train import TrainingData, TrainingRequest, train
from ddkit.generator.training.trainer import require_even_parts


def with_steps(config, steps):
    return dataclasses.replace(config, denoiser_optimizer=dataclasses.replace(config.denoiser_optimizer, steps=steps))


def with_optimizer(config, **changes):
    return dataclasses.replace(config, denoiser_optimizer=dataclasses.replace(config.denoiser_optimizer, **changes))


def records(folder, stage="denoiser"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


def state(folder, stage="denoiser"):
    """Everything of the newest checkpoint that steps decide, as one flat dictionary."""
    checkpoint = load_latest(folder / "checkpoints", stage)
    flat = {f"network.{name}": value for name, value in checkpoint.network.items()}
    flat |= {f"ema.{i}": value for i, value in enumerate(checkpoint.ema["shadow_params"])}
    for i, moments in checkpoint.optimizer["state"].items():
        flat |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    return checkpoint.step, flat


def assert_same(first, second, **tolerance):
    assert first[0] == second[0] and first[1].keys() == second[1].keys()
    for name, value in first[1].items():
        if tolerance:
            assert torch.allclose(value, second[1][name], **tolerance), name
        else:
            assert torch.equal(value, second[1][name]), name


def write_script(here, data, config, folder, before=""):
    """A program that trains in the folder of that name."""
    torch.save(dict(vars(data.images)), here / "images.pt")
    (here / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    script = textwrap.dedent(f"""
        import json, torch
        from pathlib import Path
        from ddkit.data.store import ImageSet
        from ddkit.generator.config import GeneratorConfig
        from ddkit.generator.training.train import TrainingData, TrainingRequest, train
        from ddkit.runtime.records import read_record
        here = Path({str(here)!r})
        images = ImageSet(**torch.load(here / "images.pt", weights_only=True))
        config = read_record(GeneratorConfig, json.loads((here / "config.json").read_text()))
        tracking = None
        exec({textwrap.dedent(before)!r})
        train(TrainingData("colors", images, "of-these-pixels"), TrainingRequest(config, here / {folder!r}), tracking=tracking)
    """)
    (here / "script.py").write_text(script)
    return here / "script.py"


class TestResuming:
    @pytest.mark.slow
    def test_resumed_training_equals_one_never_stopped_bit_for_bit(self, data, config, tmp_path):
        train(data, TrainingRequest(with_steps(config, 6), tmp_path / "straight"))
        train(data, TrainingRequest(with_steps(config, 2), tmp_path / "resumed"))
        train(data, TrainingRequest(with_steps(config, 6), tmp_path / "resumed"))
        assert_same(state(tmp_path / "straight"), state(tmp_path / "resumed"))
        assert load_model(tmp_path / "resumed").facts.steps == 6
        assert load_model(tmp_path / "resumed").facts.images_seen == 36

    @pytest.mark.slow
    def test_resumed_bfloat16_training_equals_one_never_stopped(self, data, config, tmp_path):
        config = dataclasses.replace(config, precision="bfloat16")
        train(data, TrainingRequest(with_steps(config, 4), tmp_path / "straight"))
        train(data, TrainingRequest(with_steps(config, 2), tmp_path / "resumed"))
        train(data, TrainingRequest(with_steps(config, 4), tmp_path / "resumed"))
        assert_same(state(tmp_path / "straight"), state(tmp_path / "resumed"))
        train(data, TrainingRequest(with_steps(dataclasses.replace(config, precision="float32"), 4), tmp_path / "full"))
        ours, theirs = (records(tmp_path / name)[-1]["loss"] for name in ("straight", "full"))
        assert ours != theirs and ours == pytest.approx(theirs, rel=0.05)

    @pytest.mark.slow
    def test_resumed_training_on_two_cores_equals_one_never_stopped(self, data, config, tmp_path):
        torch.set_num_threads(2)  # put back by the fixture that set one
        train(data, TrainingRequest(with_steps(config, 6), tmp_path / "straight"))
        train(data, TrainingRequest(with_steps(config, 2), tmp_path / "resumed"))
        train(data, TrainingRequest(with_steps(config, 6), tmp_path / "resumed"))
        assert_same(state(tmp_path / "straight"), state(tmp_path / "resumed"))

    @pytest.mark.slow
    def test_autoencoder_stopped_midway_resumes_bit_for_bit(self, data, config, tmp_path):
        train(data, TrainingRequest(config, tmp_path / "straight"))
        short = dataclasses.replace(config, autoencoder_optimizer=dataclasses.replace(config.autoencoder_optimizer, steps=2))
        train(data, TrainingRequest(short, tmp_path / "stopped"))
        # As if the process had ended right after the checkpoint of step 2.
        for name in ("vae", "transformer"):
            for path in (tmp_path / "stopped" / name).iterdir():
                path.unlink()
        for path in list_checkpoints(tmp_path / "stopped" / "checkpoints", "denoiser"):
            path.unlink()
        train(data, TrainingRequest(config, tmp_path / "stopped"))
        assert_same(state(tmp_path / "straight", "autoencoder"), state(tmp_path / "stopped", "autoencoder"))
        assert_same(state(tmp_path / "straight"), state(tmp_path / "stopped"))

    @pytest.mark.slow
    def test_stop_during_the_last_step_of_a_stage_prevents_the_next_stage(self, data, config, tmp_path):
        def stop(report):
            if report.done == report.total:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(InterruptedRunError, match="autoencoder"):
            train(data, TrainingRequest(config, tmp_path / "stopped"), progress=stop)
        assert not list_checkpoints(tmp_path / "stopped" / "checkpoints", "denoiser")
        train(data, TrainingRequest(config, tmp_path / "stopped"))
        train(data, TrainingRequest(config, tmp_path / "straight"))
        assert_same(state(tmp_path / "straight"), state(tmp_path / "stopped"))

    @pytest.mark.slow
    def test_finished_training_is_not_repeated(self, data, config, tmp_path):
        train(data, TrainingRequest(config, tmp_path))
        before = (tmp_path / "metrics.jsonl").read_text()
        reports = []
        train(data, TrainingRequest(config, tmp_path), progress=reports.append)
        assert (tmp_path / "metrics.jsonl").read_text() == before
        assert reports and all(report.done == report.total for report in reports)

    @pytest.mark.slow
    def test_model_older_than_the_last_checkpoint_is_written_again(self, data, config, tmp_path):
        """As a kill between the two leaves it."""
        train(data, TrainingRequest(with_steps(config, 2), tmp_path / "run"))
        shutil.copytree(tmp_path / "run", tmp_path / "earlier")
        train(data, TrainingRequest(with_steps(config, 4), tmp_path / "run"))
        whole = load_model(tmp_path / "run").denoiser.state_dict()
        for part in ("ddkit.json", "transformer/diffusion_pytorch_model.safetensors"):
            shutil.copy(tmp_path / "earlier" / part, tmp_path / "run" / part)
        again = train(data, TrainingRequest(with_steps(config, 4), tmp_path / "run"))
        assert again.facts.steps == 4
        assert all(torch.equal(value, whole[name]) for name, value in again.denoiser.state_dict().items())

    def test_float16_on_a_cpu_raises_usage_error(self, data, config, tmp_path):
        with pytest.raises(UsageError, match="float16 needs a GPU"):
            train(data, TrainingRequest(dataclasses.replace(config, precision="float16"), tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_truncated_checkpoint_costs_only_the_steps_after_the_one_before(self, data, config, tmp_path):
        train(data, TrainingRequest(with_steps(config, 6), tmp_path / "straight"))
        for steps in (2, 4):
            train(data, TrainingRequest(with_steps(config, steps), tmp_path / "damaged"))
        newest = list_checkpoints(tmp_path / "damaged" / "checkpoints", "denoiser")[-1]
        newest.write_bytes(newest.read_bytes()[:500])
        train(data, TrainingRequest(with_steps(config, 6), tmp_path / "damaged"))
        assert_same(state(tmp_path / "straight"), state(tmp_path / "damaged"))

    @pytest.mark.slow
    def test_training_resumes_with_a_lower_learning_rate(self, data, config, tmp_path):
        train(data, TrainingRequest(with_steps(config, 2), tmp_path))
        train(data, TrainingRequest(with_optimizer(config, learning_rate=1e-4), tmp_path))
        assert [(record["step"], record["rate"]) for record in records(tmp_path)] == [(2, 1e-3), (6, 1e-4)]
        assert read_run_record(tmp_path).config.denoiser_optimizer.learning_rate == 1e-4

    @pytest.mark.slow
    def test_autoencoder_trains_further_until_a_denoiser_has_learned_from_it(self, data, config, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(training, "AUTOENCODER_SHARE", 0.9)  # so that its steps fit, however busy the machine is
        longer = with_optimizer(config, steps=10**9)
        train(data, TrainingRequest(config, tmp_path, seconds=0.001))
        for path in list_checkpoints(tmp_path / "checkpoints", "denoiser"):
            path.unlink()
        train(data, TrainingRequest(longer, tmp_path, seconds=1.0))
        assert records(tmp_path, "autoencoder")[-1]["step"] == 4 and "short time" not in caplog.text
        train(data, TrainingRequest(longer, tmp_path / "hurried", seconds=0.001))
        train(data, TrainingRequest(longer, tmp_path / "hurried", seconds=1.0))
        assert records(tmp_path / "hurried", "autoencoder")[-1]["step"] < 4 and "was trained for a short time" in caplog.text

    @pytest.mark.slow
    def test_changed_images_are_encoded_again(self, data, config, tmp_path, caplog):
        train(data, TrainingRequest(config, tmp_path))
        before = load_file(tmp_path / "checkpoints" / "latents.safetensors")["latents"]
        images = dataclasses.replace(data.images, images=data.images.images.flip(-2).contiguous())
        changed = dataclasses.replace(data, images=images, sha256="of-other-pixels")
        train(changed, TrainingRequest(config, tmp_path))
        assert "was prepared again since" in caplog.text
        assert not torch.equal(before, load_file(tmp_path / "checkpoints" / "latents.safetensors")["latents"])


class TestDividedBatches:
    @pytest.mark.slow
    def test_accumulated_parts_train_like_the_whole_batch(self, data, config, tmp_path):
        train(data, TrainingRequest(config, tmp_path / "whole"))
        train(data, TrainingRequest(with_optimizer(config, accumulation=3), tmp_path / "parts"))
        assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"), atol=1e-4)

    @pytest.mark.slow
    def test_two_cores_train_like_one(self, data, config, tmp_path):
        train(data, TrainingRequest(with_steps(config, 1), tmp_path / "one"))
        # The second stage learns latents that are rounded to half precision, which two cores may round the other way.
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        train(data, TrainingRequest(with_steps(config, 6), tmp_path / "one"))
        torch.set_num_threads(2)  # put back by the fixture that set one
        train(data, TrainingRequest(with_steps(config, 1), tmp_path / "again"))
        assert_same(state(tmp_path / "one", "autoencoder"), state(tmp_path / "again", "autoencoder"), atol=1e-4)
        train(data, TrainingRequest(with_steps(config, 6), tmp_path / "two"))
        assert_same(state(tmp_path / "one"), state(tmp_path / "two"), atol=1e-4)
        ours, theirs = (records(tmp_path / name) for name in ("one", "two"))
        assert len(ours) == len(theirs)
        assert [each["loss"] for each in theirs] == pytest.approx([each["loss"] for each in ours], rel=1e-3)

    @pytest.mark.slow
    def test_two_processes_train_like_one(self, data, config, tmp_path):
        tracking = Tracking("score", lambda model: model.facts.steps, every_steps=2)
        train(data, TrainingRequest(config, tmp_path / "one"), tracking=tracking)
        script = write_script(
            tmp_path, data, config, "two",
            """
            from ddkit.generator.training.tracking import Tracking
            tracking = Tracking("score", lambda model: model.facts.steps, every_steps=2)
            """,
        )  # fmt: skip
        both = processes.run_together(script)
        assert [process.returncode for process in both] == [0, 0], both
        assert read_facts(tmp_path / "two").steps == 2, "the best, which the main process alone has scored"
        assert_same(state(tmp_path / "one"), state(tmp_path / "two"), atol=1e-4)
        ours, theirs = (records(tmp_path / name)[-1] for name in ("one", "two"))
        assert theirs["step"] == ours["step"] == 6 and theirs["images"] == ours["images"]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)

    def test_batch_that_does_not_split_evenly_among_processes_raises_usage_error(self, config):
        with pytest.raises(UsageError, match=r"6 cannot be split evenly into 4 parts \(4 processes, 1 accumulated\)"):
            require_even_parts(config.denoiser_optimizer, 4)


class TestLimits:
    @pytest.mark.slow
    # With many steps to come the loss is no number soon; of a single one it is that of the good weights before it.
    @pytest.mark.parametrize("steps", [60, 3])
    def test_diverging_training_keeps_and_names_the_last_good_checkpoint(self, data, config, tmp_path, steps):
        train(data, TrainingRequest(with_steps(config, 2), tmp_path))
        good = list_checkpoints(tmp_path / "checkpoints", "denoiser")
        wild = with_optimizer(config, steps=steps, learning_rate=1e38, warmup_steps=1)
        begun = json.loads((tmp_path / "config.json").read_text())
        begun["config"] = dataclasses.asdict(wild)
        (tmp_path / "config.json").write_text(json.dumps(begun))
        with pytest.raises(ComputeError, match="NaN or infinite") as caught:
            train(data, TrainingRequest(wild, tmp_path))
        assert str(good[-1]) in caught.value.remedy and "--lr" in caught.value.remedy
        assert list_checkpoints(tmp_path / "checkpoints", "denoiser") == good

    def test_broken_model_is_neither_scored_nor_kept(self, data, config, tmp_path):
        wild = with_optimizer(config, steps=9, learning_rate=1e38, warmup_steps=1)
        scored = []
        with pytest.raises(ComputeError, match="NaN or infinite"):
            train(data, TrainingRequest(wild, tmp_path), tracking=Tracking("score", scored.append, every_steps=3))
        assert scored == [] and not (tmp_path / "ddkit.json").exists()

    @pytest.mark.slow
    def test_out_of_memory_says_what_to_try(self, data, config, tmp_path):
        script = write_script(
            tmp_path, data, with_optimizer(config, batch_size=60_000), "run",
            """
            import resource, psutil
            limit = psutil.Process().memory_info().vms + 2**29
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            """,
        )  # fmt: skip
        done = processes.run(script)
        assert "ComputeError: Out of memory during denoiser training with batches of 60000 images on cpu." in done.stderr

    @pytest.mark.slow
    def test_time_limits_both_stages_over_all_runs(self, data, config, tmp_path):
        endless = with_steps(config, 10**9)
        train(data, TrainingRequest(endless, tmp_path, seconds=0.5))
        first = load_model(tmp_path).facts.steps
        spent = load_latest(tmp_path / "checkpoints", "denoiser").seconds
        assert spent >= 0.85 * 0.5
        train(data, TrainingRequest(endless, tmp_path, seconds=0.5))
        assert load_model(tmp_path).facts.steps == first
        train(data, TrainingRequest(endless, tmp_path, seconds=spent + 0.5))
        assert load_model(tmp_path).facts.steps > first


class TestTracking:
    @pytest.mark.slow
    def test_scores_on_other_images_do_not_count(self, data, config, tmp_path):
        train(data, TrainingRequest(config, tmp_path), tracking=Tracking("frechet", lambda model: 1.0))
        changed = dataclasses.replace(data, sha256="of-other-pixels")
        train(changed, TrainingRequest(with_steps(config, 8), tmp_path), tracking=Tracking("frechet", lambda model: 5.0))
        facts = read_facts(tmp_path)
        assert (facts.steps, facts.dataset_sha256, dict(facts.metrics)) == (8, "of-other-pixels", {"frechet": 5.0})

    @pytest.mark.slow
    def test_best_model_is_kept_over_several_runs(self, data, config, tmp_path):
        scores = iter([3.0, 1.0, 2.0, 5.0])
        tracking = Tracking("frechet", lambda model: next(scores), every_steps=2)
        train(data, TrainingRequest(with_steps(config, 6), tmp_path), tracking=tracking)
        facts = read_facts(tmp_path)
        assert (facts.steps, dict(facts.metrics)) == (4, {"frechet": 1.0})
        train(data, TrainingRequest(with_steps(config, 8), tmp_path), tracking=tracking)
        assert read_facts(tmp_path).steps == 4
        assert [(record["step"], record["value"]) for record in records(tmp_path, "score")] == [
            (2, 3.0),
            (4, 1.0),
            (6, 2.0),
            (8, 5.0),
        ]

    @pytest.mark.slow
    @pytest.mark.parametrize("other", [None, Tracking("frechet_inception", lambda model: 3.0, every_steps=2)])
    def test_finished_training_keeps_the_model_that_another_score_chose(self, data, config, tmp_path, caplog, other):
        scores = iter([1.0, 5.0, 9.0])
        tracking = Tracking("frechet", lambda model: next(scores), every_steps=2)
        train(data, TrainingRequest(with_steps(config, 6), tmp_path), tracking=tracking)
        train(data, TrainingRequest(with_steps(config, 6), tmp_path), tracking=other)
        facts = read_facts(tmp_path)
        assert (facts.steps, dict(facts.metrics)) == (2, {"frechet": 1.0})
        assert "chosen by its score frechet" in caplog.text
        train(data, TrainingRequest(with_steps(config, 8), tmp_path), tracking=other)
        assert read_facts(tmp_path).steps == 8

    @pytest.mark.slow
    def test_score_missed_by_a_stop_is_made_on_resuming(self, data, config, tmp_path):
        def stop(report):
            if report.task == "Training the denoiser" and report.done == 3:
                signal.raise_signal(signal.SIGTERM)  # looked at after the next step

        tracking = Tracking("frechet", lambda model: 1.0, every_steps=1)
        with pytest.raises(InterruptedRunError, match="after 4 steps"):
            train(data, TrainingRequest(with_steps(config, 6), tmp_path), tracking=tracking, progress=stop)
        assert [record["step"] for record in records(tmp_path, "score")] == [1, 2, 3]
        train(data, TrainingRequest(with_steps(config, 6), tmp_path), tracking=tracking)
        assert [record["step"] for record in records(tmp_path, "score")] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.slow
    def test_last_step_is_scored_once(self, data, config, tmp_path):
        tracking = Tracking("frechet", lambda model: 1.0, every_steps=4)
        for _ in range(2):
            train(data, TrainingRequest(with_steps(config, 6), tmp_path), tracking=tracking)
            assert [record["step"] for record in records(tmp_path, "score")] == [4, 6]

    def test_scored_model_has_the_averaged_weights(self, data, config, tmp_path):
        seen = []

        def score(model):
            seen.append({name: value.clone() for name, value in model.denoiser.state_dict().items()})
            return 1.0

        train(data, TrainingRequest(config, tmp_path), tracking=Tracking("score", score, every_steps=6))
        saved = load_model(tmp_path).denoiser.state_dict()
        assert all(torch.equal(value, seen[0][name]) for name, value in saved.items())
        network = load_latest(tmp_path / "checkpoints", "denoiser").network
        assert any(not torch.equal(value, seen[0][name]) for name, value in network.items())


@pytest.mark.slow
@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 1, 2]], ids=["one image", "one class", "one image of each class"])
def test_the_smallest_datasets_train(config, tmp_path, labels):
    pixels = torch.randint(0, 256, (len(labels), 3, 16, 16), generator=torch.Generator().manual_seed(0))
    names = tuple("abc"[: max(labels) + 1])
    images = ImageSet(pixels.to(torch.uint8), torch.tensor(labels), names)
    model = train(TrainingData("few", images, "few"), TrainingRequest(config, tmp_path))
    assert model.facts.class_names == names and model.facts.steps == 6


def test_empty_dataset_raises_usage_error(images):
    nothing = ImageSet(images.images[:0], images.labels[:0], images.class_names)
    with pytest.raises(UsageError, match="no images"):
        TrainingData("nothing", nothing, "")


def test_failing_start_removes_nothing(data, config, tmp_path):
    train(data, TrainingRequest(config, tmp_path / "run"))
    kept = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    other = dataclasses.replace(config, pretrained_autoencoder=str(tmp_path / "nowhere"))
    with pytest.raises(MissingModelError):
        train(data, TrainingRequest(other, tmp_path / "run", fresh=True))
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == kept


@pytest.mark.slow
def test_training_resumes_in_smaller_parts(data, config, tmp_path):
    train(data, TrainingRequest(with_steps(config, 3), tmp_path / "parts"))
    train(data, TrainingRequest(with_optimizer(config, accumulation=3), tmp_path / "parts"))
    train(data, TrainingRequest(config, tmp_path / "whole"))
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"), atol=1e-4)


class TestPretrainedAutoencoder:
    def test_pretrained_autoencoder_only_gets_its_latent_scale(self, data, config, tmp_path):
        pretrained = build_autoencoder(config.autoencoder, 16, seed=9)
        save_autoencoder(pretrained, tmp_path / "pretrained")
        config = dataclasses.replace(config, pretrained_autoencoder=str(tmp_path / "pretrained"))
        model = train(data, TrainingRequest(config, tmp_path / "run"))
        expected = pretrained.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.autoencoder.state_dict().items())
        latents = load_file(tmp_path / "run" / "checkpoints" / "latents.safetensors")["latents"]
        assert model.autoencoder.config.scaling_factor == pytest.approx(1 / latents.float().std().item(), rel=1e-3)
        assert list_checkpoints(tmp_path / "run" / "checkpoints", "autoencoder") == []

    @pytest.mark.slow
    def test_pretrained_autoencoder_leaves_all_time_to_the_denoiser(self, data, config, tmp_path):
        save_autoencoder(build_autoencoder(config.autoencoder, 16, seed=9), tmp_path / "pretrained")
        config = dataclasses.replace(config, pretrained_autoencoder=str(tmp_path / "pretrained"))
        train(data, TrainingRequest(with_steps(config, 10**9), tmp_path / "run", seconds=0.5))
        assert load_latest(tmp_path / "run" / "checkpoints", "denoiser").seconds >= 0.5

    def test_missing_autoencoder_weights_raise_bad_file_error(self, data, config, tmp_path):
        save_autoencoder(build_autoencoder(config.autoencoder, 16, seed=9), tmp_path)
        (weights,) = (tmp_path / "vae").glob("*.safetensors")
        save_file({name: value for name, value in load_file(weights).items() if "decoder" not in name}, weights)
        config = dataclasses.replace(config, pretrained_autoencoder=str(tmp_path))
        with pytest.raises(BadFileError, match="do not fit its config.json: decoder"):
            train(data, TrainingRequest(config, tmp_path / "run"))


@pytest.mark.slow
def test_training_learns(data, config, tmp_path):
    """Some steps on three flat colors: samples of each class have its color on the whole."""
    from ddkit.generator.sampling import Sampler, SamplingSettings, class_ordered

    config = dataclasses.replace(
        with_optimizer(config, steps=200, learning_rate=1e-2, batch_size=24),
        autoencoder_optimizer=dataclasses.replace(config.autoencoder_optimizer, steps=100, learning_rate=1e-2),
    )
    model = train(data, TrainingRequest(config, tmp_path))
    labels, indices = class_ordered(8, 3)
    sampler = Sampler(model, SamplingSettings(steps=8, guidance=1.0, batch_size=24))
    images = torch.cat([*sampler.images(labels, indices)])
    brightest = images.float().mean(dim=(2, 3)).argmax(dim=1)
    assert (brightest == labels).float().mean() > 0.8
