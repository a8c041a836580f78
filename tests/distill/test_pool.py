"""The online pool: its networks learn the set as the challenge trains, grow old, diverge, and have to fit into memory."""

import dataclasses

import pytest
import torch

from ddkit.challenge import DATASETS
from ddkit.data.store import dataset_spec
from ddkit.distill.pool import OnlinePool, require_memory
from ddkit.distill.settings import PoolSettings
from ddkit.errors import ComputeError, UsageError
from ddkit.network.parameters import flat_parameters, load_flat_parameters, random_network
from ddkit.network.training import TrainingRun, TrainingSettings

LABELS = torch.arange(3).repeat_interleave(2)


@pytest.fixture
def spec(colors):
    return dataclasses.replace(dataset_spec(colors), num_classes=3)


@pytest.fixture
def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def pool(spec, **settings):
    return OnlinePool(PoolSettings(**{"size": 2, "updates": 1, "max_age": 6, **settings}), spec, LABELS, seed=5)


def visit(pool, images, number, step):
    pool.retire(number, step, pool.update(number, images, draws(step)).item())


@pytest.mark.slow
def test_updates_are_steps_of_the_official_training(spec, images):
    ours = pool(spec, updates=3)
    start = random_network(spec, "anything")
    ours.load_into(start, 0)
    ours.update(0, images, draws())
    # One batch holds the whole set, so an epoch is a step. Both draw an order and then an augmentation.
    run = TrainingRun(start, images, LABELS, TrainingSettings(epochs_setting=7), draws())
    for _ in range(3):
        run.epoch()
    trained = random_network(spec, "other")
    ours.load_into(trained, 0)
    found, expected = flat_parameters(trained), flat_parameters(start)
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, ours.state()["parameters"][1], atol=1e-2)


@pytest.mark.slow
def test_networks_learn_the_set(spec, images):
    ours, network = pool(spec, max_age=1000), random_network(spec, "anything")
    losses = []
    for step in range(60):
        if step % 59 == 0:
            ours.load_into(network, 1)
            losses.append(torch.nn.functional.cross_entropy(network(images), LABELS).item())
        visit(ours, images, 1, step)
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.slow
def test_ages_are_staggered_and_old_networks_are_replaced(spec, images):
    ours = pool(spec, size=3)
    assert ours.state()["ages"].tolist() == [0, 2, 4]
    before = ours.state()["parameters"].clone()
    for step in range(2):
        visit(ours, images, 2, step)
    state = ours.state()
    assert state["ages"].tolist() == [0, 2, 0] and int(state["diverged"]) == 0
    assert torch.equal(state["parameters"][:2], before[:2]) and not torch.equal(state["parameters"][2], before[2])
    assert not state["momenta"][2].any()
    replaced = random_network(spec, "anything")
    load_flat_parameters(replaced, state["parameters"][2])
    assert replaced.features[1].weight.eq(1).all(), "a network that has not been trained"


def test_a_network_that_diverges_is_replaced_and_counted(spec, images, caplog):
    ours = pool(spec, learning_rate=1e8)
    visit(ours, images, 1, 0)
    state = ours.state()
    assert (ours.diverged, int(state["diverged"])) == (1, 1)
    assert state["parameters"].isfinite().all() and state["parameters"].abs().max() < 2
    assert "diverged at step 1" in caplog.text


def test_a_pool_resumes_from_its_state_to_the_same_bits(spec, images):
    whole, parts = pool(spec), pool(spec)
    for step in range(8):
        visit(whole, images, step % 2, step)
    for step in range(3):
        visit(parts, images, step % 2, step)
    settings = PoolSettings(size=2, updates=1, max_age=6)
    resumed = OnlinePool(settings, spec, LABELS, seed=5, kept={name: kept.clone() for name, kept in parts.state().items()})
    for step in range(3, 8):
        visit(resumed, images, step % 2, step)
    for name, kept in whole.state().items():
        assert torch.equal(kept, resumed.state()[name]), name


def test_a_pool_that_does_not_fit_is_refused_with_the_size_that_does():
    spec, free = DATASETS["tinyimagenet"], 2**30
    with pytest.raises(ComputeError, match="A pool of 100 networks for tinyimagenet") as refused:
        require_memory(PoolSettings(size=100), spec, free)
    fitting = int(refused.value.remedy.rpartition(" ")[2].rstrip("."))
    require_memory(PoolSettings(size=fitting), spec, free)
    network = random_network(spec, "anything")
    assert 0.45 * free < fitting * 2 * 4 * flat_parameters(network).numel() <= 0.5 * free


@pytest.mark.parametrize(
    "wrong", [{"size": -1}, {"updates": 0}, {"max_age": 0}, {"from_step": -1}, {"from_share": 1.5}, {"learning_rate": 0.0}]
)
def test_wrong_settings_raise_usage_error(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        PoolSettings(**wrong)
