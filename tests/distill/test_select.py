"""Choosing real images: class order, the first ones, and a choice that depends on seed and class alone."""

import pytest
import torch

from ddkit.distill.select import choose
from ddkit.errors import UsageError

LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 2, 2])


def test_the_first_are_the_first_of_each_class():
    assert choose("first", LABELS, 2, 3, seed=0).tolist() == [0, 2, 1, 3, 8, 9]


def test_a_random_choice_is_of_each_class_without_repeats_and_by_seed():
    many = torch.arange(5).repeat(40)
    chosen = choose("random", many, 10, 5, seed=1)
    assert torch.equal(many[chosen], torch.arange(5).repeat_interleave(10))
    assert len(set(chosen.tolist())) == 50
    assert torch.equal(chosen, choose("random", many, 10, 5, seed=1))
    assert not torch.equal(chosen, choose("random", many, 10, 5, seed=2))
    assert torch.equal(chosen.view(5, 10)[:, :3].flatten(), choose("random", many, 3, 5, seed=1))


@pytest.mark.parametrize(
    ("how", "ipc", "said"), [("first", 3, "Class 2 has 2 images"), ("random", 0, "at least one"), ("rnadom", 1, "random")]
)
def test_what_cannot_be_chosen_is_refused(how, ipc, said):
    with pytest.raises(UsageError, match=said):
        choose(how, LABELS, ipc, 3, seed=0)
