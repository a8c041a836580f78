"""Downloads from a real server on this machine that behaves as badly as servers do."""

import hashlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from ddkit.data.download import OFFICIAL, Archive, RetryPolicy, download
from ddkit.errors import BadDataError, BadFileError, MissingDataError

DATA = np.random.default_rng(0).bytes(1_000_000)
QUICK = RetryPolicy(attempts=3, pause=0.01, timeout=5)


def archive_at(url, data=DATA):
    return Archive(url, hashlib.md5(data).hexdigest())


def test_whole_file_is_downloaded_with_progress(serve, tmp_path):
    reports = []
    path = download(archive_at(serve(DATA).url), tmp_path, progress=reports.append)
    assert path == tmp_path / "archive.bin" and path.read_bytes() == DATA
    assert [r.done for r in reports] == sorted(r.done for r in reports)
    assert (reports[-1].done, reports[-1].total, reports[-1].unit) == (1.0, 1.0, "MB")
    assert [item.name for item in tmp_path.iterdir()] == ["archive.bin"]


def test_whole_file_that_is_there_is_not_downloaded_again(serve, tmp_path):
    server = serve(DATA)
    for _ in range(2):
        download(archive_at(server.url), tmp_path)
    assert len(server.requests) == 1


def test_broken_connection_is_resumed_where_it_broke(serve, tmp_path):
    server = serve(DATA, break_after=[400_000, 100_000])
    path = download(archive_at(server.url), tmp_path, patience=QUICK)
    assert path.read_bytes() == DATA
    assert server.requests == ["", "bytes=400000-", "bytes=500000-"]


def test_broken_download_is_resumed_in_a_later_run(serve, tmp_path):
    server = serve(DATA, break_after=[300_000, 0, 0, 0])
    with pytest.raises(
        MissingDataError, match="could not be downloaded: the connection ended after 300,000 of 1,000,000"
    ) as caught:
        download(archive_at(server.url), tmp_path, patience=QUICK)
    assert "--from" in caught.value.remedy and "continues where it stopped" in caught.value.remedy
    assert [item.name for item in tmp_path.iterdir()] == ["archive.bin.part"]
    server.break_after.clear()
    assert download(archive_at(server.url), tmp_path).read_bytes() == DATA
    assert server.requests[-1] == "bytes=300000-"


def test_many_breaks_with_new_bytes_are_not_given_up(serve, tmp_path):
    server = serve(DATA, break_after=[90_000] * 10)
    assert download(archive_at(server.url), tmp_path, patience=QUICK).read_bytes() == DATA
    assert len(server.requests) > QUICK.attempts


def test_server_that_cannot_resume_sends_all_again(serve, tmp_path):
    server = serve(DATA, break_after=[400_000], ranges=False)
    assert download(archive_at(server.url), tmp_path, patience=QUICK).read_bytes() == DATA


def test_file_of_unknown_length_is_downloaded(serve, tmp_path):
    reports = []
    path = download(archive_at(serve(DATA, length=False).url), tmp_path, progress=reports.append)
    assert path.read_bytes() == DATA and reports[-1].total is None


def test_part_that_is_whole_is_only_checked(serve, tmp_path):
    (tmp_path / "archive.bin.part").write_bytes(DATA)
    server = serve(DATA)
    assert download(archive_at(server.url), tmp_path, patience=QUICK).read_bytes() == DATA
    assert server.requests == ["bytes=1000000-"]


@pytest.mark.parametrize("before", [b"something else", bytes(2_000_000)])
def test_part_that_does_not_fit_is_thrown_away(serve, tmp_path, before):
    (tmp_path / "archive.bin.part").write_bytes(before)
    assert download(archive_at(serve(DATA).url), tmp_path, patience=QUICK).read_bytes() == DATA


def test_damaged_archive_is_downloaded_again(serve, tmp_path):
    (tmp_path / "archive.bin").write_bytes(DATA[:-1] + b"x")
    assert download(archive_at(serve(DATA).url), tmp_path).read_bytes() == DATA


def test_differing_checksum_is_refused_and_leaves_nothing(serve, tmp_path):
    with pytest.raises(BadDataError, match="MD5 is [0-9a-f]{32}, expected") as caught:
        download(archive_at(serve(b"not the archive").url), tmp_path, patience=QUICK)
    assert caught.value.exit_code == 3 and "--from" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_busy_server_is_asked_again_and_missing_file_is_not(serve, tmp_path):
    busy = serve(DATA, statuses=[503, 429])
    assert download(archive_at(busy.url), tmp_path / "a", patience=QUICK).read_bytes() == DATA
    gone = serve(DATA, statuses=[404])
    with pytest.raises(MissingDataError, match="404"):
        download(archive_at(gone.url), tmp_path / "b", patience=QUICK)
    assert len(gone.requests) == 1


def test_no_network_names_what_to_give_instead(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/archive.bin"
        with pytest.raises(MissingDataError, match="could not be downloaded: .*refused") as caught:
            download(archive_at(url), tmp_path, patience=QUICK)
    assert "get archive.bin elsewhere and give it to ddkit data prepare --from" in caught.value.remedy


def test_silent_server_is_given_up(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/archive.bin"
        with pytest.raises(MissingDataError, match="timed out"):
            download(archive_at(url), tmp_path, patience=RetryPolicy(attempts=2, pause=0.01, timeout=0.1))


@pytest.mark.slow
def test_full_disk_keeps_what_arrived(serve, tmp_path):
    """A limit on the size of files stands in for the disk; the system refuses the write in the same way."""
    resource = pytest.importorskip("resource", reason="needs limits on file sizes")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ddkit.data.download import Archive, download\n"
        "from ddkit.errors import BadFileError\n"
        "try:\n"
        "    download(Archive(sys.argv[1], '0' * 32), Path(sys.argv[2]))\n"
        "except BadFileError as error:\n"
        "    print(error)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, serve(DATA).url, str(tmp_path)], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)),
    )  # fmt: skip
    assert "File too large" in finished.stdout, finished.stderr
    part = (tmp_path / "archive.bin.part").read_bytes()
    assert part and DATA.startswith(part)
    assert download(archive_at(serve(DATA).url), tmp_path).read_bytes() == DATA


def test_folder_that_cannot_be_made_is_refused(serve, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFileError, match="Not a directory|File exists"):
        download(archive_at(serve(DATA).url), tmp_path / "file" / "below")


def test_part_that_cannot_be_written_is_no_failure_of_the_network(serve, tmp_path):
    (tmp_path / "archive.bin.part").mkdir()
    with pytest.raises(BadFileError, match=r"archive\.bin\.part: Is a directory"):
        download(archive_at(serve(DATA).url), tmp_path, patience=RetryPolicy(pause=0.01))


def test_official_archives_have_known_names_and_checksums():
    assert {name: (archive.file_name, archive.md5) for name, archive in OFFICIAL.items()} == {
        "cifar100": ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        "tinyimagenet": ("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
    }
    assert all(re.match("https?://", archive.url) for archive in OFFICIAL.values())
