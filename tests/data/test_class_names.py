"""The class orders of the protocol, repeated here so that an accidental edit fails."""

from ddkit.challenge import DATASETS
from ddkit.data.class_names import CLASS_NAMES


def test_built_in_datasets_have_a_different_name_for_each_class():
    assert {name: len(names) for name, names in CLASS_NAMES.items()} == {
        name: spec.num_classes for name, spec in DATASETS.items()
    }
    assert all(len(set(names)) == len(names) for names in CLASS_NAMES.values())


def test_names_are_sorted_as_strings():
    assert all(list(names) == sorted(names) for names in CLASS_NAMES.values())


def test_names_at_known_labels():
    cifar = CLASS_NAMES["cifar100"]
    assert [cifar[label] for label in (0, 1, 4, 30, 55, 72, 99)] == [
        "apple", "aquarium_fish", "beaver", "dolphin", "otter", "seal", "worm",
    ]  # fmt: skip
    tiny = CLASS_NAMES["tinyimagenet"]
    assert (tiny[0], tiny[1], tiny[199]) == ("n01443537", "n01629819", "n12267677")
