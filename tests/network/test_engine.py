"""The engine for GPUs, on a pretended one, and on a real one where there is one."""

import functools
import gc
import io
import logging
import shutil
import weakref

import pytest
import torch

from ddkit.network.engine import build_engine, close_engine
from ddkit.network.networks import build_network
from ddkit.network.plan import EnginePlan
from ddkit.network.training import TrainingRun, TrainingSettings
from ddkit.runtime.tensor_files import load_restricted

GRAPH = EnginePlan("cuda_graph", channels_last=True)
has_compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
PLANS = [
    GRAPH,
    EnginePlan("cuda_graph"),
    EnginePlan("cuda_graph", chunk=3),
    EnginePlan("compiled", channels_last=True),
    EnginePlan("plain", channels_last=True),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n, seed=0, size=16):
    return torch.randn(n, 3, size, size, generator=seeded(seed)), torch.randint(10, (n,), generator=seeded(seed))


@pytest.fixture(params=["pretended", "real"])
def tolerance(request, monkeypatch):
    """How far results may differ from the plain way's; the test's GPU is there when it runs."""
    if request.param == "pretended":
        request.getfixturevalue("gpu")
        return 1e-5
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    # Where only some kernels take TF32, a thousandth of all values fall on different sides of a ReLU.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return 1e-3


def computed(plan, batches):
    """The losses of one network on several batches in turn, the last gradients, and the logits of the last batch."""
    network = build_network("convnet", 10, 16, seed=0).to("cuda")
    engine = build_engine(network, plan)
    losses = [engine.gradients(images.to("cuda"), labels.to("cuda")) for images, labels in batches]
    gradients = [parameter.grad.clone().cpu() for parameter in network.parameters()]
    return torch.stack(losses).cpu(), gradients, engine.logits(batches[-1][0].to("cuda")).cpu()


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_gpu_plan_computes_what_the_plain_engine_does_on_batches_of_changing_sizes(tolerance, plan):
    batches = [batch(8, 1), batch(8, 2), batch(3, 3), batch(8, 4), batch(3, 5)]
    plain, ours = computed(EnginePlan(), batches), computed(plan, batches)
    torch.testing.assert_close(ours[0], plain[0], atol=tolerance, rtol=0)
    torch.testing.assert_close(ours[2], plain[2], atol=10 * tolerance, rtol=0)
    for gradient, wanted in zip(ours[1], plain[1], strict=True):
        # Looser than rounding: a value within rounding of zero may fall on the other side of a ReLU.
        assert (gradient - wanted).norm() <= 1e-2 * max(wanted.norm().item(), 1e-3)


def test_bfloat16_is_near_and_not_the_same(tolerance):
    exact, rounded = (computed(EnginePlan("cuda_graph", each), [batch(8)])[2] for each in ("float32", "bfloat16"))
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 5e-2


def test_losses_of_earlier_steps_stay_as_they_were(tolerance):
    engine = build_engine(build_network("convnet", 10, 16, seed=0).to("cuda"), GRAPH)
    first = engine.gradients(*(tensor.to("cuda") for tensor in batch(4, 1)))
    before = first.item()
    engine.gradients(*(tensor.to("cuda") for tensor in batch(4, 2)))
    assert first.item() == before


FIRST_MAPS = 4 * 128 * 32 * 32 * 4  # bytes of the first convolution's output for a batch of 32 pixels


def started(plan, epochs_setting=5, size=16, device="cuda"):
    images, labels = (tensor.to(device) for tensor in batch(10, size=size))
    network = build_network("convnet", 10, size, seed=0).to(device)
    return TrainingRun(network, images, labels, TrainingSettings(epochs_setting, batch_size=4), seeded(), plan)


def losses_of(run, epochs):
    return [loss for _ in range(epochs) for loss in run.epoch()]


@functools.cache
def plain_losses(tolerance):
    """Six epochs of the plain engine on the GPU of that tolerance."""
    return losses_of(started(EnginePlan()), 6)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_training_goes_as_with_the_plain_engine_and_can_be_continued(tolerance, plan):
    losses = losses_of(started(plan), 6)
    assert losses == pytest.approx(plain_losses(tolerance), abs=10 * tolerance)
    first, second = started(plan), started(EnginePlan())
    parts = losses_of(first, 3)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(load_restricted(saved))
    assert second.state_dict()["plan"] == vars(plan)
    parts += losses_of(second, 3)
    assert parts == pytest.approx(losses, abs=10 * tolerance)


def test_a_plan_of_an_earlier_version_is_read():
    assert EnginePlan.from_dict({"kind": "graphed", "precision": "float32", "chunk": 0, "workers": 1}) == GRAPH
    assert EnginePlan.from_dict({"kind": "compiled"}) == EnginePlan("compiled", channels_last=True)
    assert EnginePlan.from_dict({"kind": "plain", "chunk": 8}) == EnginePlan("plain", chunk=8)


@pytest.mark.slow
def test_out_of_memory_saved_and_resumed_the_optimizer_gets_momentum_of_the_weights_layout(gpu):
    run = started(GRAPH, 2, size=32)
    losses = losses_of(run, 1)
    gpu.largest_tensor = FIRST_MAPS - 1
    run.close()  # another program has taken the memory: the graph is to be recorded again
    losses += losses_of(run, 1)
    plan = run.state_dict()["plan"]
    assert (plan["kind"], plan["chunk"]) == ("plain", 2)
    resumed = started(None, 2, size=32)
    resumed.load_state_dict(run.state_dict())
    losses += losses_of(resumed, 1)
    gpu.largest_tensor = None
    assert losses == pytest.approx(losses_of(started(EnginePlan(), 2, size=32), 3), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("plan, device, other", [
    (GRAPH, "cuda", "cpu"),
    pytest.param(EnginePlan("winograd", chunk=2), "cpu", "cuda",
                 marks=pytest.mark.skipif(not has_compiler, reason="no C++ compiler")),
])  # fmt: skip
def test_a_state_of_one_kind_of_device_is_continued_on_the_other(gpu, plan, device, other):
    run = started(plan, device=device)
    losses = losses_of(run, 2)
    state = io.BytesIO()
    torch.save(run.state_dict(), state)
    state.seek(0)
    resumed = started(None, device=other)
    resumed.load_state_dict(load_restricted(state))
    losses += losses_of(resumed, 4)
    assert losses == pytest.approx(losses_of(started(EnginePlan()), 6), abs=1e-3)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_an_engine_ends_with_its_last_reference(gpu, plan):
    network = build_network("convnet", 10, 16, seed=0).to("cuda")
    engine = build_engine(network, plan)
    engine.gradients(*(tensor.to("cuda") for tensor in batch(4)))
    alive = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        assert alive() is None
    finally:
        gc.enable()


def test_a_closed_engine_keeps_no_graph_and_no_gradient(gpu):
    network = build_network("convnet", 10, 16, seed=0).to("cuda")
    engine = build_engine(network, GRAPH)
    engine.gradients(*(tensor.to("cuda") for tensor in batch(4)))
    kept = weakref.ref(network.classifier.weight.grad)
    close_engine(engine)
    assert kept() is None


def test_after_a_failed_capture_its_memory_is_free_and_the_steps_run_on_the_runs_own_stream(gpu, monkeypatch):
    """torch.cuda.graph does not leave its stream; two steps on two streams would run at the same time."""
    run = started(GRAPH, 1, size=32)
    streams, sgd_step, capture_begins = [], torch.optim.SGD.step, torch.cuda.graph.__enter__
    recordings, held = [], []

    def step(self):
        streams.append(torch.cuda.current_stream())
        return sgd_step(self)

    def begin_without_memory(self):
        capture_begins(self)
        recordings.append(weakref.ref(self._graph))
        gpu.largest_tensor = FIRST_MAPS - 1

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(torch.cuda.graph, "__enter__", begin_without_memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.extend(each() is not None for each in recordings))
    losses_of(run, 2)
    assert run.state_dict()["plan"]["kind"] == "plain"
    assert held and not any(held), "the memory of what failed was not free for the plain engine"
    assert len(streams) == 6 and len(set(streams)) == 1 and torch.cuda.current_stream() not in streams


@pytest.mark.slow
def test_training_continues_without_a_graph_where_a_gpu_cannot_record_one(gpu, monkeypatch, caplog):
    def refuse(*recorded):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "record", refuse)
    run = started(EnginePlan("cuda_graph"))
    losses = losses_of(run, 6)
    run.close()
    assert losses == pytest.approx(losses_of(started(EnginePlan()), 6), abs=1e-4)
    assert "A CUDA graph does not work here" in caplog.text and run.state_dict()["plan"]["kind"] == "plain"


@pytest.mark.slow
def test_training_continues_uncompiled_where_compiling_fails(gpu, monkeypatch, caplog):
    def no_compiler(function, **options):
        def fail(*args):
            raise FileNotFoundError("no C compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    run = started(EnginePlan("compiled", channels_last=True))
    with caplog.at_level(logging.WARNING):
        losses = losses_of(run, 6)
    assert losses == pytest.approx(losses_of(started(EnginePlan()), 6), abs=1e-4)
    assert "torch.compile does not work here" in caplog.text and "no C compiler found" in caplog.text
    assert run.state_dict()["plan"]["kind"] == "cuda_graph"


def test_a_batch_of_a_begun_training_makes_the_host_wait_for_nothing(gpu):
    for plan in (EnginePlan(), GRAPH):
        run = started(plan)
        run.epoch()
        steps = run.steps()
        next(steps)  # the order of the images is copied once an epoch
        gpu.reset()
        assert [gpu.waits_in_all for _ in steps] == [0, 0], gpu.waits


@pytest.mark.slow
def test_uint8_pixels_are_trained_on_like_their_normalized_floats(gpu):
    from ddkit.challenge import GLYPHS
    from ddkit.data.images import normalize

    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    labels = torch.arange(10)

    def losses(images, device):
        network = build_network("convnet", 10, 32, seed=0).to(device)
        run = TrainingRun(network, images.to(device), labels.to(device), TrainingSettings(2, batch_size=4), seeded(),
                          EnginePlan(), GLYPHS)  # fmt: skip
        return losses_of(run, 3)

    assert losses(pixels, "cpu") == losses(normalize(pixels, GLYPHS), "cpu")
    assert losses(pixels, "cuda") == losses(normalize(pixels, GLYPHS), "cuda")
