"""Trees of files: what is listed, what is refused, what cannot be read."""

import io
import stat
import tarfile
import zipfile

import pytest

from ddkit.data.archives import DamagedFileError, FolderTree, ZipTree, open_tar
from ddkit.errors import BadDataError

FILES = {"top/train/cat/1.png": b"one", "top/train/dog/2.png": b"two"}
CLUTTER = (
    "top/.DS_Store", "__MACOSX/top/x", "__MACOSX/top/._x", "top/train/Thumbs.db", ".git/config", "top/train/cat/._1.png",
    "top/Desktop.ini", "top/train/@eaDir/1.png", "top/.ipynb_checkpoints/1", "top/train/cat/1.png:Zone.Identifier",
)  # fmt: skip
TARS = ("photos.tar", "photos.tar.gz", "photos.tgz", "photos.tar.bz2", "photos.tar.xz")


@pytest.fixture
def tree_of(tmp_path):
    def open_it(path):
        if path.is_dir():
            return FolderTree(path)
        return ZipTree(path) if path.suffix == ".zip" else open_tar(path, tmp_path)

    return open_it


@pytest.mark.parametrize("name", ["photos", "photos.zip", *TARS])
def test_folder_and_its_archives_list_and_read_the_same(write_tree, tree_of, name):
    tree = tree_of(write_tree({**FILES, **dict.fromkeys(CLUTTER, b"")}, name))
    assert tree.files == tuple(sorted(FILES))
    assert tree.folders == {
        "": (["top"], []), "top": (["train"], []), "top/train": (["cat", "dog"], []),
        "top/train/cat": ([], ["1.png"]), "top/train/dog": ([], ["2.png"]),
    }  # fmt: skip
    assert tree.read("top/train/dog/2.png") == b"two"


@pytest.mark.parametrize("prefix", ["./", ".\\", "././"])
@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz"])
def test_names_as_other_tools_write_them_are_made_plain(write_tree, tree_of, name, prefix, separator):
    tree = tree_of(write_tree({prefix + path.replace("/", separator): data for path, data in FILES.items()}, name))
    assert tree.files == tuple(sorted(FILES))
    assert tree.read("top/train/cat/1.png") == b"one"


def test_backslashed_folder_of_a_zip_is_a_folder(write_tree):
    tree = ZipTree(write_tree({"top\\": b"", "top\\empty\\": b"", "top\\1.png": b"one"}, "windows.zip"))
    assert tree.files == ("top/1.png",) and tree.folders["top"] == (["empty"], ["1.png"])


def test_empty_folder_is_listed(tree_of, tmp_path):
    (tmp_path / "photos" / "empty").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("empty/", b"")
    with tarfile.open(tmp_path / "photos.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "photos" / "empty", "empty")
    for name in ("photos", "photos.zip", "photos.tar.gz"):
        tree = tree_of(tmp_path / name)
        assert (tree.files, dict(tree.folders)) == ((), {"": (["empty"], []), "empty": ([], [])})


def test_links_in_a_folder_are_followed_and_loops_end(write_tree):
    path = write_tree(FILES)
    (path / "linked").symlink_to(path / "top" / "train" / "cat")
    (path / "loop").symlink_to(path)
    tree = FolderTree(path)
    assert "linked/1.png" in tree.files
    assert tree.read("linked/1.png") == b"one"


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/etc/passwd", "C:/windows", "..\\outside", "\\\\host\\x", "c:x"]
)
@pytest.mark.parametrize("archive", ["hostile.zip", "hostile.tar", "hostile.tgz"])
def test_archive_with_paths_that_lead_out_is_refused(write_tree, tree_of, archive, name):
    with pytest.raises(BadDataError, match="leads out of it"):
        _ = tree_of(write_tree({**FILES, name: b"x"}, archive)).files


def test_zip_with_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("train/cat/1.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BadDataError, match="holds a link"):
        _ = ZipTree(tmp_path / "links.zip").files


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_tar_with_a_special_file_is_refused(tmp_path, kind):
    special = tarfile.TarInfo("train/cat/1.png")
    special.type, special.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "special.tar", "w") as archive:
        archive.addfile(special)
    with pytest.raises(BadDataError, match="holds a link or another special file"):
        open_tar(tmp_path / "special.tar", tmp_path)


def test_second_name_of_a_file_in_a_tar_is_that_file(tmp_path):
    (tmp_path / "1.png").write_bytes(b"one")
    (tmp_path / "2.png").hardlink_to(tmp_path / "1.png")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for name in ("1.png", "2.png"):
            archive.add(tmp_path / name, name)
    assert open_tar(tmp_path / "photos.tar", tmp_path).read("2.png") == b"one"


def test_half_downloaded_zip_is_named(write_tree):
    path = write_tree(FILES, "half.zip")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadDataError, match=r"half.zip is not a whole zip") as caught:
        ZipTree(path)
    assert "may be incomplete" in caught.value.remedy


@pytest.mark.parametrize("name", TARS)
def test_half_downloaded_tar_is_named(write_tree, tmp_path, name):
    path = write_tree({f"top/{k}.png": bytes([k]) * 2000 for k in range(20)}, name)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1) if "." in name.removesuffix(".tar") else (len(whole) // 3,):
        path.write_bytes(whole[:size])
        with pytest.raises(BadDataError, match="is not a whole archive"):
            open_tar(path, tmp_path)


def test_damaged_member_leaves_the_others_readable(write_tree):
    path = write_tree(FILES, "damaged.zip")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"one", b"eno"))
    tree = ZipTree(path)
    with pytest.raises(DamagedFileError, match="CRC"):
        tree.read("top/train/cat/1.png")
    assert tree.read("top/train/dog/2.png") == b"two"


def test_member_that_unpacks_to_too_much_is_not_unpacked(tmp_path, tree_of, monkeypatch):
    monkeypatch.setattr("ddkit.data.archives.MAX_FILE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(1001))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.png").write_bytes(bytes(1001))
    with tarfile.open(tmp_path / "bomb.tar", "w") as tar:
        tar.add(tmp_path / "folder" / "1.png", "1.png")
    for name in ("bomb.zip", "folder", "bomb.tar"):
        with pytest.raises(DamagedFileError, match="more than any image"):
            tree_of(tmp_path / name).read("1.png")


def test_tar_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddkit.data.archives._MAX_EXPANSION", -1_000_000)
    info = tarfile.TarInfo("1.png")
    info.size = 5 << 20
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(BadDataError, match="unpacks to more than"):
        open_tar(tmp_path / "bomb.tar.gz", tmp_path)


def test_encrypted_member_is_damaged_and_not_a_crash(write_tree):
    path = write_tree({"train/cat/1.png": b"secret"}, "locked.zip")
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + place] |= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match="encrypted"):
        ZipTree(path).read("train/cat/1.png")
