"""Random numbers by name, and the endless shuffled sequence."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddkit.runtime.seeds import Shuffling, derived_seed, generator_for


def test_seeds_differ_wherever_a_part_does():
    seeds = {derived_seed(*parts) for parts in (("a", 1, 2), ("a", 12), ("a", 2, 1), ("b", 1, 2), ("a", 1), (1, "a", 2))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_depends_on_its_parts_alone():
    first = torch.randn(5, generator=generator_for("cpu", "noise", 3))
    torch.randn(100)
    assert torch.equal(first, torch.randn(5, generator=generator_for("cpu", "noise", 3)))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 20), start=st.integers(0, 100), length=st.integers(1, 60))
def test_any_stretch_of_the_sequence_is_the_same_however_it_is_come_by(count, start, length):
    whole = Shuffling(count, seed=4).take(0, start + length)
    assert torch.equal(Shuffling(count, seed=4).take(start, length), whole[start:])


def test_each_epoch_is_another_permutation():
    order = Shuffling(50, seed=0).take(0, 150).view(3, 50)
    assert torch.equal(order.sort(dim=1).values, torch.arange(50).expand(3, 50))
    assert not torch.equal(order[0], order[1]) and not torch.equal(order[1], order[2])
    assert not torch.equal(order[0], Shuffling(50, seed=1).take(0, 50))
