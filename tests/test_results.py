import dataclasses
import json

import pytest
from scipy import stats

from ddkit.errors import BadFileError
from ddkit.results import FORMAT_VERSION, Records, Result, append, read

RESULT = Result(
    name="mine", dataset="cifar100", track=1, sha256="0" * 64, source="submission/cifar100.pt", images=1000,
    images_per_class=(10, 10), epochs_setting=1000, accuracies=(0.25, 0.26, 0.245),
    confusions=((1, 2, 3.5),), loss_curves=((4.6, 1.0),), made_by={"seed": 3},
)  # fmt: skip


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs" / "results.jsonl"


def test_appended_results_are_read_back(file):
    other = dataclasses.replace(RESULT, name="other", official=True)
    append(RESULT, file)
    append(other, file)
    assert read(file) == read(str(file))
    assert read(file).results == (RESULT, other) and read(file).problems == ()


def test_a_torn_last_line_is_kept_and_reported_and_appended_after(file):
    append(RESULT, file)
    torn = file.read_bytes() + b'{"name": "to'
    file.write_bytes(torn)
    append(RESULT, file)
    assert file.read_bytes().startswith(torn + b"\n")
    reading = read(file)
    assert reading.results == (RESULT, RESULT)
    assert len(reading.problems) == 1 and f"{file}, line 2" in reading.problems[0]


@pytest.mark.parametrize("change, said", [
    ({"format": FORMAT_VERSION + 1}, "format version 2"),
    ({"color": "red"}, "unknown fields color"),
    ({"accuracies": None}, "fields missing: accuracies"),
    ({"accuracies": []}, "accuracies cannot be []"),
    ({"accuracies": [0.25, "a"]}, 'accuracies cannot be [0.25, "a"]'),
    ({"accuracies": [25.0, 26.0]}, "accuracies cannot be"),  # percentages
    ({"images_per_class": 10}, "images_per_class cannot be 10"),
    ({"track": "1"}, "track cannot be"),
    ({"track": 3}, "track cannot be 3"),
    ({"name": ["mine"]}, "name cannot be"),
    ({"official": 1}, "official cannot be 1"),
    ({"loss_curves": [1.0, 2.0]}, "loss_curves cannot be"),
    ({"confusions": [[1, 2]]}, "confusions cannot be"),
    ({"made_by": "me"}, "made_by cannot be"),
    ({"confusions": [[0.5, 1, 2]]}, "confusions cannot be"),
    ({"seconds": 10**400}, "seconds cannot be"),
    ({"loss_curves": [[10**400, 1]]}, "loss_curves cannot be"),
    ({"name": "a\ud800b"}, "name cannot be"),
])  # fmt: skip
def test_records_that_cannot_be_used_are_reported_and_skipped(file, change, said):
    record = {**dataclasses.asdict(RESULT), **change}
    record = {name: value for name, value in record.items() if value is not None}
    file.parent.mkdir()
    file.write_text(json.dumps(record) + "\n[1]\n\n")
    append(RESULT, file)
    reading = read(file)
    assert reading.results == (RESULT,)
    assert said in reading.problems[0] and "not a JSON object" in reading.problems[1]


def test_mean_spread_and_interval_are_students():
    assert RESULT.mean == pytest.approx(0.251667, abs=1e-6)
    assert RESULT.std == pytest.approx(stats.tstd(RESULT.accuracies))
    low, high = stats.t.interval(0.95, 2, RESULT.mean, stats.sem(RESULT.accuracies))
    assert RESULT.interval == pytest.approx((low, high))


def test_a_folder_in_the_way_is_a_clear_error(tmp_path):
    with pytest.raises(BadFileError, match=str(tmp_path)):
        append(RESULT, tmp_path)


def test_records_are_written_at_once_and_known_ones_not_again(file):
    append(RESULT, file)
    other = dataclasses.replace(RESULT, seed=1, made_by={})
    records = Records(file)
    records.add(dataclasses.replace(RESULT, date="2026-01-01", seconds=9.0))  # read back from its finished state
    assert [records.add(other), records.add(other)] == [True, False]
    assert records.results == (RESULT, other) == read(file).results


def test_a_result_of_a_file_that_was_renamed_is_recorded_under_the_new_path(file):
    renamed = dataclasses.replace(RESULT, source="submission/renamed.pt")
    append(RESULT, file)
    assert Records(file).add(renamed) and not Records(file).add(renamed)
    assert [result.source for result in read(file).results] == ["submission/cifar100.pt", "submission/renamed.pt"]


def test_a_result_on_other_test_images_is_recorded_even_if_it_is_equal(file):
    append(RESULT, file)
    assert Records(file).add(dataclasses.replace(RESULT, test_sha256="ab" * 32))


def test_an_old_record_is_written_again_with_the_accuracies_by_class_and_round(file):
    append(RESULT, file)
    whole = dataclasses.replace(RESULT, class_rounds=((0.25, 0.25),) * 3)
    for _ in range(2):
        Records(file).add(whole)
    assert read(file).results == (RESULT, whole) and Records(file).results == (whole,)


def test_records_that_are_not_to_be_written_are_remembered(file):
    records = Records(file, writes=False)
    records.add(RESULT)
    assert records.results == (RESULT,) and not file.exists()


def test_a_file_that_cannot_be_written_is_known_before_anything_is_computed(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(BadFileError, match="where a folder is needed"):
        Records(tmp_path / "results.jsonl" / "results.jsonl")
