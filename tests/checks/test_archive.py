import os
import stat
import zipfile

import pytest

from ddkit.checks.archive import Member, read_members
from ddkit.sets.findings import Finding

LARGEST = 1000


def read(path):
    items = list(read_members(path, lambda name: name.endswith(".pt"), largest_bytes=LARGEST))
    members = {item.name: item.data for item in items if isinstance(item, Member)}
    return members, [item.code for item in items if isinstance(item, Finding)]


def write(path, *members, **kwargs):
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_read_members_reads_files_at_the_root(tmp_path):
    members, codes = read(write(tmp_path / "s.zip", ("cifar100.pt", b"one"), ("tinyimagenet.pt", b"two")))
    assert members == {"cifar100.pt": b"one", "tinyimagenet.pt": b"two"} and codes == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("submission/cifar100.pt", "F010"),
        ("submission/", "F010"),
        ("../cifar100.pt", "F012"),
        ("a/../../cifar100.pt", "F012"),
        ("/etc/cifar100.pt", "F012"),
        ("C:\\cifar100.pt", "F012"),
        ("..\\cifar100.pt", "F012"),
        (".\\..\\cifar100.pt", "F012"),
        ("\\cifar100.pt", "F012"),
        (".\\cifar100.pt", "F010"),
        ("submission\\cifar100.pt", "F010"),
        ("__MACOSX/._cifar100.pt", "F017"),
        ("._cifar100.pt", "F017"),
        (".DS_Store", "F017"),
        ("Thumbs.db", "F017"),
        ("readme.txt", "F009"),
    ],
)
def test_read_members_names_members_that_do_not_belong_and_skips_them(tmp_path, name, code):
    members, codes = read(write(tmp_path / "s.zip", (name, b"data"), ("tinyimagenet.pt", b"two")))
    assert code in codes
    assert members == {"tinyimagenet.pt": b"two"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_pipes_and_devices_are_refused(tmp_path, kind):
    info = zipfile.ZipInfo("cifar100.pt")
    info.external_attr = (kind | 0o777) << 16
    assert read(write(tmp_path / "s.zip", (info, b"/etc/passwd"))) == ({}, ["F013"])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_name_that_occurs_twice_is_refused_and_neither_is_read(tmp_path):
    members, codes = read(write(tmp_path / "s.zip", ("cifar100.pt", b"one"), ("cifar100.pt", b"two")))
    assert codes == ["F014"] and members == {"cifar100.pt": None}


def test_names_that_begin_with_a_dot_are_read_and_counted_as_the_same_name(tmp_path):
    assert read(write(tmp_path / "s.zip", ("./", b""), ("./cifar100.pt", b"one"))) == ({"cifar100.pt": b"one"}, [])
    assert read(write(tmp_path / "s.zip", ("./cifar100.pt", b"one"), ("cifar100.pt", b"two"))) == (
        {"cifar100.pt": None},
        ["F014"],
    )


def test_encrypted_members_are_refused(tmp_path):
    path = write(tmp_path / "s.zip", ("cifar100.pt", b"one"))
    data = bytearray(path.read_bytes())
    for signature, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + flags_at] |= 1
    path.write_bytes(data)
    assert read(path) == ({}, ["F015"])


def test_zip_bomb_is_not_unpacked(tmp_path):
    path = write(tmp_path / "s.zip", ("cifar100.pt", bytes(50_000_000)), compression=zipfile.ZIP_DEFLATED)
    assert read(path) == ({"cifar100.pt": None}, ["F016"])


def test_zip_bomb_that_lies_about_its_size_is_not_unpacked(tmp_path):
    path = write(tmp_path / "s.zip", ("cifar100.pt", bytes(50_000_000)), compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    for signature, size_at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.find(signature) + size_at
        data[at : at + 4] = (500).to_bytes(4, "little")
    path.write_bytes(data)
    members, codes = read(path)
    assert members == {"cifar100.pt": None} and codes == ["F005"]


def test_damaged_member_is_found_by_its_checksum(tmp_path):
    path = write(tmp_path / "s.zip", ("cifar100.pt", b"precious"))
    path.write_bytes(path.read_bytes().replace(b"precious", b"previous"))
    assert read(path) == ({"cifar100.pt": None}, ["F005"])


def test_file_that_is_not_a_zip_is_f018(tmp_path):
    for data in (b"", b"PK", b"no zip at all", bytes(1000)):
        (tmp_path / "s.zip").write_bytes(data)
        assert read(tmp_path / "s.zip") == ({}, ["F018"])


def test_a_zip_cut_short_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "s.zip", ("cifar100.pt", b"x" * 900), ("tinyimagenet.pt", b"y" * 900)).read_bytes()
    for percent in range(100):
        (tmp_path / "cut.zip").write_bytes(whole[: len(whole) * percent // 100])
        assert read(tmp_path / "cut.zip")[1], percent


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_with_other_compression_are_not_unpacked(tmp_path, method):
    path = write(tmp_path / "s.zip", ("cifar100.pt", b"one"), compression=method)
    assert read(path) == ({}, ["F019"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_named_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "s.zip")
    assert read(tmp_path / "s.zip") == ({}, ["F018"])


def test_too_many_members_are_not_listed(tmp_path):
    path = write(tmp_path / "s.zip", *((f"{k}.pt", b"") for k in range(1500)))
    assert read(path) == ({}, ["F009"])
