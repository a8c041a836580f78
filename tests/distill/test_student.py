"""The gradient of trajectory matching is right, and following it brings the student nearer to the expert."""

import dataclasses

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from ddkit.data.store import dataset_spec
from ddkit.distill.settings import StudentSettings
from ddkit.distill.student import Student
from ddkit.errors import UsageError
from ddkit.network.augment import random_augment
from ddkit.network.networks import build_network
from ddkit.network.parameters import flat_parameters, load_flat_parameters

CPU, RATE = torch.device("cpu"), 0.02


@pytest.fixture
def spec(colors):
    return dataclasses.replace(dataset_spec(colors), num_classes=3)


@pytest.fixture
def real():
    """(30, 3, 16, 16): ten images of each of three classes, class by class."""
    return torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def images(real):
    """Two of each class, somewhat changed."""
    changed = real + 0.3 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    return changed.unflatten(0, (3, 10))[:, :2].flatten(0, 1)


@pytest.fixture
def way(spec, real):
    """Two places of a network in training on the real images, half a dozen steps apart."""
    network, labels = build_network("convnet", 3, 16, seed=3), torch.arange(3).repeat_interleave(10)
    start = flat_parameters(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(network(real), labels).backward()
        optimizer.step()
    return start, flat_parameters(network)


def student(spec, steps=1, images_per_class=1, precision="float32"):
    """Of a set of two images a class."""
    return Student(spec, 2, StudentSettings(steps, images_per_class), precision, CPU)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def distance(spec, images, way, *, steps=1, lr=RATE, seed=0):
    return student(spec, steps).match(images, *way, lr, draws(seed), with_gradient=False).distance


@pytest.mark.slow
def test_the_gradient_of_one_step_predicts_how_the_distance_changes(spec, images, way):
    gradient = student(spec).match(images, *way, RATE, draws()).gradient
    step = 0.1 * gradient / gradient.norm()
    rise = (distance(spec, images + step, way) - distance(spec, images - step, way)) / 2
    assert rise == pytest.approx((gradient * step).sum().item(), rel=0.5)
    assert rise > 0


@pytest.mark.slow
def test_the_gradient_in_bfloat16_is_nearly_that_of_float32(spec, images, way):
    exact, rounded = (
        student(spec, 3, precision=precision).match(images, *way, RATE, draws()) for precision in ("float32", "bfloat16")
    )
    assert rounded.distance == pytest.approx(exact.distance, rel=0.01) and rounded.distance != exact.distance
    assert F.cosine_similarity(rounded.gradient.flatten(), exact.gradient.flatten(), dim=0) > 0.9


@pytest.mark.slow
def test_the_gradient_leads_down_as_automatic_differentiation_does(spec, images, way):
    """The latter step by step, at the places that the student came by; it does not see where a ReLU sets in."""
    steps = 3
    gradient = student(spec, steps).match(images, *way, RATE, draws()).gradient
    rows, seeds = _drawn(spec, steps)
    network = build_network("convnet", 3, 16, seed=0)
    names, shapes = zip(*((name, parameter.shape) for name, parameter in network.named_parameters()), strict=True)
    (start, end), place, pulls = way, way[0], []
    x, labels = images.clone().requires_grad_(), torch.arange(3).repeat_interleave(2)
    for batch, seed in zip(rows, seeds, strict=True):
        flat = place.detach().requires_grad_()
        parts = [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        seen = random_augment(x[batch], torch.Generator().manual_seed(seed))
        loss = F.cross_entropy(functional_call(network, dict(zip(names, parts, strict=True)), (seen,)), labels[batch])
        pulls.append(torch.autograd.grad(loss, flat, create_graph=True)[0])
        place = place - RATE * pulls[-1].detach()
    scale = (start - end).square().sum()
    twice = torch.autograd.grad(sum((place - end) @ pull for pull in pulls) * (-2 * RATE / scale), x)[0]
    assert F.cosine_similarity(gradient.flatten(), twice.flatten(), dim=0) > 0.5
    now = distance(spec, images, way, steps=steps)
    falls = [now - distance(spec, images - 0.2 * g / g.norm(), way, steps=steps) for g in (gradient, twice)]
    assert falls[0] > 0.8 * falls[1] > 0


def _drawn(spec, steps):
    """What `Student.match` draws: the rows of each step and the seeds of their augmentation."""
    generator = draws()
    rows = student(spec, steps)._batches(generator)
    return rows, torch.randint(2**62, (steps,), generator=generator).tolist()


def test_each_step_takes_one_image_of_each_class_until_all_were_taken(spec):
    rows, _ = _drawn(spec, 5)
    assert all([row // 2 for row in batch.tolist()] == [0, 1, 2] for batch in rows)
    for pair in (rows[:2], rows[2:4]):
        assert sorted(torch.cat(pair).tolist()) == list(range(6))
    assert len(rows) == 5
    (whole, again) = student(spec, 2, images_per_class=9)._batches(draws())
    assert sorted(whole.tolist()) == sorted(again.tolist()) == list(range(6)), "no more of a class than there are"


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"images_per_class": 0}, {"lr_momentum": 0.0}, {"lr_momentum": 1.5}])
def test_wrong_settings_raise_usage_error(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        StudentSettings(**wrong)


@pytest.mark.slow
def test_a_step_along_the_gradient_brings_the_student_nearer(spec, images, way):
    of_four = student(spec, 4)
    before = of_four.match(images, *way, RATE, draws())
    nearer = images - 2 * before.gradient / before.gradient.norm()
    assert of_four.match(nearer, *way, RATE, draws()).distance < before.distance
    assert of_four.match(images, *way, RATE, draws()).distance == before.distance, "of the same draws"


def test_the_best_learning_rate_is_the_best_of_one_step(spec, images, way):
    best = student(spec).match(images, *way, RATE, draws(), with_gradient=False).best_lr
    least = distance(spec, images, way, lr=best)
    assert all(distance(spec, images, way, lr=factor * best) > least for factor in (0.8, 1.2))
    assert 0 < least < 1


def test_the_best_learning_rate_stays_positive_for_wrong_images(spec, images, way):
    wrong = images.roll(2, dims=0)  # every class shows another
    assert 0 < student(spec).match(wrong, *way, RATE, draws(), with_gradient=False).best_lr < 1e-3


def test_loading_parameters_keeps_the_network_where_it_lies(way):
    network = build_network("convnet", 3, 16, seed=7)
    where = [parameter.data_ptr() for parameter in network.parameters()]
    load_flat_parameters(network, way[1])
    assert torch.equal(flat_parameters(network), way[1])
    assert [parameter.data_ptr() for parameter in network.parameters()] == where
