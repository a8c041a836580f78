"""The averaged weights of the training loop, and compilation that fails; test_train.py tests the loop itself."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from ddkit.generator.compiling import can_compile
from ddkit.generator.config import OptimizerConfig
from ddkit.generator.model_folder import load_model
from ddkit.generator.training import train as training
from ddkit.generator.training.stages import Stage
from ddkit.generator.training.train import TrainingRequest, train
from ddkit.generator.training.trainer import Callback, Trainer, averaging


def averaged(averages, count, values):
    """What the averages of parameters are that take these values, one step after the other."""
    parameters = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(count)]
    ema = averages(parameters)
    for step in values:
        with torch.no_grad():
            for parameter, value in zip(parameters, step, strict=True):
                parameter.fill_(value)
        ema.step(parameters)
    return [parameter.item() for parameter in ema.shadow_params]


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_ema_profile_has_the_relative_width_asked_for(width):
    steps = 3000
    # The averages of t and of t^2 are the profile's first two moments.
    values = ((float(t), float(t) ** 2) for t in range(1, steps + 1))
    mean, square = averaged(lambda parameters: averaging(parameters, width, None), 2, values)
    assert (square - mean**2) ** 0.5 / steps == pytest.approx(width, rel=0.03)


class Slope(Stage):
    """One weight, whose gradient is 1, then 100, and so on."""

    name = task = "slope"
    remedy = smaller = ""
    optimizer = OptimizerConfig(steps=9, batch_size=1, learning_rate=0.1, warmup_steps=4, clip_norm=1.0)
    ema_width = 0.1

    def __init__(self):
        super().__init__(1, 0)
        self.network = nn.Linear(1, 1, bias=False)
        self.loss = SlopeLoss(self.network)

    def draw(self, step, device):
        return {"slope": torch.tensor([100.0**step], device=device)}


class SlopeLoss(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, slope):
        loss = self.network.weight.sum() * slope.sum()
        return loss, loss.detach() * 0


class Calls(Callback):
    """The saves of a training and its intervals of three steps, in their order."""

    every = 3

    def __init__(self):
        self.made = []

    def on_save(self, trainer):
        self.made.append(("save", trainer.step))

    def on_interval(self, trainer):
        self.made.append(("interval", trainer.step))


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_steps_have_the_rate_of_their_number_and_clipped_gradients(accelerator, tmp_path):
    """AdamW moves a weight with equal gradients by the rate; the second would be 100 times the first without clipping."""
    stage = Slope()
    before, moved = stage.network.weight.item(), []
    for steps in (1, 2, 3):
        Trainer(stage, accelerator, tmp_path, steps=steps).run()
        moved.append(before - stage.network.weight.item())
        before = stage.network.weight.item()
    assert moved == pytest.approx([0.025, 0.05, 0.075], rel=1e-3)


def test_state_is_saved_after_so_many_seconds_and_at_the_end_before_what_may_take_minutes(accelerator, tmp_path):
    for seconds, expected in ((0.0, [1, 2, 3]), (600.0, [3])):
        calls = Calls()
        Trainer(Slope(), accelerator, tmp_path / str(seconds), steps=3, save_every_seconds=seconds, callbacks=[calls]).run()
        assert calls.made == [*(("save", step) for step in expected), ("interval", 3)]


def test_training_compiles_at_the_same_step_when_it_is_resumed(accelerator, tmp_path, monkeypatch):
    if not can_compile():
        pytest.skip("no C++ compiler with Python's headers")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(trainer.step) or module)
    for steps in (1, 3, 4):
        trainer = Trainer(Slope(), accelerator, tmp_path, steps=steps, compile_after=2)
        trainer.run()
    assert compiled == [2, 3]


def test_constant_ema_decay_is_the_plain_recursion():
    values = [3.0, -1.0, 4.0, 10.0]
    expected = values[0]
    (found,) = averaged(lambda parameters: averaging(parameters, 0.1, 0.9), 1, [(value,) for value in values])
    for value in values[1:]:
        expected = 0.9 * expected + 0.1 * value
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.slow
def test_failing_compilation_continues_without_it(data, config, tmp_path, monkeypatch, caplog, passes):
    """The result is that of a training that never compiled."""

    if not can_compile():
        pytest.skip("no C++ compiler with Python's headers")

    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    def compile_with_a_broken_backend(module, **options):
        backend = broken if passes == "forward" else aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=broken)
        return real_compile(module, backend=backend)

    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_with_a_broken_backend)
    monkeypatch.setattr(training, "_PLAIN_STEPS", 2)
    train(data, TrainingRequest(dataclasses.replace(config, compile=True), tmp_path / "compiled"))
    assert "continues without it" in caplog.text
    train(data, TrainingRequest(dataclasses.replace(config, compile=False), tmp_path / "plain"))
    ours, theirs = (load_model(tmp_path / name).denoiser.state_dict() for name in ("compiled", "plain"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(("plain_steps", "seconds"), [(200, None), (0, 0.1)], ids=["few steps", "little time"])
def test_short_training_is_not_compiled(data, config, tmp_path, monkeypatch, plain_steps, seconds):
    monkeypatch.setattr(torch, "compile", lambda module, **options: pytest.fail("compiled"))
    monkeypatch.setattr(training, "_PLAIN_STEPS", plain_steps)
    train(data, TrainingRequest(dataclasses.replace(config, compile=True), tmp_path, seconds=seconds))
