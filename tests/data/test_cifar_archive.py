"""CIFAR-100's pickles: what is read, in which order, what is refused, and that nothing is executed."""

import io
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest

from ddkit.data.cifar_archive import OFFICIAL_MD5
from ddkit.errors import BadDataError, UsageError


def pixels_of(split):
    return np.concatenate(list(split.blocks()))


class TestCifarArchive:
    NAMES = ("dog", "cat")  # not sorted, so that labels must be brought into order

    @pytest.fixture
    def splits(self):
        """Four training images and two test images of one value each, with labels and file names."""
        return {
            "train": ([10, 11, 12, 13], [0, 1, 0, 1], ["d_b.png", "c_b.png", "d_a.png", "c_a.png"]),
            "test": ([20, 21], [0, 1], ["d.png", "c.png"]),
        }

    def pickles(self, splits, protocol=4):
        def dump(value):
            return pickle.dumps(value, protocol=protocol)

        files = {
            split: dump({
                "data": np.repeat(np.array(values, np.uint8)[:, None], 3072, axis=1),
                "fine_labels": labels,
                "filenames": names,
                "coarse_labels": [0] * len(labels),
            })
            for split, (values, labels, names) in splits.items()
        }  # fmt: skip
        return {**files, "meta": dump({"fine_label_names": list(self.NAMES), "coarse_label_names": ["animal"]})}

    def packed(self, files, tmp_path, name="some.tar.gz", mode="w:gz"):
        with tarfile.open(tmp_path / name, mode) as archive:
            for member, data in {**files, "file.txt~": b""}.items():
                info = tarfile.TarInfo(f"cifar-100-python/{member}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return tmp_path / name

    def check(self, source):
        assert (source.kind, source.class_names) == ("cifar-100-python", ("cat", "dog"))
        assert source.splits["train"].labels == (0, 0, 1, 1)
        images = pixels_of(source.splits["train"])
        assert images.shape == (4, 3, 32, 32) and images[:, 0, 0, 0].tolist() == [13, 11, 12, 10]
        assert pixels_of(source.splits["test"])[:, 2, 31, 31].tolist() == [21, 20]

    @pytest.mark.parametrize("protocol", range(2, 6))
    def test_packed_and_unpacked_archives_are_read(self, splits, tmp_path, write_tree, protocol, find):
        files = self.pickles(splits, protocol)
        self.check(find(self.packed(files, tmp_path)))
        self.check(find(self.packed(files, tmp_path, "some.tar", "w")))
        self.check(find(write_tree(files, "plain")))
        self.check(find(write_tree({f"cifar-100-python/{k}": v for k, v in files.items()}, "above")))
        self.check(find(write_tree({**files, "file.txt~": b""}, "kaggle.zip")))
        self.check(find(write_tree({f"./data/cifar-100-python/{k}": v for k, v in files.items()}, "deep.zip")))
        self.check(find(write_tree({f"cifar-100-python\\{k}": v for k, v in files.items()}, "windows.zip")))

    def test_torchvisions_folder_is_read(self, splits, write_tree, find):
        """Archives and unpacked folders side by side, CIFAR-10 among them."""
        files = self.pickles(splits)
        root = write_tree({f"cifar-100-python/{k}": v for k, v in files.items()}, "root")
        write_tree({"cifar-10-batches-py/data_batch_1": b"x", "cifar-10-batches-py/batches.meta": b"x"}, "root")
        self.packed(files, root, "cifar-100-python.tar.gz")
        write_tree({"cifar-10-batches-py/data_batch_1": b"x"}, "root/cifar-10-python.tar.gz")
        self.check(find(root))
        (root / "cifar-100-python" / "test").unlink()  # unpacking was stopped
        self.check(find(root))
        shutil.rmtree(root / "cifar-100-python")
        self.check(find(root))

    def test_archive_inside_a_zip_is_read(self, splits, tmp_path, write_tree, find):
        packed = self.packed(self.pickles(splits), tmp_path)
        self.check(find(write_tree({"cifar-100-python.tar.gz": packed.read_bytes(), "__MACOSX/._x": b""}, "outer.zip")))

    def test_pickles_of_python_2_are_read(self, splits, tmp_path, find):
        files = {
            split: _python2_split(np.repeat(np.array(values, np.uint8)[:, None], 3072, axis=1), labels, names)
            for split, (values, labels, names) in splits.items()
        }
        files["meta"] = _python2({"fine_label_names": list(self.NAMES)})
        self.check(find(self.packed(files, tmp_path)))

    def test_channels_and_rows_keep_their_places(self, tmp_path, find):
        row = np.arange(3072).astype(np.uint8)[None]
        value = {"data": row, "fine_labels": [0], "filenames": ["x"]}
        files = {"train": pickle.dumps(value), "test": pickle.dumps(value)}
        files["meta"] = pickle.dumps({"fine_label_names": ["only"]})
        images = pixels_of(find(self.packed(files, tmp_path)).splits["train"])
        assert (images[0] == row.reshape(3, 32, 32)).all()

    @pytest.mark.parametrize("order", "<>")
    def test_labels_in_an_array_are_read(self, splits, tmp_path, order, find):
        files = self.pickles(splits)
        for split in splits:
            value = pickle.loads(files[split])
            value["fine_labels"] = np.array(value["fine_labels"], f"{order}i8")
            value["data"] = np.asfortranarray(value["data"])
            files[split] = pickle.dumps(value, protocol=5 if order == "<" else 2)
        self.check(find(self.packed(files, tmp_path)))

    @pytest.mark.parametrize("made", [
        (np.ndarray, ((2,), np.dtype("O"), b"A" * 16)),  # two objects, wherever these bytes say
        (np.dtype, ("O",)),
        (np.ndarray.__reduce__(np.zeros(1))[0], (np.ndarray, (2,), b"O")),
    ])  # fmt: skip
    def test_pickle_that_makes_objects_of_bytes_is_refused(self, splits, tmp_path, made, find):
        class Labels:
            def __reduce__(self):
                return made

        train = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": Labels()})
        files = {**self.pickles(splits), "train": train}
        with pytest.raises(BadDataError, match="'train'"):
            find(self.packed(files, tmp_path))

    def test_pickle_of_code_is_not_run(self, splits, tmp_path, find):
        class Code:
            def __reduce__(self):
                return (print, ("code ran",))

        files = {**self.pickles(splits), "meta": pickle.dumps(Code())}
        with pytest.raises(BadDataError, match="asks to run builtins.print"):
            find(self.packed(files, tmp_path))

    @pytest.mark.parametrize("missing", ["train", "test", "meta"])
    def test_archive_that_is_not_whole_is_refused(self, splits, tmp_path, find, missing):
        files = {name: data for name, data in self.pickles(splits).items() if name != missing}
        with pytest.raises(BadDataError, match=f"not a complete cifar-100-python: {missing} is missing"):
            find(self.packed(files, tmp_path))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train": b"not a pickle"}, "'train' is not a data pickle"),
            ({"meta": pickle.dumps([1])}, "holds a list, not the dict"),
            ({"meta": pickle.dumps({"label_names": []})}, "does not have the contents of cifar-100-python"),
            ({"test": pickle.dumps({"data": np.zeros((2, 5), np.uint8), "fine_labels": [0, 1]})}, r"\(2, 5\) for 2 labels"),
            ({"meta": pickle.dumps({"fine_label_names": ["cat"]})}, "labels beyond its 1 class names"),
        ],
    )  # fmt: skip
    def test_pickles_of_something_else_are_refused(self, splits, tmp_path, change, message, find):
        with pytest.raises(BadDataError, match=message):
            find(self.packed({**self.pickles(splits), **change}, tmp_path))

    def test_another_test_split_than_there_is_is_refused(self, splits, tmp_path, find):
        with pytest.raises(UsageError, match="no labeled images in a split 'val'"):
            find(self.packed(self.pickles(splits), tmp_path), test_split="val")

    def test_file_with_another_checksum_than_torchvisions_is_warned_of(self, splits, tmp_path, caplog, find):
        from torchvision.datasets import CIFAR100 as Theirs

        assert OFFICIAL_MD5 == {**dict(Theirs.train_list + Theirs.test_list), "meta": Theirs.meta["md5"]}
        find(self.packed(self.pickles(splits), tmp_path))
        assert "'train' is not the official file; its checksum differs" in caplog.text


def _python2(value):
    """The pickle that Python 2 makes of dicts, lists, byte strings and small numbers."""
    return b"\x80\x02" + _python2_part(value) + b"."


def _python2_part(value):
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2_part(k) + _python2_part(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2_part, value)) + b"e"
    if isinstance(value, int):
        return b"K" + bytes([value])
    data = value.encode() if isinstance(value, str) else value
    return b"T" + struct.pack("<i", len(data)) + data


def _python2_split(data, labels, names):
    """With the array as numpy pickled it under Python 2."""
    text = _python2_part
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text("b") + b"tR("
        b"K\x01(M" + struct.pack("<H", len(data)) + b"M" + struct.pack("<H", data.shape[1]) + b"t"
        b"cnumpy\ndtype\n(" + text("u1") + b"K\x00K\x01tR(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + text(data.tobytes()) + b"tb"
    )
    rest = text("fine_labels") + text(labels) + text("filenames") + text(names)
    return b"\x80\x02}(" + text("data") + array + rest + b"u."
