"""Two evaluated sets side by side, by name, file or hash."""

import dataclasses

import pytest
import torch
from PIL import Image

from ddkit.data.images import normalize
from ddkit.data.prepare import prepare
from ddkit.data.store import dataset_spec, load_dataset
from ddkit.errors import MissingDataError, UsageError
from ddkit.reporting.compare import compare_sets, comparison_sheet
from ddkit.reporting.html import render
from ddkit.reporting.page import gather
from ddkit.runtime.files import sha256_of
from ddkit.sets.distilled import save_set

BY_ROUND = ((0.2, 0.5, 0.9, 0.4), (0.3, 0.6, 0.9, 0.4), (0.25, 0.52, 0.93, 0.4))


@pytest.fixture
def pair(result, monkeypatch, tmp_path):
    """Two results of four classes; the second learns class 0 clearly better, and the others alike."""
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path / "cache"))

    def of(name, by_round, **more):
        accuracies = [sum(classes) / 4 for classes in by_round]
        mean = tuple(sum(classes) / 3 for classes in zip(*by_round, strict=True))
        names = {"class_names": ["apple", "bear", "cat", "dog"]}
        return result(name, "mine", *accuracies, per_class=mean, class_rounds=by_round, made_by=names, **more)

    better = tuple((classes[0] + 0.4 + 0.01 * k, *classes[1:]) for k, classes in enumerate(BY_ROUND))
    return [of("old", BY_ROUND), of("new", better)]


def test_classes_are_compared_round_by_round_largest_difference_first(pair):
    (found,) = compare_sets("new", "old", pair)
    first, *others = found.classes
    assert (first.name, first.estimate.value) == ("apple", pytest.approx(0.41))
    assert first.estimate.is_clear and first.estimate.half_width == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert all(each.estimate.value == pytest.approx(0) and each.estimate.half_width is None for each in others)
    assert found.paired and found.difference.value == pytest.approx(0.1025)
    assert "1 of 4 classes differ by more than their interval" in " ".join(found.remarks)


def test_other_seed_or_number_of_rounds_is_not_paired(pair):
    old, new = pair
    (found,) = compare_sets("old", "new", [old, dataclasses.replace(new, seed=1)])
    assert not found.paired and found.classes[0].estimate.half_width > 0


@pytest.mark.parametrize("seed, said", [(0, "The difference is the same in every round"), (1, "The rounds do not vary")])
def test_rounds_that_do_not_vary_give_a_difference_and_say_that_it_has_no_interval(result, seed, said):
    none, all_ = result("none", "cifar100", 0.0, 0.0, 0.0), result("all", "cifar100", 1.0, 1.0, 1.0, seed=seed)
    (found,) = compare_sets("all", "none", [none, all_])
    assert found.difference.value == 1 and found.difference.half_width is found.difference.is_clear is None
    assert f"{said}, so no interval can be given" in found.remarks[0]


def test_records_without_classes_by_round_have_no_intervals_and_say_so(pair):
    older = [dataclasses.replace(each, class_rounds=()) for each in pair]
    (found,) = compare_sets("new", "old", older)
    assert found.classes[0].estimate.value == pytest.approx(0.41) and found.classes[0].estimate.half_width is None
    assert "ddkit evaluate again" in found.remarks[0]


def test_sets_are_named_by_file_and_by_hash(pair, tmp_path):
    path = tmp_path / "mine.pt"
    torch.save(torch.zeros(4), path)
    old, new = pair
    new = dataclasses.replace(new, sha256=sha256_of(path), source=str(path))
    for word in (str(path), new.sha256[:8]):
        (found,) = compare_sets(word, "old", [old, new])
        assert found.first == new
    torch.save(torch.ones(4), path)
    with pytest.raises(MissingDataError, match="was not evaluated as it is.*ddkit evaluate"):
        compare_sets(str(path), "old", [old, new])


def test_page_names_the_set_that_a_recipe_is_of(pair, tmp_path):
    recipe, old = tmp_path / "recipe.toml", pair[0]
    recipe.write_text(f'sha256 = "{old.sha256}"')
    (found,) = compare_sets("new", "old", [dataclasses.replace(old, source=str(tmp_path / "mine.pt")), pair[1]])
    html = render(gather([], comparisons=[found]))
    assert found.recipes == ("", str(recipe)) and "Recipe of old:" in html and "Recipe of new:" not in html


def test_real_images_are_named_as_on_the_leaderboard(pair):
    old, new = pair
    (found,) = compare_sets("new", "random real images", [dataclasses.replace(old, kind="random-real"), new])
    assert found.names == ("new", "old")


@pytest.mark.parametrize("words, said", [
    (("nwe", "old"), "Did you mean 'new'"), (("new", "new"), "are the same"), (("abc", "old"), "Nothing was recorded"),
])  # fmt: skip
def test_names_that_cannot_be_compared_are_refused(pair, words, said):
    with pytest.raises(UsageError, match=said):
        compare_sets(*words, pair)


def test_sets_of_another_track_are_refused_with_the_track_to_name(pair):
    with pytest.raises(UsageError, match=r"'new' was evaluated on track 1 only\. Compare it with --track 1"):
        compare_sets("new", "old", pair, tracks=[2])


def test_sets_of_other_settings_are_not_compared(pair, result):
    quick = result("quick", "mine", 0.1, 0.2, epochs_setting=5)
    with pytest.raises(UsageError, match="not evaluated under the same settings: mine, E = 1000.* and mine, E = 5"):
        compare_sets("new", "quick", [*pair, quick])


def test_sets_that_were_tested_on_other_images_are_not_compared(pair):
    first, second = (dataclasses.replace(each, test_sha256=sha) for each, sha in zip(pair, ("ab", "cd"), strict=True))
    with pytest.raises(UsageError, match="not tested on the same images"):
        compare_sets("new", "old", [first, second])


def test_generators_are_compared_without_pairs_and_only_within_the_same_time(result):
    facts = {"track": 2, "official": False, "epochs_setting": 100}
    first, second = (result(name, "mine", *scores, ipc=ipc, time_budget=600.0, **facts)
                     for name, ipc, scores in (("a", 217, (0.3, 0.31)), ("b", 190, (0.2, 0.22))))  # fmt: skip
    (found,) = compare_sets("a", "b", [first, second])
    assert not found.paired
    with pytest.raises(UsageError, match="not evaluated under the same settings"):
        compare_sets("a", "b", [first, dataclasses.replace(second, time_budget=60.0)])


def test_most_rounds_are_preferred(result):
    both = [
        result(name, "cifar100", *accuracies, epochs_setting=setting, date=f"2026-07-0{day}T10:00:00+00:00")
        for name in ("a", "b")
        for day, setting, accuracies in ((1, 200, (0.3, 0.31, 0.32)), (2, 50, (0.2,)))
    ]
    (found,) = compare_sets("a", "b", both)
    assert found.first.rounds == found.second.rounds == 3


def test_official_results_are_preferred(result):
    both = [
        result(name, "cifar100", *accuracies, epochs_setting=setting)
        for name, accuracies in (("a", (0.3, 0.31, 0.32)), ("b", (0.2, 0.21, 0.23)))
        for setting in (1000, 50)
    ]
    (found,) = compare_sets("a", "b", both)
    assert found.first.official and found.second.official


def test_sheet_of_sets_that_are_gone_is_none(pair):
    (found,) = compare_sets("new", "old", pair)
    assert comparison_sheet(found) is None


def test_classes_of_the_same_title_show_their_own_pictures(result, own_cache, tmp_path):
    for name, color in (("a b", (200, 0, 0)), ("a_b", (0, 0, 200))):
        for split in ("train", "test"):
            path = tmp_path / "pictures" / split / name / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (16, 16), color).save(path)
    prepare("mine", tmp_path / "pictures")
    real, spec = load_dataset("mine", "train"), dataset_spec("mine")
    evaluated = []
    for name in ("one", "two"):
        images = (real.images.flip(3) if name == "one" else real.images // 2).contiguous()
        path = save_set(tmp_path / name / "mine.pt", normalize(images, spec), spec, {}).tensor
        evaluated.append(result(name, "mine", 0.5, per_class=(0.4, 0.6), source=str(path), sha256=sha256_of(path)))
    (found,) = compare_sets("one", "two", evaluated)
    assert [first.name for first, _ in found.pictures] == ["a b", "a b"] and not found.remarks[1:]
    assert len({pictures.pictures for pair in found.pictures for pictures in pair}) == 4
