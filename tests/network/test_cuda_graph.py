"""The engine for GPUs. Where there is none, its steps are computed again instead of replayed: all else is the same."""

import contextlib

import pytest
import torch

from ddkit.network.engine import build_engine
from ddkit.network.networks import build_network
from ddkit.network.plan import EnginePlan
from ddkit.network.training import TrainingRun, TrainingSettings

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n, seed=0, size=16):
    return torch.randn(n, 3, size, size, generator=seeded(seed)), torch.randint(10, (n,), generator=seeded(seed))


@contextlib.contextmanager
def compiling(device):
    """Compiling takes minutes on some machines; on a CPU the compiled functions run uncompiled here."""
    with torch.compiler.set_stance("force_eager") if device == "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(params=DEVICES)
def device(request):
    with compiling(request.param):
        yield request.param


def computed(kind, device, batches, precision="float32"):
    """Of one network on several batches in turn: the losses, the last gradients, and the logits of the last batch."""
    network = build_network("convnet", 10, 16, seed=0).to(device)
    engine = build_engine(network, EnginePlan(kind, precision))
    losses = [engine.gradients(images.to(device), labels.to(device)) for images, labels in batches]
    gradients = [parameter.grad.clone().cpu() for parameter in network.parameters()]
    return torch.stack(losses).cpu(), gradients, engine.logits(batches[-1][0].to(device)).cpu()


@pytest.mark.parametrize("kind", ["graphed", "compiled"])
def test_it_computes_what_the_plain_engine_does_on_batches_of_changing_sizes(device, kind):
    batches = [batch(8, 1), batch(8, 2), batch(3, 3), batch(8, 4), batch(3, 5)]
    plain, ours = computed("plain", device, batches), computed(kind, device, batches)
    tolerance = 1e-5 if device == "cpu" else 5e-3  # TF32 on a GPU
    torch.testing.assert_close(ours[0], plain[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(ours[2], plain[2], atol=10 * tolerance, rtol=0)
    for gradient, wanted in zip(ours[1], plain[1], strict=True):
        # Looser than rounding: a value within rounding of zero may fall on the other side of a ReLU.
        assert (gradient - wanted).norm() <= 1e-2 * max(wanted.norm().item(), 1e-3)


def test_bfloat16_is_near_and_not_the_same(device):
    exact, rounded = (computed("graphed", device, [batch(8)], each)[2] for each in ("float32", "bfloat16"))
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 5e-2


def test_losses_of_earlier_steps_stay_as_they_were(device):
    engine = build_engine(build_network("convnet", 10, 16, seed=0).to(device), EnginePlan("graphed"))
    first = engine.gradients(*(tensor.to(device) for tensor in batch(4, 1)))
    before = first.item()
    engine.gradients(*(tensor.to(device) for tensor in batch(4, 2)))
    assert first.item() == before


def test_a_training_goes_as_with_the_plain_engine_and_can_be_continued(device):
    images, labels = (tensor.to(device) for tensor in batch(10))

    def run(kind):
        network = build_network("convnet", 10, 16, seed=0).to(device)
        settings = TrainingSettings(5, batch_size=4)
        return TrainingRun(network, images, labels, settings, seeded(), EnginePlan(kind))

    plain, whole, first, second = run("plain"), run("graphed"), run("graphed"), run("plain")
    wanted = [loss for _ in range(6) for loss in plain.epoch()]
    losses = [loss for _ in range(6) for loss in whole.epoch()]
    assert losses == pytest.approx(wanted, abs=1e-4 if device == "cpu" else 5e-2)
    parts = [loss for _ in range(3) for loss in first.epoch()]
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["plan"]["kind"] == "graphed"
    parts += [loss for _ in range(3) for loss in second.epoch()]
    assert parts == pytest.approx(losses, abs=1e-6 if device == "cpu" else 5e-2)
