"""The real images of a refinement: which are learned from, in which order, and where they lie."""

import pytest
import torch

from ddkit.data.images import normalize
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.distill.holdout import TrainHoldout


@pytest.fixture
def real(colors):
    return load_dataset(colors, "train")


def holdout(real, **options):
    return TrainHoldout(real, dataset_spec("colors"), held_out=0.2, seed=0, **options)


def test_held_out_images_are_never_learned_from(real):
    ours = holdout(real)
    held_out = ours.held_out()
    assert held_out.labels.tolist() == [0, 1]
    mixed, _ = ours.random_batch(60, torch.Generator().manual_seed(0))
    seen = torch.cat([ours.images(ours.rows(30, number=0)), ours.sample(60), mixed])
    held_out_rows = torch.cat(list(held_out.batches(torch.device("cpu"))))
    assert not any(torch.equal(one, other) for one in seen for other in held_out_rows)
    assert ours.images(ours.rows(2, number=0)).shape == (4, 3, 16, 16)


def test_every_real_image_comes_once_before_any_comes_again(real):
    ours = holdout(real)
    batches = [ours.images(ours.rows(2, number)).unflatten(0, (2, 2)) for number in range(4)]  # of four images a class
    for first, second in (batches[:2], batches[2:]):
        for c in range(2):
            assert len(torch.cat([first[c], second[c]]).unique(dim=0)) == 4
    assert not torch.equal(torch.cat(batches[:2], 1), torch.cat(batches[2:], 1))


def test_held_out_images_of_the_set_itself_do_not_count_in_validation(real):
    ours, spec = holdout(real), dataset_spec("colors")
    (first,), (second,) = (held_out.split(1) for held_out in (ours.held_out().images[:1], ours.held_out().images[1:]))
    for known, left in ((first, [1]), (second, [0]), (torch.cat([first, second]), [0, 1])):
        assert ours.held_out(without=normalize(known, spec)).labels.tolist() == left
    assert ours.held_out(without=normalize(first, spec) + 0.1).labels.tolist() == [0, 1]


@pytest.mark.parametrize("largest_tensor, kept_there", [(None, True), (7000, False)])
def test_images_on_a_gpu_are_those_on_the_cpu_also_where_not_all_fit(real, gpu, largest_tensor, kept_there):
    assert real.images.numel() > 7000, "too many bytes for the smaller GPU"
    gpu.largest_tensor = largest_tensor
    device = torch.device("cuda")
    ours, there = holdout(real), holdout(real, device=device)
    rows = ours.rows(1, number=0)
    there.images(rows)
    gpu.reset()
    found = there.images(rows)
    assert not gpu.waits
    assert found.device.type == "cuda" and torch.equal(found.cpu(), ours.images(rows))
    assert (there._pixels.device.type == "cuda") == kept_there
