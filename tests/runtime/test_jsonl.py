import os

import pytest

from ddkit.errors import BadFileError
from ddkit.runtime.jsonl import append_line, read_lines, require_appendable


def test_append_line_after_a_torn_line_begins_a_new_one(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    append_line(path, "one")
    path.write_text(path.read_text() + '"to')
    append_line(path, {"two": 2})
    assert path.read_text() == '"one"\n"to\n{"two": 2}\n'
    assert read_lines(path) == [(1, "one"), (3, {"two": 2})]


def test_append_line_of_a_name_that_is_not_unicode_replaces_the_letter(tmp_path):
    append_line(tmp_path / "lines", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "lines").read_text(encoding="utf-8") == '"caf?"\n'


def test_read_lines_reports_each_line_that_is_not_json(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"1\n\n{\n" + b"[" * 100_000 + b"\n\xff\n2\n")
    problems = {}
    assert read_lines(path, problems.__setitem__) == [(1, 1), (6, 2)]
    assert list(problems) == [3, 4, 5] and problems[4] == "nested too deeply"


def test_read_lines_of_a_missing_file_is_empty_and_of_a_folder_raises_bad_file_error(tmp_path):
    assert read_lines(tmp_path / "absent") == []
    with pytest.raises(BadFileError, match=str(tmp_path)):
        read_lines(tmp_path)


def test_require_appendable_raises_what_append_line_would_without_writing(tmp_path):
    require_appendable(tmp_path / "deep" / "lines.txt")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(BadFileError, match=str(tmp_path)):
        require_appendable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFileError, match="Not a directory|File exists"):
        require_appendable(tmp_path / "file" / "deep" / "lines.txt")
