import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ddkit.errors import BadFileError
from ddkit.runtime import files


def test_replacing_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(ValueError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_replacing_makes_ordinary_files(tmp_path):
    (tmp_path / "ordinary").write_text("")
    files.write_text(tmp_path / "deep" / "ours.txt", "ü")
    assert (tmp_path / "deep" / "ours.txt").read_text(encoding="utf-8") == "ü"
    assert (tmp_path / "deep" / "ours.txt").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


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


def test_what_is_refused_is_named_as_it_was_asked_for(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadFileError) as caught:
        files.write_text(tmp_path / "file" / "here.txt", "text")
    assert str(tmp_path / "file") in caught.value.message and "A file is in the way" in caught.value.remedy
    with pytest.raises(BadFileError) as caught:
        files.write_text("/proc/here.txt", "text")
    assert caught.value.message.startswith("/proc/here.txt:")


def test_a_line_is_appended_after_a_torn_one(tmp_path):
    path = tmp_path / "deep" / "lines.txt"
    files.append_line(path, "one")
    path.write_text(path.read_text() + "to")
    files.append_line(path, "two")
    assert path.read_text() == "one\nto\ntwo\n"


def test_a_folder_behind_a_link_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "disk" / "data").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "data")
    with files.atomic_folder(tmp_path / "data") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "data").is_symlink() and (tmp_path / "disk" / "data" / "new").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk"]


def test_a_full_disk_is_one_message_and_the_old_file_stays(tmp_path):
    path = tmp_path / "kept.bin"
    path.write_bytes(b"old")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    # A file-size limit is what a test can have of a full disk without being root: the write itself fails.
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ddkit.errors import BadFileError\n"
        "from ddkit.runtime.files import atomic_write\n"
        "try:\n"
        "    with atomic_write(sys.argv[1]) as temporary:\n"
        "        temporary.write_bytes(b'x' * 5000)\n"
        "except BadFileError as error:\n"
        "    sys.exit(error.exit_code)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(path)], preexec_fn=limit)
    assert finished.returncode == 3
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["kept.bin"]


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


def test_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_the_cache_folder_is_the_users_choice(monkeypatch):
    monkeypatch.setenv("DDKIT_CACHE", "~/somewhere")
    assert files.cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("DDKIT_CACHE")
    assert files.cache_folder().name == "ddkit"


def test_a_file_system_without_locks_is_worked_on_and_other_refusals_are_told(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="no such locks on this system")
    begun = []
    for number, refused in ((errno.ENOLCK, False), (errno.EIO, True)):

        def lockf(*_, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "lockf", lockf)
        with pytest.raises(BadFileError) if refused else contextlib.nullcontext():
            with files.exclusive(tmp_path, "works", elsewhere="--out"):
                begun.append(number)
    assert begun == [errno.ENOLCK]


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


def test_names_that_are_no_text_can_be_written(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    files.write_text(tmp_path / "text", name)
    files.append_line(tmp_path / "lines", name)
    assert (tmp_path / "text").read_text(encoding="utf-8") == "caf?"
    assert (tmp_path / "lines").read_text(encoding="utf-8") == "caf?\n"


def test_json_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(BadFileError, match="deep.json is nested too deeply"):
        files.read_json(tmp_path / "deep.json")


def test_whether_lines_can_be_appended_is_known_before(tmp_path):
    files.require_appendable(tmp_path / "deep" / "lines.txt")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(BadFileError, match=str(tmp_path)):
        files.require_appendable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFileError, match="file"):
        files.require_appendable(tmp_path / "file" / "deep" / "lines.txt")
