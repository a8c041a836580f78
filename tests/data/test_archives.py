"""Trees of files: what is listed, what is refused, what cannot be read."""

import stat
import zipfile

import pytest

from ddkit.data.archives import DamagedMemberError, ZipTree, open_tree
from ddkit.errors import BadDataError, MissingDataError

FILES = {"top/train/cat/1.png": b"one", "top/train/dog/2.png": b"two"}
FOLDERS = ["top", "top/train", "top/train/cat", "top/train/dog"]


@pytest.mark.parametrize("name", ["photos", "photos.zip"])
def test_a_folder_and_a_zip_of_it_list_and_read_the_same(write_tree, name):
    clutter = {"top/.DS_Store": b"", "__MACOSX/top/x": b"", "top/train/Thumbs.db": b"", ".git/config": b""}
    tree = open_tree(write_tree({**FILES, **clutter}, name))
    assert tree.names() == (sorted(FILES), FOLDERS)
    assert tree.read("top/train/dog/2.png") == b"two"


def test_an_empty_folder_is_listed(write_tree, tmp_path):
    (tmp_path / "photos" / "empty").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("empty/", b"")
    for name in ("photos", "photos.zip"):
        assert open_tree(tmp_path / name).names() == ([], ["empty"])


def test_links_in_a_folder_are_followed_and_loops_end(write_tree, tmp_path):
    path = write_tree(FILES)
    (path / "linked").symlink_to(path / "top" / "train" / "cat")
    (path / "loop").symlink_to(path)
    files, _ = open_tree(path).names()
    assert "linked/1.png" in files
    assert open_tree(path).read("linked/1.png") == b"one"


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/passwd", "C:/windows", "a\\b"])
def test_a_zip_whose_paths_lead_out_of_it_is_refused(write_tree, name):
    tree = ZipTree(write_tree({**FILES, name: b"x"}, "hostile.zip"))
    with pytest.raises(BadDataError, match="leads out of it"):
        tree.names()


def test_a_zip_with_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("train/cat/1.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(BadDataError, match="holds a link"):
        ZipTree(tmp_path / "links.zip").names()


def test_a_half_downloaded_zip_is_named(write_tree):
    path = write_tree(FILES, "half.zip")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadDataError, match=r"half.zip is not a whole zip") as caught:
        open_tree(path)
    assert "half downloaded" in caught.value.remedy


def test_a_damaged_member_leaves_the_others_readable(write_tree):
    path = write_tree(FILES, "damaged.zip")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"one", b"eno"))
    tree = open_tree(path)
    with pytest.raises(DamagedMemberError, match="CRC"):
        tree.read("top/train/cat/1.png")
    assert tree.read("top/train/dog/2.png") == b"two"


def test_a_member_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("ddkit.data.archives.MAX_MEMBER_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/1.png", bytes(1001))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.png").write_bytes(bytes(1001))
    for tree, name in ((tmp_path / "bomb.zip", "train/cat/1.png"), (tmp_path / "folder", "1.png")):
        with pytest.raises(DamagedMemberError, match="more than any image"):
            open_tree(tree).read(name)


def test_an_encrypted_member_is_damaged_and_not_a_crash(write_tree):
    path = write_tree({"train/cat/1.png": b"secret"}, "locked.zip")
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + place] |= 1
    path.write_bytes(data)
    with pytest.raises(DamagedMemberError, match="encrypted"):
        open_tree(path).read("train/cat/1.png")


def test_a_path_that_is_not_there_says_so(tmp_path):
    with pytest.raises(MissingDataError, match="There is no"):
        open_tree(tmp_path / "nowhere.zip")
