"""Choosing images: class order, reproducible choices, and what each way of choosing is after."""

import pytest
import torch

from ddkit.errors import UsageError
from ddkit.sets.select import (
    FEATURE_METHODS,
    LABEL_METHODS,
    ImageFeatures,
    choose,
    choose_for_each_mode,
    choose_in_class,
)

LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 2, 2])


def clustered(sizes=(40, 20, 10), seed=0, spread=0.05):
    """A class of well separated clusters: its view, and the cluster of each image."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    clusters = clusters[torch.randperm(len(clusters), generator=generator)]
    corners = 3 * torch.eye(len(sizes), 8)
    features = corners[clusters] + spread * torch.randn(len(clusters), 8, generator=generator)
    return ImageFeatures(features, torch.rand(len(clusters), generator=generator)), clusters


def chosen(how, view, ipc, seed=0):
    return choose_in_class(how, len(view.features), ipc, seed=seed, label=0, features=view)


def test_first_takes_the_first_rows_of_each_class():
    assert choose("first", LABELS, 2, 3, seed=0).tolist() == [0, 2, 1, 3, 8, 9]


def test_random_takes_different_rows_of_each_class_by_seed():
    many = torch.arange(5).repeat(40)
    rows = choose("random", many, 10, 5, seed=1)
    assert torch.equal(many[rows], torch.arange(5).repeat_interleave(10))
    assert len(set(rows.tolist())) == 50
    assert torch.equal(rows, choose("random", many, 10, 5, seed=1))
    assert not torch.equal(rows, choose("random", many, 10, 5, seed=2))
    assert torch.equal(rows.view(5, 10)[:, :3].flatten(), choose("random", many, 3, 5, seed=1))


@pytest.mark.parametrize("how", [*LABEL_METHODS, *FEATURE_METHODS])
@pytest.mark.parametrize("ipc", [1, 7, 70])
def test_every_method_takes_different_images_deterministically(how, ipc):
    view, _ = clustered()
    rows = chosen(how, view, ipc)
    assert rows.dtype == torch.int64
    assert len(set(rows.tolist())) == ipc
    assert torch.equal(rows, chosen(how, view, ipc))


@pytest.mark.parametrize("how", ["k-center", "k-medoids", "minimax", "herding"])
def test_method_takes_one_image_of_each_cluster(how):
    view, clusters = clustered(sizes=(20, 20, 20))
    assert sorted(clusters[chosen(how, view, 3)].tolist()) == [0, 1, 2]


def test_herding_keeps_the_mean_better_than_random():
    view, _ = clustered(sizes=(40, 20, 10), spread=0.5)
    error = (view.features[chosen("herding", view, 14)].mean(0) - view.features.mean(0)).norm()
    for seed in range(20):
        assert error < (view.features[chosen("random", view, 14, seed)].mean(0) - view.features.mean(0)).norm()


def test_k_center_takes_a_distant_image():
    view, clusters = clustered(sizes=(60, 60, 1))
    assert 2 in clusters[chosen("k-center", view, 3)]


def test_k_medoids_take_the_middle_of_each_cluster():
    view, clusters = clustered(sizes=(10, 20, 30, 40))
    rows = chosen("k-medoids", view, 4).tolist()
    assert clusters[rows].tolist() == [3, 2, 1, 0], "that of the largest cluster first"
    for row in rows:
        own = view.features[clusters == clusters[row]]
        distances = (own - own.mean(0)).norm(dim=1)
        assert (view.features[row] - own.mean(0)).norm() == distances.min()


def test_confidence_methods_take_their_bands():
    view, _ = clustered()
    order = view.confidence.argsort(descending=True)
    assert torch.equal(chosen("most-confident", view, 5), order[:5])
    assert torch.equal(chosen("least-confident", view, 5), order.flip(0)[:5])
    assert torch.equal(chosen("median", view, 10), order[30:40])
    assert torch.equal(chosen("stratified", view, 7), order[5::10])


def test_features_are_extracted_one_class_at_a_time():
    seen = []

    def extract(rows):
        seen.append(rows.tolist())
        return ImageFeatures(rows[:, None].float(), rows.float())

    assert choose("most-confident", LABELS, 1, 3, seed=0, extract=extract).tolist() == [6, 7, 9]
    assert seen == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 9]]


@pytest.mark.parametrize(
    ("how", "ipc", "said"),
    [
        ("first", 5, "Class 2 has 2 images.*--ipc 2 at most"),  # and the others four
        ("rnadom", 1, "Did you mean 'random'"),
        ("confident", 1, "Did you mean 'most-confident'"),
        ("k-centers", 1, "Did you mean 'k-center'"),
        ("herding", 1, "needs the images' features"),
    ],
)
def test_invalid_choice_raises_usage_error(how, ipc, said):
    with pytest.raises(UsageError, match=said):
        choose(how, LABELS, ipc, 3, seed=0)


def test_one_image_is_chosen_for_each_mode():
    confidence = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.95])  # images 0, 2 and 4 share a mode, and 1 and 3
    features = ImageFeatures(torch.zeros(5, 2), confidence)
    found = choose_for_each_mode("most-confident", 5, 2, seed=0, label=0, features=features)
    assert found.tolist() == [4, 3]
    assert choose_for_each_mode("first", 5, 2, seed=0, label=0).tolist() == [0, 1]
