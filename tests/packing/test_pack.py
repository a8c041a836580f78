import os
import resource
import signal
import time
import zipfile

import processes
import pytest
import torch

from ddkit.checks.check import check_path
from ddkit.errors import BadFileError, InvalidSubmissionError, MissingDataError, UsageError
from ddkit.packing.pack import pack, packed_files
from ddkit.runtime.files import sha256_of


def test_the_zip_holds_the_tensors_at_its_root_and_is_acceptable(tmp_path, folder):
    out = pack(folder, tmp_path / "submission.zip")
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == ["glyphs.pt"]
        assert archive.read("glyphs.pt") == (folder / "glyphs.pt").read_bytes()
    assert check_path(out).ok
    (file,) = packed_files(out)
    assert (file.name, file.sha256) == ("glyphs.pt", sha256_of(folder / "glyphs.pt"))


def test_the_same_tensors_make_the_same_zip(tmp_path, folder):
    first = pack(folder, tmp_path / "first.zip").read_bytes()
    os.utime(folder / "glyphs.pt", (0, 0))
    (folder / "glyphs.pt").chmod(0o600)
    assert pack(folder, tmp_path / "second.zip").read_bytes() == first


def test_what_check_refuses_is_not_packed_and_the_old_zip_stays(tmp_path, folder):
    out = pack(folder, tmp_path / "submission.zip")
    before = out.read_bytes()
    torch.save(torch.zeros(5), folder / "glyphs.pt")
    with pytest.raises(InvalidSubmissionError, match="was not packed: glyphs.pt: The shape is"):
        pack(folder, out)
    assert out.read_bytes() == before


def test_files_of_a_zip_that_is_cut_short_raise_bad_file_error(tmp_path, folder):
    os.truncate(pack(folder, tmp_path / "s.zip"), 1000)
    with pytest.raises(BadFileError, match=r"s\.zip is damaged"):
        packed_files(tmp_path / "s.zip")


def test_warnings_refuse_only_where_strict(tmp_path, folder):
    images = torch.load(folder / "glyphs.pt", weights_only=True)
    torch.save(images.requires_grad_(), folder / "glyphs.pt")
    assert pack(folder, tmp_path / "loose.zip").exists()
    with pytest.raises(InvalidSubmissionError):
        pack(folder, tmp_path / "strict.zip", strict=True)
    assert not (tmp_path / "strict.zip").exists()


def test_half_of_the_challenge_is_packed_only_when_asked_for(tmp_path):
    folder = tmp_path / "submission"
    folder.mkdir()
    torch.save(torch.randn(1000, 3, 32, 32), folder / "cifar100.pt")
    with pytest.raises(InvalidSubmissionError, match="tinyimagenet.pt is missing"):
        pack(folder, tmp_path / "s.zip")
    out = pack(folder, tmp_path / "s.zip", ignore_codes=["F003"])
    assert [file.name for file in packed_files(out)] == ["cifar100.pt"]


def test_empty_folder_and_unloadable_tensor_are_refused_even_if_findings_are_ignored(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingDataError, match="no tensor"):
        pack(tmp_path / "empty", tmp_path / "s.zip", ignore_codes={"F002"})
    torch.save({"images": torch.zeros(1)}, folder / "glyphs.pt")
    with pytest.raises(InvalidSubmissionError, match="glyphs.pt is not packed") as caught:
        pack(folder, tmp_path / "s.zip", ignore_codes={"T001"})
    assert str(folder / "glyphs.pt") in caught.value.remedy and not (tmp_path / "s.zip").exists()


def test_links_out_of_the_folder_are_refused(tmp_path, folder):
    (folder / "glyphs.pt").rename(tmp_path / "elsewhere.pt")
    (folder / "glyphs.pt").symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(InvalidSubmissionError, match="outside the folder"):
        pack(folder, tmp_path / "s.zip")


def test_links_inside_the_folder_are_packed_as_files(tmp_path, folder):
    content = (folder / "glyphs.pt").read_bytes()
    (folder / "glyphs.pt").rename(folder / "version-2")
    (folder / "glyphs.pt").symlink_to("version-2")
    with zipfile.ZipFile(pack(folder, tmp_path / "s.zip")) as archive:
        assert archive.read("glyphs.pt") == content


def test_the_zip_never_replaces_a_tensor(tmp_path, folder):
    before = (folder / "glyphs.pt").read_bytes()
    with pytest.raises(UsageError, match="does not end in .zip"):
        pack(folder, folder / "glyphs.pt")
    assert (folder / "glyphs.pt").read_bytes() == before


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(MissingDataError, match="ddkit generate"):
        pack(tmp_path / "absent", tmp_path / "s.zip")


def test_an_output_that_cannot_be_written_is_one_message(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFileError):
        pack(folder, tmp_path / "file" / "s.zip")


def test_a_full_disk_keeps_the_old_zip(tmp_path, folder):
    out = pack(folder, tmp_path / "submission.zip")
    before, limits = out.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(BadFileError, match="File too large"):
            pack(folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["submission", "submission.zip"]


@pytest.mark.slow
def test_a_kill_at_any_moment_keeps_a_whole_zip(tmp_path, folder):
    """Packs over and over in a process that is killed at different moments after the check; the zip is always whole."""
    out = pack(folder, tmp_path / "submission.zip")
    before = out.read_bytes()
    code = (
        "import sys\n"
        "from ddkit.packing.pack import pack\n"
        "while True:\n"
        "    pack(sys.argv[1], sys.argv[2], on_report=lambda report: print('ready', flush=True))\n"
    )
    for milliseconds in (0, 7, 30):
        packer = processes.start("-c", code, folder, out)
        assert packer.stdout.readline() == "ready\n"
        time.sleep(milliseconds / 1000)
        assert packer.returncode is None
        packer.kill()
        _, errors = packer.communicate()
        assert packer.returncode == -signal.SIGKILL, errors
        assert out.read_bytes() == before


def test_a_set_that_changes_while_it_is_packed_is_not_packed(tmp_path, folder):
    def change(report):
        torch.save(torch.full_like(torch.load(folder / "glyphs.pt"), float("nan")), folder / "glyphs.pt")

    with pytest.raises(BadFileError, match="changed while it was being packed"):
        pack(folder, tmp_path / "submission.zip", on_report=change)
    assert not (tmp_path / "submission.zip").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_links_to_nothing_are_refused_by_the_check(tmp_path, folder):
    (folder / "glyphs.pt").unlink()
    os.mkfifo(folder / "glyphs.pt")
    with pytest.raises(InvalidSubmissionError, match="is a pipe or a device"):
        pack(folder, tmp_path / "submission.zip")
    (folder / "glyphs.pt").unlink()
    (folder / "glyphs.pt").symlink_to(folder / "nothing.pt")
    with pytest.raises(InvalidSubmissionError):
        pack(folder, tmp_path / "submission.zip")
