"""The records of packed zips, their names, and what is known of a file by its hash."""

import dataclasses

import pytest

from ddkit.errors import BadFileError, UsageError
from ddkit.history import PackedRecords, find_recipe, known_files, packed_file
from ddkit.results import Result

FIRST, SECOND = {"cifar100.pt": "a" * 64}, {"cifar100.pt": "b" * 64}


@pytest.fixture
def records(tmp_path):
    return PackedRecords(tmp_path / "packed.jsonl")


def result(sha256="a" * 64, **changes):
    usual = {"name": "mine", "dataset": "cifar100", "track": 1, "source": "submission/cifar100.pt", "images": 1000}
    more = {"images_per_class": (10, 10), "epochs_setting": 50, "accuracies": (0.25, 0.35), "date": "2026-11-27T10:00:00+00:00"}
    return Result(sha256=sha256, **{**usual, **more, **changes})


def test_added_zip_is_read_back(records, tmp_path):
    added = records.add("first try", tmp_path / "s.zip", "c" * 64, 1, FIRST, "recipe.toml")
    (read,) = PackedRecords(records.path).records
    assert read == added == records.records[0]
    assert read.recipe == "recipe.toml" and read.date.startswith("20") and dict(read.files) == FIRST


def test_same_zip_under_the_same_name_is_recorded_once(records, tmp_path):
    for name in ("s", "s", "other"):
        records.add(name, tmp_path / "s.zip", "c" * 64, 1, FIRST)
    assert [each.name for each in PackedRecords(records.path).records] == ["s", "other"]


def test_given_name_of_other_files_is_refused_and_a_free_one_is_offered(records, tmp_path):
    records.add("best", tmp_path / "s.zip", "c" * 64, 1, FIRST)
    with pytest.raises(UsageError, match=r"'best' was given to other files.*--name best-2"):
        records.choose_name("best", "submission", SECOND)
    assert records.choose_name("best", "submission", FIRST) == ("best", "")


def test_usual_name_of_other_files_gets_a_number_and_a_sentence(records, tmp_path):
    assert records.choose_name(None, "submission", FIRST) == ("submission", "")
    records.add("submission", tmp_path / "s.zip", "c" * 64, 1, FIRST)
    name, remark = records.choose_name(None, "submission", SECOND)
    assert name == "submission-2" and "'submission' names other files" in remark
    records.add(name, tmp_path / "s.zip", "d" * 64, 1, SECOND)
    assert records.choose_name(None, "submission", {"cifar100.pt": "e"})[0] == "submission-3"
    assert records.choose_name(None, "submission", FIRST) == ("submission", "")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "\x1b[31m"])
def test_name_that_cannot_be_printed_is_refused(records, name):
    with pytest.raises(UsageError, match="cannot be a name"):
        records.choose_name(name, "submission", FIRST)


def test_torn_line_is_named_and_followed(records, tmp_path):
    records.path.write_text('{"name": "torn')
    found = PackedRecords(records.path)
    assert found.records == () and "line 1" in found.problems[0]
    found.add("s", tmp_path / "s.zip", "c" * 64, 1, FIRST)
    assert len(PackedRecords(records.path).records) == 1


def test_records_that_cannot_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFileError):
        PackedRecords(tmp_path / "file" / "packed.jsonl")
    assert PackedRecords(tmp_path / "none" / "packed.jsonl", writes=False).records == ()


def test_packed_file_lies_next_to_the_results(tmp_path):
    assert packed_file(tmp_path / "all.jsonl") == tmp_path / "packed.jsonl"


def test_known_files_tells_evaluations_and_zips_newest_first(records, tmp_path):
    zipped = records.add("final", tmp_path / "s.zip", "c" * 64, 1, FIRST)
    later = result(epochs_setting=1000, official=True, accuracies=(0.4,))
    evaluated = [result(), result("b" * 64), later]
    member, whole, unknown = known_files(
        {"cifar100.pt": "a" * 64, "s.zip": "c" * 64, "x.pt": "f" * 64}, evaluated, records.records
    )
    assert member.results == (later, evaluated[0]) and member.packed == (zipped,) == whole.packed
    assert member.sentences()[0] == (
        "cifar100.pt was evaluated on 2026-11-27 as 'mine': 40.00 % on cifar100, official, E = 1000."
    )
    assert "was packed" in whole.sentences()[0] and "'final'" in whole.sentences()[0]
    assert "in none of the records" in unknown.sentences()[0]


@pytest.mark.parametrize("place", ["submission/cifar100.toml", "submission/recipe.toml", "recipe.toml"])
def test_recipe_is_found_by_the_hash_that_it_names(tmp_path, place):
    (tmp_path / "submission").mkdir()
    (tmp_path / place).write_text('[[sets]]\ndataset = "cifar100"\nsha256 = "' + "a" * 64 + '"\n')
    source = tmp_path / "submission" / "cifar100.pt"
    assert find_recipe(source, "a" * 64) == str(tmp_path / place)
    assert find_recipe(source, "b" * 64) == "" == find_recipe(source, "")
    (known,) = known_files({"cifar100.pt": "a" * 64}, [dataclasses.replace(result(), source=str(source))], ())
    assert known.recipe == str(tmp_path / place) and place in known.sentences()[-1]


@pytest.mark.parametrize("source", [".", "", "/", "..", "submission/"])
def test_a_folder_as_the_source_of_a_result_has_no_recipe_or_the_one_in_it(tmp_path, monkeypatch, source):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert find_recipe(source, "a" * 64) == ""
    (tmp_path / "work" / "recipe.toml").write_text('sha256 = "' + "a" * 64 + '"\n')
    assert find_recipe(source, "a" * 64) == ("" if source == "/" else "recipe.toml")
