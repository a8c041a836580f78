"""Layouts, recognized by content: what is listed, in which order, and what is refused."""

import gzip
import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from ddkit.challenge import CIFAR100, TINYIMAGENET
from ddkit.data.cifar_archive import OFFICIAL_MD5
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.images import normalize
from ddkit.data.sources import FileSplit, open_source
from ddkit.errors import BadDataError, MissingDataError


def pixels_of(split):
    return np.concatenate(list(split.blocks()))


class TestImageFolders:
    @pytest.mark.parametrize("name", ["photos", "photos.zip"])
    @pytest.mark.parametrize("top", ["", "birds/"])
    @pytest.mark.parametrize("test", ["test", "val"])
    def test_splits_classes_and_labels(self, write_tree, photos, name, top, test):
        source = open_source(write_tree({top + path.replace("test/", f"{test}/"): d for path, d in photos.items()}, name))
        assert (source.kind, source.class_names, set(source.splits)) == ("image folder", ("cat", "dog"), {"train", "test"})
        names = tuple(f"{top}{test}/{animal}/{k}.png" for animal in ("cat", "dog") for k in range(2))
        assert source.splits["test"] == FileSplit(names, (0, 0, 1, 1))
        assert source.splits["train"].labels == (0, 0, 0, 1, 1, 1)

    def test_test_comes_before_val(self, write_tree, photos, picture):
        source = open_source(write_tree({**photos, "val/cat/v.png": picture(), "val/dog/v.png": picture()}))
        assert all(name.startswith("test/") for name in source.splits["test"].names)

    def test_classes_are_sorted_as_strings(self, write_tree, picture):
        names = ["b", "10", "9", "Z"]
        source = open_source(write_tree({f"{s}/{n}/1.png": picture() for s in ("train", "test") for n in names}))
        assert source.class_names == ("10", "9", "Z", "b")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda files: {k: v for k, v in files.items() if k != "test/dog/0.png" and k != "test/dog/1.png"},
             "test lacks classes that train has: dog"),
            (lambda files: {**files, "test/owl/1.png": b""}, "test has classes that train lacks: owl"),
            (lambda files: {**files, "train/Cat/1.png": b"", "test/Cat/1.png": b""}, "'Cat' and 'cat' differ only by case"),
            (lambda files: {**files, "test/DOG/1.png": b""}, "'DOG' and 'dog' differ only by case"),
            (lambda files: {**files, "train/cat/more/1.png": b""}, "train/cat/more/1.png lies deeper"),
            (lambda files: {k: v for k, v in files.items() if k.startswith("train")}, r"no folder 'test \(or val\)'"),
            (lambda files: {k: v for k, v in files.items() if k.startswith("test")}, "no folder 'train'"),
            (lambda files: {"papers/1.txt": b"", "notes.txt": b""}, "no layout that ddkit knows; it holds notes.txt, papers"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["photos", "photos.zip"])
    def test_what_would_shift_or_lose_labels_is_refused(self, write_tree, photos, change, message, name):
        if "Cat" in message and name == "photos" and _case_insensitive(write_tree({}, "probe.zip").parent):
            pytest.skip("this file system does not tell cases apart")
        with pytest.raises(BadDataError, match=message):
            open_source(write_tree(change(photos), name))

    def test_a_class_folder_without_images_is_named(self, write_tree, photos):
        path = write_tree(photos)
        for split in ("train", "test"):
            (path / split / "owl").mkdir()
        with pytest.raises(BadDataError, match="no images in train/owl"):
            open_source(path)


def _case_insensitive(folder):
    (folder / "CaSe").touch()
    return (folder / "case").exists()


TINY_IMAGENET = {
    "train/n02/images/n02_0.JPEG": b"",
    "train/n02/images/n02_1.JPEG": b"",
    "train/n02/n02_boxes.txt": b"",
    "train/n01/images/n01_0.JPEG": b"",
    "val/images/val_0.JPEG": b"",
    "val/images/val_1.JPEG": b"",
    "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n",
    "wnids.txt": b"n02\nn01\n",
    "words.txt": b"n01\tgoldfish, Carassius auratus\nn02\tnewt\nn99\tentity\n",
    "test/images/test_0.JPEG": b"",
}


class TestTinyImageNet:
    @pytest.mark.parametrize("name", ["anything", "anything.zip"])
    @pytest.mark.parametrize("top", ["", "tiny-imagenet-200/"])
    def test_labels_come_from_the_annotations_and_sorted_wnids(self, write_tree, name, top):
        source = open_source(write_tree({top + path: data for path, data in TINY_IMAGENET.items()}, name))
        assert (source.kind, source.class_names) == ("tiny-imagenet-200", ("n01", "n02"))
        assert source.class_titles == ("goldfish", "newt")
        assert source.listed_order == ("n02", "n01")
        assert source.splits["test"].names == (f"{top}val/images/val_1.JPEG", f"{top}val/images/val_0.JPEG")
        assert source.splits["test"].labels == (0, 1)
        assert source.splits["train"].labels == (0, 1, 1)

    @pytest.mark.parametrize(
        ("path", "data", "message"),
        [
            ("val/val_annotations.txt", b"val_0.JPEG\tn07\n", "line 1 of val_annotations.txt names the class 'n07'"),
            ("val/val_annotations.txt", b"val_9.JPEG\tn01\n", "names val_9.JPEG, which is not there"),
            ("val/val_annotations.txt", b"val_0.JPEG\tn01\n", "no class for val/images/val_1.JPEG"),
            ("words.txt", b"\xff\xfe", "words.txt cannot be read"),
        ],
    )
    def test_annotations_that_do_not_fit_are_refused(self, write_tree, path, data, message):
        with pytest.raises(BadDataError, match=message):
            open_source(write_tree({**TINY_IMAGENET, path: data}))

    def test_the_real_archive(self, tinyimagenet_zip):
        source = open_source(tinyimagenet_zip)
        assert source.class_names == CLASS_NAMES["tinyimagenet"]
        assert source.class_titles[0] == "goldfish"
        assert sorted(source.listed_order) == list(source.class_names) and source.listed_order != source.class_names
        assert (len(source.splits["train"].names), len(source.splits["test"].names)) == (20_000, 10_000)
        assert np.bincount(source.splits["test"].labels).tolist() == [50] * 200


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
    def test_packed_and_unpacked_by_content(self, splits, tmp_path, write_tree, protocol):
        files = self.pickles(splits, protocol)
        self.check(open_source(self.packed(files, tmp_path)))
        self.check(open_source(self.packed(files, tmp_path, "some.tar", "w")))
        self.check(open_source(write_tree(files, "plain")))
        self.check(open_source(write_tree({f"cifar-100-python/{k}": v for k, v in files.items()}, "above")))

    def test_pickles_as_python_2_wrote_them(self, splits, tmp_path):
        files = {
            split: _python2_split(np.repeat(np.array(values, np.uint8)[:, None], 3072, axis=1), labels, names)
            for split, (values, labels, names) in splits.items()
        }
        files["meta"] = _python2({"fine_label_names": list(self.NAMES)})
        self.check(open_source(self.packed(files, tmp_path)))

    def test_channels_and_rows_are_where_they_belong(self, tmp_path):
        row = np.arange(3072).astype(np.uint8)[None]
        value = {"data": row, "fine_labels": [0], "filenames": ["x"]}
        files = {"train": pickle.dumps(value), "test": pickle.dumps(value)}
        files["meta"] = pickle.dumps({"fine_label_names": ["only"]})
        images = pixels_of(open_source(self.packed(files, tmp_path)).splits["train"])
        assert (images[0] == row.reshape(3, 32, 32)).all()

    @pytest.mark.parametrize("order", "<>")
    def test_labels_may_be_an_array(self, splits, tmp_path, order):
        files = self.pickles(splits)
        for split in splits:
            value = pickle.loads(files[split])
            value["fine_labels"] = np.array(value["fine_labels"], f"{order}i8")
            value["data"] = np.asfortranarray(value["data"])
            files[split] = pickle.dumps(value, protocol=5 if order == "<" else 2)
        self.check(open_source(self.packed(files, tmp_path)))

    @pytest.mark.parametrize("made", [
        (np.ndarray, ((2,), np.dtype("O"), b"A" * 16)),  # two objects, wherever these bytes say
        (np.dtype, ("O",)),
        (np.ndarray.__reduce__(np.zeros(1))[0], (np.ndarray, (2,), b"O")),
    ])  # fmt: skip
    def test_a_pickle_makes_no_objects_of_bytes(self, splits, tmp_path, made):
        class Labels:
            def __reduce__(self):
                return made

        train = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": Labels()})
        files = {**self.pickles(splits), "train": train}
        with pytest.raises(BadDataError, match="'train'"):
            open_source(self.packed(files, tmp_path))

    def test_a_pickle_of_code_is_not_run(self, splits, tmp_path):
        class Code:
            def __reduce__(self):
                return (print, ("code ran",))

        files = {**self.pickles(splits), "meta": pickle.dumps(Code())}
        with pytest.raises(BadDataError, match="asks to run builtins.print"):
            open_source(self.packed(files, tmp_path))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train": b"not a pickle"}, "'train' is not a data pickle"),
            ({"meta": pickle.dumps([1])}, "holds a list, not the dict"),
            ({"meta": pickle.dumps({"label_names": []})}, "does not hold what cifar-100-python has there"),
            ({"test": pickle.dumps({"data": np.zeros((2, 5), np.uint8), "fine_labels": [0, 1]})}, r"\(2, 5\) for 2 labels"),
            ({"meta": pickle.dumps({"fine_label_names": ["cat"]})}, "labels beyond its 1 class names"),
        ],
    )  # fmt: skip
    def test_pickles_of_something_else_are_refused(self, splits, tmp_path, change, message):
        with pytest.raises(BadDataError, match=message):
            open_source(self.packed({**self.pickles(splits), **change}, tmp_path))

    def test_a_half_downloaded_archive(self, splits, tmp_path):
        path = self.packed(self.pickles(splits), tmp_path)
        whole = path.read_bytes()
        for size in (len(whole) // 2, len(whole) - 20, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(BadDataError, match="not a whole archive|is damaged"):
                open_source(path)

    def test_checksums_are_those_of_torchvision(self, splits, tmp_path, caplog):
        from torchvision.datasets import CIFAR100 as Theirs

        assert OFFICIAL_MD5 == {**dict(Theirs.train_list + Theirs.test_list), "meta": Theirs.meta["md5"]}
        open_source(self.packed(self.pickles(splits), tmp_path))
        assert "'train' is not the official file; its checksum differs" in caplog.text

    def test_another_tar_is_refused(self, tmp_path):
        with pytest.raises(BadDataError, match="lacks train, test, meta"):
            open_source(self.packed({"readme": b"hello"}, tmp_path))


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


class TestReferenceFiles:
    @pytest.mark.parametrize("spec", [CIFAR100, TINYIMAGENET])
    def test_pixels_come_back_exactly_and_ordered_by_class(self, tmp_path, spec):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (5, *spec.image_shape), generator=generator, dtype=torch.uint8)
        labels = torch.tensor([3, 1, 3, 0, 1])
        torch.save({"images_val": normalize(images, spec), "labels_val": labels}, tmp_path / "some_test.pt")
        source = open_source(tmp_path / "some_test.pt")
        assert (source.class_names, set(source.splits)) == (CLASS_NAMES[spec.name], {"test"})
        assert source.splits["test"].labels == (0, 1, 1, 3, 3)
        assert (pixels_of(source.splits["test"]) == images[[3, 1, 4, 0, 2]].numpy()).all()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.zeros(10, 3, 32, 32), "has no images_val and labels_val"),
            ({"images": torch.zeros(1)}, "has no images_val and labels_val"),
            ({"images_val": [1], "labels_val": [2]}, "has no images_val and labels_val"),
            ({"images_val": torch.zeros(2, 3, 28, 28), "labels_val": torch.zeros(2).long()}, "none of the challenge's"),
            ({"images_val": torch.zeros(2, 3, 32, 32), "labels_val": torch.zeros(3).long()}, "none of the challenge's"),
            ({"images_val": torch.zeros(2, 3, 32, 32), "labels_val": torch.tensor([0, 100])}, "not of classes 0 to 99"),
        ],
    )
    def test_other_tensor_files_are_refused(self, tmp_path, value, message):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(BadDataError, match=message):
            open_source(tmp_path / "x.pt")

    def test_values_normalized_with_other_constants_are_refused(self, tmp_path):
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        wrong = normalize(images, TINYIMAGENET)
        torch.save({"images_val": wrong, "labels_val": torch.tensor([0, 1])}, tmp_path / "x.pt")
        with pytest.raises(BadDataError, match="not normalized with the mean and standard deviation of cifar100"):
            pixels_of(open_source(tmp_path / "x.pt").splits["test"])

    def test_a_pickle_of_code_is_not_run(self, tmp_path):
        class Code:
            def __reduce__(self):
                return (print, ("code ran",))

        torch.save({"images_val": Code(), "labels_val": 1}, tmp_path / "x.pt")
        with pytest.raises(BadDataError, match="has no images_val"):
            open_source(tmp_path / "x.pt")


def test_anything_else_says_what_is_known(tmp_path):
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(BadDataError, match="neither a folder nor an archive") as caught:
        open_source(tmp_path / "notes.pdf")
    assert "cifar-100-python" in caught.value.remedy
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(BadDataError, match="not a whole archive"):
        open_source(tmp_path / "text.gz")
    with pytest.raises(MissingDataError, match="There is no"):
        open_source(tmp_path / "nowhere")


def test_the_real_cifar100_as_an_image_folder(cifar100_zip):
    source = open_source(cifar100_zip)
    assert source.class_names == CLASS_NAMES["cifar100"]
    assert (source.class_names[0], source.class_names[99]) == ("apple", "worm")
    assert np.bincount(source.splits["train"].labels).tolist() == [500] * 100
    assert source.splits["train"].names[0] == "cifar100/train/apple/apple_s_000027.webp"
