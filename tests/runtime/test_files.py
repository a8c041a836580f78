import contextlib
import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ddkit.errors import BadFileError, UsageError
from ddkit.runtime import files


def test_replacing_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(ValueError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_replacing_folder_replaces_as_a_whole(tmp_path):
    folder = tmp_path / "model"
    for content in ("first", "second"):
        with files.atomic_folder(folder) as temporary:
            (temporary / f"{content}.txt").write_text(content)
    assert [path.name for path in folder.iterdir()] == ["second.txt"]
    with pytest.raises(ValueError), files.atomic_folder(folder) as temporary:
        (temporary / "third.txt").write_text("half")
        raise ValueError
    assert [path.name for path in folder.iterdir()] == ["second.txt"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_writer_killed_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept.bin"
    path.write_bytes(b"old")
    writer = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time\n"
         "from ddkit.runtime.files import atomic_write\n"
         "with atomic_write(sys.argv[1]) as temporary:\n"
         "    temporary.write_bytes(b'half')\n"
         "    print('writing', flush=True)\n"
         "    time.sleep(60)\n", str(path)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert writer.stdout.readline() == b"writing\n"
    writer.kill()
    writer.wait()
    assert path.read_bytes() == b"old"


def test_what_a_killed_writer_left_is_removed_a_day_later_and_nothing_else(tmp_path):
    names = {".set[1].pt.0123abcd.tmp": 2, ".set[1].pt.0123abce.tmp": 0, ".other.pt.0123abcd.tmp": 2, "set[1].pt.tmp": 2}
    for name, days in names.items():
        (tmp_path / name).write_text("")
        then = time.time() - 86400 * days
        os.utime(tmp_path / name, (then, then))
    files.write_text(tmp_path / "set[1].pt", "new")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names, "set[1].pt"} - {".set[1].pt.0123abcd.tmp"}


def test_refused_write_names_the_requested_path(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadFileError) as caught:
        files.write_text(tmp_path / "file" / "here.txt", "text")
    assert str(tmp_path / "file") in caught.value.message and "where a folder is needed" in caught.value.remedy
    with pytest.raises(BadFileError) as caught:
        files.write_text("/proc/here.txt", "text")
    assert caught.value.message.startswith("/proc/here.txt:")


def test_a_folder_behind_a_link_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "data")
    with files.atomic_folder(tmp_path / "data") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "data").is_symlink() and (tmp_path / "disk" / "data" / "new").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk"]


def test_copy_that_the_disk_refuses_names_its_target_which_stays(tmp_path):
    """A limit on the size of files is what a test can have of a full disk without being root: the write itself fails."""
    (tmp_path / "from.bin").write_bytes(b"x" * 5000)
    (tmp_path / "to.bin").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(BadFileError) as refused, files.atomic_write(tmp_path / "to.bin") as temporary:
            shutil.copyfile(tmp_path / "from.bin", temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "to.bin: File too large" in refused.value.message
    assert sorted(os.listdir(tmp_path)) == ["from.bin", "to.bin"] and (tmp_path / "to.bin").read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder_is_one_message(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BadFileError, match="Permission denied"):
        files.write_text(tmp_path / "new.txt", "text")


def test_read_json_names_the_file(tmp_path):
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(BadFileError, match="torn.json is not JSON"):
        files.read_json(tmp_path / "torn.json")
    with pytest.raises(BadFileError, match="absent.json"):
        files.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize(("name", "example"), [("a/b.c.pt", "a/b.c.html"), (".", "NAME.html"), ("page", "page.html")])
def test_a_file_of_another_kind_is_refused_with_a_name_to_take(name, example):
    with pytest.raises(UsageError, match=f"does not end in .html or .htm. Name a file such as {re.escape(example)}.$"):
        files.require_ending(Path(name), ".html", ".htm")
    files.require_ending(Path("a/b.htm"), ".html", ".htm")


def test_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_the_cache_folder_is_the_users_choice(monkeypatch):
    monkeypatch.setenv("DDKIT_CACHE", "~/somewhere")
    assert files.cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("DDKIT_CACHE")
    assert files.cache_folder().name == "ddkit"


def test_a_file_behind_a_link_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "there" / "real.txt")
    files.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "there" / "real.txt").read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFileError, match="is a pipe or a device"):
        files.write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("folder", [".", "/", ".."])
def test_write_text_to_a_folder_raises_bad_file_error(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFileError, match="is a folder, not a file"):
        files.write_text(folder, "text")
    assert not list(tmp_path.iterdir())


def test_read_json_of_a_number_with_thousands_of_digits_raises_bad_file_error(tmp_path):
    (tmp_path / "x.json").write_text(f'{{"seed": {"1" * 5000}}}')
    with pytest.raises(BadFileError, match="x.json is not JSON"):
        files.read_json(tmp_path / "x.json")


def test_json_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(BadFileError, match="deep.json is nested too deeply"):
        files.read_json(tmp_path / "deep.json")


def test_write_text_of_a_name_that_is_not_unicode_replaces_the_letter(tmp_path):
    files.write_text(tmp_path / "text", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "text").read_text(encoding="utf-8") == "caf?"


def test_atomic_write_gives_the_permissions_of_any_new_file(tmp_path):
    files.write_text(tmp_path / "deep" / "ours", "ü")
    assert (tmp_path / "deep" / "ours").read_text(encoding="utf-8") == "ü"
    with files.atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("text")
    (tmp_path / "theirs").write_text("text")
    (tmp_path / "their_folder").mkdir()
    assert (tmp_path / "deep" / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "their_folder").stat().st_mode


HOLDER = """
import sys, time
from pathlib import Path
from ddkit.runtime.files import exclusive, one_at_a_time
folder = Path(sys.argv[1])
with exclusive(folder, "works", elsewhere="--out"), one_at_a_time(folder / ".store.lock", "prepares glyphs"):
    print("held", flush=True)
    sys.stdin.readline()
    (folder / "done").touch()
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_exclusive_of_a_folder_in_use_raises_usage_error(tmp_path, holder):
    with pytest.raises(UsageError, match="Another process works in") as caught:
        with files.exclusive(tmp_path, "works", elsewhere="--out"):
            pytest.fail("two processes at once")
    assert "--out" in caught.value.remedy
    with files.exclusive(tmp_path, "works", elsewhere="--out", is_main=False):
        pass  # the processes that help do not lock


def test_exclusive_after_a_kill_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    with files.exclusive(tmp_path, "works", elsewhere="--out"):
        assert not (tmp_path / "done").exists()


def test_one_at_a_time_waits_for_the_holder_and_says_so(tmp_path, holder, caplog):
    threading.Timer(1.5, lambda: holder.stdin.close()).start()
    with files.one_at_a_time(tmp_path / ".store.lock", "prepares glyphs"):
        assert (tmp_path / "done").exists()
    assert "Waiting for another process that prepares glyphs" in caplog.text


@pytest.mark.parametrize("number, refused", [(errno.ENOLCK, False), (errno.EIO, True)])
def test_exclusive_on_a_file_system_without_locks_continues_and_other_refusals_raise(tmp_path, monkeypatch, number, refused):
    fcntl = pytest.importorskip("fcntl", reason="no such locks on this system")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    begun = []
    with pytest.raises(BadFileError) if refused else contextlib.nullcontext():
        with files.exclusive(tmp_path, "works", elsewhere="--out"):
            begun.append(number)
    assert len(begun) == (not refused)


def test_refusal_in_the_cache_names_the_variable_that_moves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DDKIT_CACHE", str(tmp_path))
    refused = PermissionError(errno.EACCES, "Permission denied")
    assert "export DDKIT_CACHE" in files.explain_os_error(refused, tmp_path / "glyphs" / "meta.json").remedy
    assert "DDKIT_CACHE" not in files.explain_os_error(refused, "submission/glyphs.pt").remedy


def test_one_at_a_time_where_no_file_can_be_made_does_not_lock(tmp_path):
    (tmp_path / "file").write_text("in the way of the folder")
    begun = []
    with files.one_at_a_time(tmp_path / "file" / "lock", "prepares glyphs"):
        begun.append(True)
    assert begun == [True]
