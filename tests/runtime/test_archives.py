from pathlib import PurePosixPath

import pytest

from ddkit.runtime.archives import member_path


@pytest.mark.parametrize("name", ["train/cat/1.png", "./train/cat/1.png", "train\\cat\\1.png", "train/./cat//1.png"])
def test_member_path_is_the_same_whatever_program_wrote_the_name(name):
    assert member_path(name) == PurePosixPath("train/cat/1.png")


@pytest.mark.parametrize("name", ["ab: c/1.png", "..cat/1.png", "a...b"])
def test_member_path_keeps_names_that_only_look_dangerous(name):
    assert str(member_path(name)) == name


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../up", "a/../../up", "a\\..\\up", "\\share\\x", "\\\\host\\x", "C:/x", "c:x", "./C:\\x", "a/.."],
)
def test_member_path_that_leads_out_raises_value_error(name):
    with pytest.raises(ValueError, match="leads out of the folder"):
        member_path(name)
