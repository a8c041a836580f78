"""Training against the losses recorded from the official code."""

import io
import math
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from ddkit.errors import ComputeError, UsageError
from ddkit.network.convnet import ConvNet
from ddkit.network.networks import NETWORKS, build_network
from ddkit.network.plan import EnginePlan
from ddkit.network.training import TrainingRun, TrainingSettings, train_network
from ddkit.runtime.tensor_files import load_restricted


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small_set(n=12, classes=4, size=16):
    return torch.randn(n, 3, size, size, generator=seeded()), torch.arange(n) % classes


@pytest.mark.slow
def test_a_short_run_agrees_with_the_official_code(convnet_golden):
    golden = convnet_golden("cifar100")
    network = golden.network()
    losses = train_network(
        network,
        golden["run.images"],
        golden["run.labels"],
        epochs_setting=8,
        batch_size=16,
        augment=False,
        shuffle=False,
    )
    torch.testing.assert_close(torch.tensor(losses).double(), golden["run.losses"].double(), atol=1e-3, rtol=0)
    network.eval()
    with torch.no_grad():
        logits = network(golden["run.images"])
    # Rounding grows along the run: in float64 the same run ends 0.024 from the recording, whose logits reach 10.
    torch.testing.assert_close(logits, golden["run.final_logits"], atol=0.05, rtol=0)


@pytest.mark.slow
def test_the_first_epochs_with_larger_images_agree_with_the_official_code(convnet_golden):
    golden = convnet_golden("tinyimagenet_20_classes")
    settings = TrainingSettings(8, batch_size=16, augment=False, shuffle=False)
    run = TrainingRun(golden.network(), golden["run.images"], golden["run.labels"], settings, seeded())
    losses = torch.tensor([loss for _ in range(3) for loss in run.epoch()])
    torch.testing.assert_close(losses, golden["run.losses"][: len(losses)].float(), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name, plan", [
    ("cifar100", EnginePlan("plain", chunk=4)), ("cifar100", EnginePlan("winograd", chunk=2, workers=2)),
    ("tinyimagenet_20_classes", EnginePlan("winograd", chunk=2, workers=2)),
], ids=str)  # fmt: skip
def test_a_short_run_of_any_engine_stays_with_the_official_code(convnet_golden, name, plan):
    golden = convnet_golden(name)
    settings = TrainingSettings(8, batch_size=16, augment=False, shuffle=False)
    run = TrainingRun(golden.network(), golden["run.images"], golden["run.labels"], settings, seeded(), plan)
    losses = torch.tensor([loss for _ in range(settings.epochs) for loss in run.epoch()])
    # Until rounding first puts a value on the other side of a ReLU, which from then on is worth up to 1e-3 each time:
    # the plain way in chunks of four ends 1.2e-3 from the recording, too.
    torch.testing.assert_close(losses[:4], golden["run.losses"][:4].float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(losses, golden["run.losses"].float(), atol=4e-3, rtol=0)


def test_batches_of_few_images_are_computed_plainly_and_whole_and_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path))
    run = TrainingRun(ConvNet(4, 16), *small_set(16), TrainingSettings(0, batch_size=16), seeded())
    run.epoch()
    assert EnginePlan(**run.state_dict()["plan"]) == EnginePlan("plain", "float32", 0)
    assert not (tmp_path / "_engines.json").exists()


def test_training_leaves_no_gradients_in_images_that_are_being_optimized():
    images, labels = small_set(n=4)
    train_network(build_network("convnet", 4, 16, seed=0), images.requires_grad_(), labels, epochs_setting=0)
    assert images.grad is None


def test_a_network_is_trained_inside_a_function_without_gradients():
    within, outside = (build_network("convnet", 4, 16, seed=0) for _ in range(2))
    with torch.no_grad():
        losses = train_network(within, *small_set(n=4), epochs_setting=1)
    assert losses == train_network(outside, *small_set(n=4), epochs_setting=1)


def test_a_network_on_a_gpu_is_trained_on_images_that_lie_elsewhere(gpu):
    losses = [
        train_network(build_network("convnet", 4, 16, seed=0).to(device), *small_set(n=4), epochs_setting=0)
        for device in ("cuda", "cpu")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_momentum_starts_again_from_zero_after_epoch_e_half_plus_1():
    images, labels = small_set()
    settings = TrainingSettings(4, batch_size=12)
    run = TrainingRun(ConvNet(4, 16), images, labels, settings, seeded())
    rates, momenta = [], []
    while not run.finished:
        run.epoch()
        state = run.state_dict()["optimizer"]
        rates.append(state["param_groups"][0]["lr"])
        momenta.append(len(state["state"]) > 0)
    # E = 4: the drop comes after the epoch with index 3; epochs 0 ... 3 run at 0.01, epoch 4 at 0.001.
    assert rates == [0.01, 0.01, 0.01, 0.001, 0.001]
    assert momenta == [True, True, True, False, True]


def test_a_run_continued_from_its_state_is_bit_identical():
    images, labels = small_set()
    settings = TrainingSettings(4, batch_size=5)

    def start():
        return TrainingRun(build_network("convnet", 4, 16, seed=1), images, labels, settings, seeded(2))

    whole = start()
    losses = [whole.epoch() for _ in range(5)]
    for stop_after in (1, 4):
        begun = start()
        first = [begun.epoch() for _ in range(stop_after)]
        continued = start()
        continued.load_state_dict(begun.state_dict())
        assert first + [continued.epoch() for _ in range(5 - stop_after)] == losses
        assert continued.finished
        for ours, theirs in zip(continued.network.parameters(), whole.network.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_run_continued_within_an_epoch_is_bit_identical():
    images, labels = small_set(23)
    settings = TrainingSettings(2, batch_size=5)

    def start():
        return TrainingRun(build_network("convnet", 4, 16, seed=1), images, labels, settings, seeded(2))

    whole = start()
    losses = [whole.epoch() for _ in range(3)]
    begun = start()
    begun.epoch()
    batches = begun.steps()
    for _ in range(3):
        next(batches)
    saved = io.BytesIO()
    torch.save(begun.state_dict(), saved)
    saved.seek(0)
    continued = start()
    continued.load_state_dict(load_restricted(saved))
    assert [continued.epoch(), continued.epoch()] == losses[1:]
    for ours, theirs in zip(continued.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_run_is_continued_where_its_engine_cannot_be_compiled(own_cache, tmp_path):
    images, labels = small_set()
    settings, plan = TrainingSettings(1, batch_size=5), EnginePlan("winograd", "float32", chunk=5)
    run = TrainingRun(build_network("convnet", 4, 16, seed=1), images, labels, settings, seeded(2), plan)
    run.epoch()
    torch.save((images, labels, run.state_dict()), tmp_path / "state.pt")
    code = textwrap.dedent(f"""
        import torch
        from ddkit.network.networks import build_network
        from ddkit.network.training import TrainingRun, TrainingSettings
        images, labels, state = torch.load({str(tmp_path / "state.pt")!r})
        network = build_network("convnet", 4, 16, seed=1)
        run = TrainingRun(network, images, labels, TrainingSettings(1, batch_size=5), torch.Generator())
        run.load_state_dict(state)
        print(*run.epoch())
    """)
    there = {"CXX": "no-such-compiler", "DDKIT_CACHE": str(tmp_path / "elsewhere")}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | there, capture_output=True, text=True, check=True)
    assert [*map(float, done.stdout.split())] == pytest.approx(run.epoch(), rel=1e-4)
    assert "rounds otherwise" in done.stderr and "no-such-compiler" in done.stderr


def test_training_repeats_with_its_generator_and_differs_with_another():
    images, labels = small_set()

    def losses(seed):
        network = build_network("convnet", 4, 16, seed=0)
        return train_network(network, images, labels, epochs_setting=1, generator=seeded(seed), batch_size=6)

    assert losses(1) == losses(1) != losses(2)


def test_the_last_short_batch_is_kept():
    images, labels = small_set(13)
    losses = train_network(ConvNet(4, 16), images, labels, epochs_setting=0, batch_size=5)
    assert len(losses) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_can_be_trained(name):
    images, labels = small_set(4, size=32)
    network = build_network(name, 4, 32, seed=0)
    losses = train_network(network, images, labels, epochs_setting=1)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert network(images).shape == (4, 4)


def test_average_pooling_networks_have_no_strided_convolution_and_the_same_output_sizes():
    images, _ = small_set(2, size=32)
    strided, pooled = (build_network(name, 4, 32, seed=0) for name in ("resnet18", "resnet18_ap"))
    convolutions = [module for module in pooled.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 20 and all(module.stride == (1, 1) for module in convolutions)
    x, y = images, images
    for stage in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x, y = getattr(strided, stage)(x), getattr(pooled, stage)(y)
        assert x.shape == y.shape, stage
    names = [sum(p.numel() for p in network.parameters()) for network in (strided, pooled)]
    assert names[0] == names[1]


@pytest.mark.parametrize("name, size, kernel, stem_side", [
    ("resnet_ap10", 64, 3, 64), ("resnet_ap10", 128, 3, 64), ("resnet_ap10", 256, 7, 64), ("resnet18", 256, 7, 64),
])  # fmt: skip
def test_stems_of_residual_networks_keep_what_follows_affordable(name, size, kernel, stem_side):
    network = build_network(name, 4, size, seed=0)
    maps = torch.randn(1, 3, size, size)
    for stage in ("conv1", "bn1", "relu", "maxpool"):
        maps = getattr(network, stage)(maps)
    assert network.conv1.kernel_size == (kernel, kernel)
    assert maps.shape == (1, 64, stem_side, stem_side)
    pooled = not any(isinstance(module, nn.Conv2d) and module.stride != (1, 1) for module in network.modules())
    assert pooled == (name == "resnet_ap10")


def test_a_network_is_drawn_from_its_seed_alone(monkeypatch):
    torch.manual_seed(5)
    before, seeds_of_gpus = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds_of_gpus.append)
    first = build_network("convnet", 4, 16, seed=3)
    assert torch.equal(torch.get_rng_state(), before) and seeds_of_gpus == []
    torch.manual_seed(6)
    again, other = build_network("convnet", 4, 16, seed=3), build_network("convnet", 4, 16, seed=4)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_an_unknown_network_raises_with_the_nearest_name():
    with pytest.raises(UsageError, match="Did you mean 'resnet18'"):
        build_network("resnet-18", 10, 32, seed=0)


def test_vgg11_of_images_that_are_too_small_raises_usage_error():
    with pytest.raises(UsageError, match="32 pixels or more, got 16"):
        build_network("vgg11", 10, 16, seed=0)


@pytest.mark.parametrize(
    "settings",
    [{"epochs_setting": -1}, {"epochs_setting": 1, "batch_size": 0}, {"epochs_setting": 1, "precision": "x"}],
)
def test_settings_out_of_range_raise_usage_error(settings):
    with pytest.raises(UsageError):
        train_network(ConvNet(4, 16), *small_set(), **settings)


@pytest.mark.parametrize("side, channels", [(32, 3), (8, 3), (16, 1)])
def test_images_that_the_network_does_not_take_raise_usage_error(side, channels):
    with pytest.raises(UsageError, match=rf"takes images of shape \(N, 3, 16, 16\), got \(40, {channels}, {side}, {side}\)"):
        train_network(ConvNet(4, 16), torch.zeros(40, channels, side, side), torch.arange(40) % 4, epochs_setting=0)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_beyond_the_networks_classes_raise_usage_error(label):
    images, labels = small_set()
    labels[3] = label
    with pytest.raises(UsageError, match="The network has 4 classes, 0 to 3, but the labels go from"):
        train_network(ConvNet(4, 16), images, labels, epochs_setting=0)


@pytest.mark.parametrize("n", [12, 40])  # which one engine computes, and another
def test_frozen_parameters_stay_as_they_are(n):
    network = build_network("convnet", 4, 16, seed=0)
    network.features.requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    train_network(network, *small_set(n), epochs_setting=0)
    changed = {key for key, value in network.state_dict().items() if not value.equal(before[key])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_a_loss_that_is_nan_raises_at_once():
    images, labels = small_set()
    images[3] = math.nan
    with pytest.raises(ComputeError, match="NaN or infinite in epoch 1"):
        train_network(ConvNet(4, 16), images, labels, epochs_setting=3)
