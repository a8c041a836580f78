"""The minimax criteria: recorded values, a plain version beside them, memories, and several processes."""

from collections import defaultdict, deque
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.nn import functional as F

from ddkit.generator.minimax import MinimaxCriteria

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens" / "minimax.safetensors"
CLASSES, MEMORY = 4, 3


class Plain:
    """The definition, one image and one class after another."""

    def __init__(self, memory_size):
        self.real = defaultdict(lambda: deque(maxlen=memory_size))
        self.predicted = defaultdict(lambda: deque(maxlen=memory_size))

    def __call__(self, predicted, real, labels):
        present = sorted(set(labels.tolist()))
        representativeness = diversity = predicted.sum() * 0
        for label in present:
            own = predicted[labels == label].flatten(1)
            if self.predicted[label]:
                to_real = [F.cosine_similarity(z, m, dim=0) for z in own for m in self.real[label]]
                to_predicted = [F.cosine_similarity(z, m, dim=0) for z in own for m in self.predicted[label]]
                representativeness = representativeness + (1 - torch.stack(to_real).min()) / len(present)
                diversity = diversity + torch.stack(to_predicted).max() / len(present)
        for image, label in enumerate(labels.tolist()):
            self.real[label].append(real[image].detach().flatten())
            self.predicted[label].append(predicted[image].detach().flatten())
        return representativeness, diversity


def batch(size=6, seed=0, shape=(2, 3), classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    predicted, real = torch.randn(2, size, *shape, generator=generator)
    return predicted, real, torch.randint(classes, (size,), generator=generator)


def gradient(criteria, predicted, real, labels):
    """Values, and the gradient of a sum in which both count, differently."""
    predicted = predicted.clone().requires_grad_()
    representativeness, diversity = criteria(predicted, real, labels)
    (representativeness + 3 * diversity).backward()
    return representativeness.detach(), diversity.detach(), predicted.grad


def close(found, expected, tolerance=1e-5):
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(found, expected, strict=True))


def test_criteria_agree_with_recorded_values_and_gradients():
    goldens = load_file(GOLDENS)
    criteria = MinimaxCriteria(3, 5)
    for step in range(7):
        predicted = goldens[f"step{step}.predicted_latents"].requires_grad_()
        found = criteria(predicted, goldens[f"step{step}.real_latents"], goldens[f"step{step}.labels"])
        (0.002 * found[0] + 0.008 * found[1]).backward()
        assert close(found, (goldens["representativeness"][step], goldens["diversity"][step])), step
        if step == 0:
            assert not predicted.grad.any(), "nothing is remembered yet"
        else:
            # Gradients are of the order of 1e-4, so they are held to more than the 1e-5 asked for.
            assert close([predicted.grad], [goldens[f"step{step}.grad_of_weighted_sum"]], 1e-8), step
    assert found[0] > 0


@pytest.mark.parametrize(("classes", "size"), [(CLASSES, 6), (CLASSES, 1), (50, 6), (1, 9)])
def test_criteria_agree_with_the_plain_definition_over_many_steps(classes, size):
    """Few classes of many, all classes, one image, and more images of a class than places."""
    criteria, plain = MinimaxCriteria(classes, MEMORY), Plain(MEMORY)
    for seed in range(25):
        given = batch(size, seed, classes=classes)
        assert close(gradient(criteria, *given), gradient(plain, *given)), seed
    assert criteria.seen.sum() == 25 * size


def test_criteria_agree_with_values_computed_by_hand():
    """Two classes in the batch, one of which has memories: what it adds is divided by two."""
    criteria = MinimaxCriteria(2, 4)
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    first = criteria(torch.stack([x, x]), torch.stack([x, y]), torch.tensor([0, 0]))
    assert [value.item() for value in first] == [0, 0]
    second = criteria(torch.stack([3 * x + 4 * y, y]), torch.stack([x, y]), torch.tensor([0, 1]))
    assert [value.item() for value in second] == pytest.approx([(1 - 0.6) / 2, 0.6 / 2])


def test_memories_are_first_in_first_out_and_keep_the_last_of_a_large_batch():
    criteria = MinimaxCriteria(2, MEMORY)
    axes = torch.eye(8)
    criteria(axes[:2], axes[:2], torch.tensor([1, 1]))
    criteria(axes[2:4], axes[2:4], torch.tensor([1, 1]))
    assert {row.argmax().item() for row in criteria.real[1]} == {1, 2, 3}
    criteria(axes[3:], axes[3:], torch.ones(5, dtype=torch.int64))
    assert {row.argmax().item() for row in criteria.predicted[1]} == {5, 6, 7}
    assert criteria.seen.tolist() == [0, 9]


def test_no_gradient_reaches_real_latents_or_earlier_predictions():
    criteria = MinimaxCriteria(1, 2)
    labels = torch.zeros(2, dtype=torch.int64)
    earlier, real, now = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    criteria(earlier, real, labels)
    sum(criteria(now, real, labels)).backward()
    assert earlier.grad is None and real.grad is None
    assert now.grad.abs().sum() > 0


def test_half_precision_latents_are_compared_in_float32():
    predicted, real, labels = batch()
    rounded = predicted.bfloat16()
    half, full = MinimaxCriteria(CLASSES, MEMORY), MinimaxCriteria(CLASSES, MEMORY)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = half(rounded, real, labels)
        assert close(found, full(rounded.float(), real, labels), 1e-6)
    assert found[0].dtype == torch.float32


def test_buffers_hold_only_two_memories_and_a_count():
    criteria = MinimaxCriteria(CLASSES, MEMORY)
    criteria(*batch())
    assert sum(buffer.nbytes for buffer in criteria.buffers()) == 2 * CLASSES * MEMORY * 6 * 4 + CLASSES * 8
    assert not list(criteria.parameters())


@pytest.mark.parametrize("used", [False, True])
def test_loaded_state_continues_bit_for_bit(tmp_path, used):
    criteria = MinimaxCriteria(CLASSES, MEMORY)
    for seed in range(3):
        criteria(*batch(seed=seed))
    torch.save(criteria.state_dict(), tmp_path / "state.pt")
    resumed = MinimaxCriteria(CLASSES, MEMORY)
    if used:
        resumed(*batch(seed=99, shape=(5,)))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3, 6):
        given = batch(seed=seed)
        assert all(map(torch.equal, gradient(resumed, *given), gradient(criteria, *given)))


def test_state_before_the_first_batch_loads():
    resumed = MinimaxCriteria(CLASSES, MEMORY)
    resumed.load_state_dict(MinimaxCriteria(CLASSES, MEMORY).state_dict())
    assert resumed(*batch())[0] == 0


def test_state_of_other_sizes_raises():
    criteria = MinimaxCriteria(CLASSES, MEMORY)
    criteria(*batch())
    with pytest.raises(RuntimeError, match="size mismatch"):
        MinimaxCriteria(CLASSES, MEMORY + 1).load_state_dict(criteria.state_dict())


def one_of_two(folder):
    """A process of a group of two; each sees half of every batch."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    criteria, results = MinimaxCriteria(CLASSES, MEMORY), []
    for seed in range(4):
        own = [rows.chunk(2)[rank] for rows in batch(8, seed)]
        results.append(gradient(criteria, *own))
    torch.save((results, criteria.state_dict()), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_the_same_as_one(tmp_path):
    """Values and memories are those of the whole batch; gradients averaged as DistributedDataParallel does as well."""
    here = Path(__file__)
    code = (
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem}; {here.stem}.one_of_two({str(tmp_path)!r})"
    )
    both = processes.run_together("-c", code)
    assert [process.returncode for process in both] == [0, 0], both
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = MinimaxCriteria(CLASSES, MEMORY)
    for seed, (one, other) in enumerate(zip(first[0], second[0], strict=True)):
        *values, grad = gradient(alone, *batch(8, seed))
        assert close(one[:2], values, 1e-6) and close(other[:2], values, 1e-6)
        # Each averages its rows' gradient with the other's nought.
        assert close([torch.cat([one[2], other[2]]) / 2], [grad], 1e-6)
    assert grad.abs().sum() > 0
    for state in (first[1], second[1]):
        assert all(torch.equal(state[name], value) for name, value in alone.state_dict().items())
