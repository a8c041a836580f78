"""Image folders and tiny-imagenet-200: which files have which labels, and what is refused."""

import codecs

import numpy as np
import pytest

from ddkit.data.class_names import CLASS_NAMES
from ddkit.errors import BadDataError, UsageError


class TestImageFolders:
    @pytest.mark.parametrize("name", ["photos", "photos.zip"])
    @pytest.mark.parametrize("top", ["", "birds/"])
    @pytest.mark.parametrize("test", ["test", "val"])
    def test_folder_and_zip_give_splits_classes_and_labels(self, write_tree, photos, find, name, top, test):
        source = find(write_tree({top + path.replace("test/", f"{test}/"): d for path, d in photos.items()}, name))
        assert (source.kind, source.class_names, set(source.splits)) == ("image folder", ("cat", "dog"), {"train", "test"})
        names = tuple(f"{top}{test}/{animal}/{k}.png" for animal in ("cat", "dog") for k in range(2))
        assert (source.splits["test"].names, source.splits["test"].labels) == (names, (0, 0, 1, 1))
        assert source.splits["train"].labels == (0, 0, 0, 1, 1, 1)
        assert source.notes == ()

    @pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
    @pytest.mark.parametrize("test", ["test", "testing", "val", "valid", "validation", "Val"])
    def test_split_names_in_use_are_known(self, write_tree, photos, find, train, test):
        spelled = {path.replace("train/", f"{train}/").replace("test/", f"{test}/"): data for path, data in photos.items()}
        source = find(write_tree(spelled))
        assert [len(source.splits[split].names) for split in ("train", "test")] == [6, 4]
        assert source.splits["test"].names[0] == f"{test}/cat/0.png"

    def test_test_is_taken_before_val_which_is_noted_and_can_be_chosen(self, write_tree, photos, picture, find):
        path = write_tree({**photos, "val/cat/v.png": picture(), "val/dog/v.png": picture()})
        source = find(path)
        assert all(name.startswith("test/") for name in source.splits["test"].names)
        (note,) = source.notes
        assert "labeled images in test and in val; 'test' became the test split" in note and "--test-split val" in note
        source = find(path, test_split="val")
        assert source.splits["test"].names == ("val/cat/v.png", "val/dog/v.png") and source.notes == ()
        with pytest.raises(UsageError, match="no labeled images in a split 'validation'") as caught:
            find(path, test_split="validation")
        assert "test, val" in caught.value.remedy

    @pytest.mark.parametrize("unlabeled", ["test/images/1.png", "test/1.png", "test/unknown.txt"])
    def test_labeled_val_wins_over_unlabeled_test(self, write_tree, photos, picture, find, unlabeled):
        files = {path.replace("test/", "val/"): data for path, data in photos.items()}
        source = find(write_tree({**files, unlabeled: picture()}))
        assert source.splits["test"].names[0] == "val/cat/0.png" and source.notes == ()

    @pytest.mark.parametrize("split", ["test", "val"])
    def test_unlabeled_test_alone_is_named(self, write_tree, photos, picture, find, split):
        files = {path: data for path, data in photos.items() if path.startswith("train")}
        with pytest.raises(BadDataError, match=r"no labeled images in 'test' \(or 'val'\)"):
            find(write_tree({**files, f"{split}/images/1.png": picture()}))

    def test_images_may_lie_in_a_folder_of_the_class(self, write_tree, photos, find):
        moved = {"/images/".join(path.rsplit("/", 1)): data for path, data in photos.items()}
        source = find(write_tree(moved))
        assert source.class_names == ("cat", "dog") and source.splits["test"].labels == (0, 0, 1, 1)

    def test_splits_unpacked_into_folders_of_their_own_names_are_found(self, write_tree, photos, find):
        source = find(write_tree({f"{path.partition('/')[0]}/{path}": data for path, data in photos.items()}))
        assert source.class_names == ("cat", "dog") and source.splits["test"].names[0] == "test/test/cat/0.png"

    def test_classes_are_sorted_as_strings(self, write_tree, picture, find):
        names = ["b", "10", "9", "Z"]
        source = find(write_tree({f"{s}/{n}/1.png": picture() for s in ("train", "test") for n in names}))
        assert source.class_names == ("10", "9", "Z", "b")

    def test_official_classes_in_another_spelling_have_the_official_order(self, write_tree, picture, find):
        spelled = {name: name.replace("_", " ").title() for name in CLASS_NAMES["cifar100"]}
        spelled["lawn_mower"], spelled["crab"] = "LAWN-MOWER", "cra"
        files = {f"{split}/{other}/{name}.png": b"" for split in ("train", "test") for name, other in spelled.items()}
        source = find(write_tree(files))
        assert source.class_names == CLASS_NAMES["cifar100"]
        names = [path.rpartition("/")[2].removesuffix(".png") for path in source.splits["test"].names]
        assert [source.class_names[label] for label in source.splits["test"].labels] == names

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda files: {k: v for k, v in files.items() if k != "test/dog/0.png" and k != "test/dog/1.png"},
             "test does not have all the classes of train; missing: dog"),
            (lambda files: {**files, "test/owl/1.png": b""}, "test has classes that train does not have: owl"),
            (lambda files: {**files, "train/cat/more/1.png": b""}, "train/cat/more/1.png lies deeper"),
            (lambda files: {k: v for k, v in files.items() if k.startswith("train")}, "no labeled images in 'test'"),
            (lambda files: {k: v for k, v in files.items() if k.startswith("test")}, "no labeled images in 'train'"),
            (lambda files: {"papers/1.txt": b"", "notes.txt": b""}, "layout that ddkit knows; it holds notes.txt, papers"),
            (lambda files: {k.replace("test/", "test/other "): v for k, v in files.items()}, "train does not have: other cat"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("name", ["photos", "photos.zip"])
    def test_files_that_would_shift_or_lose_labels_are_refused(self, write_tree, photos, find, change, message, name):
        with pytest.raises(BadDataError, match=message):
            find(write_tree(change(photos), name))

    def test_class_folder_without_images_is_named(self, write_tree, photos, find):
        path = write_tree(photos)
        for split in ("train", "test"):
            (path / split / "owl").mkdir()
        with pytest.raises(BadDataError, match="no images in train/owl"):
            find(path)


ANNOTATIONS = "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"
TINY_IMAGENET = {
    "train/n02/images/n02_0.JPEG": b"",
    "train/n02/images/n02_1.JPEG": b"",
    "train/n02/n02_boxes.txt": b"",
    "train/n01/images/n01_0.JPEG": b"",
    "val/images/val_0.JPEG": b"",
    "val/images/val_1.JPEG": b"",
    "val/val_annotations.txt": ANNOTATIONS.encode(),
    "wnids.txt": b"n02\nn01\n",
    "words.txt": b"n01\tgoldfish, Carassius auratus\nn02\tnewt\nn99\tentity\n",
    "test/images/test_0.JPEG": b"",
}
SORTED = {path: data for path, data in TINY_IMAGENET.items() if not path.startswith("val/")}
LABELS = {"val_1.JPEG": "n01", "val_0.JPEG": "n02"}


def labels_of(source, split="test"):
    """The class name of each image by its file name."""
    content = source.splits[split]
    return {
        path.rpartition("/")[2]: source.class_names[label] for path, label in zip(content.names, content.labels, strict=True)
    }


class TestTinyImageNet:
    @pytest.mark.parametrize("name", ["anything", "anything.zip"])
    @pytest.mark.parametrize("top", ["", "tiny-imagenet-200/"])
    def test_labels_come_from_the_annotations_and_sorted_wnids(self, write_tree, find, name, top):
        source = find(write_tree({top + path: data for path, data in TINY_IMAGENET.items()}, name))
        assert (source.kind, source.class_names) == ("tiny-imagenet-200", ("n01", "n02"))
        assert source.class_titles == ("goldfish", "newt")
        assert source.listed_order == ("n02", "n01")
        assert source.splits["test"].names == (f"{top}val/images/val_1.JPEG", f"{top}val/images/val_0.JPEG")
        assert source.splits["test"].labels == (0, 1)
        assert source.splits["train"].labels == (0, 1, 1)

    @pytest.mark.parametrize(
        "val",
        [
            {"val/n02/val_0.JPEG": b"", "val/n01/val_1.JPEG": b""},
            {"val/n02/images/val_0.JPEG": b"", "val/n01/images/val_1.JPEG": b""},
            {"val/n02/images/val_0.JPEG": b"", "val/n01/val_1.JPEG": b""},
            {"val/images/n02/val_0.JPEG": b"", "val/images/n01/val_1.JPEG": b""},
            {"val/images/n02/val_0.JPEG": b"", "val/n01/val_1.JPEG": b""},
            # Copied instead of moved.
            {"val/n02/val_0.JPEG": b"", "val/n01/val_1.JPEG": b"", "val/images/val_0.JPEG": b"", "val/images/val_1.JPEG": b""},
            {"valid/n02/val_0.JPEG": b"", "valid/n01/val_1.JPEG": b""},
            # The official validation images in a folder that was renamed.
            {"test/n02/val_0.JPEG": b"", "test/n01/val_1.JPEG": b""},
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("annotations", [None, ANNOTATIONS])
    @pytest.mark.parametrize("left", [(), ("wnids.txt",), ("test/images/test_0.JPEG", "wnids.txt", "words.txt")])
    def test_sorted_val_has_the_labels_of_its_folders(self, write_tree, find, val, annotations, left):
        files = {path: data for path, data in SORTED.items() if path == "wnids.txt" and not left or path not in left}
        split = next(iter(val)).partition("/")[0]
        if annotations:
            files[f"{split}/val_annotations.txt"] = annotations.encode()
        if split == "test":
            files = {path: data for path, data in files.items() if not path.startswith("test/images")}
        source = find(write_tree({**files, **val}))
        assert labels_of(source) == LABELS
        assert source.class_names == ("n01", "n02")
        assert source.listed_order == (("n02", "n01") if "wnids.txt" in files else ())

    def test_half_sorted_val_has_all_labels(self, write_tree, find):
        val = {"val/n02/val_0.JPEG": b"", "val/images/val_1.JPEG": b"", "val/val_annotations.txt": ANNOTATIONS.encode()}
        assert labels_of(find(write_tree({**SORTED, **val}))) == LABELS

    def test_annotations_of_more_images_than_a_sorted_val_has_are_read(self, write_tree, find):
        annotations = ANNOTATIONS + "val_2.JPEG\tn01\nval_3.JPEG\tn07\n"
        val = {"val/n02/val_0.JPEG": b"", "val/n01/val_1.JPEG": b"", "val/val_annotations.txt": annotations.encode()}
        assert labels_of(find(write_tree({**SORTED, **val}))) == LABELS

    def test_train_sorted_below_images_is_read(self, write_tree, find):
        files = {
            f"{split}/images/{name}/{k}.png": b"" for split in ("train", "val") for name in ("n01", "n02") for k in range(2)
        }
        source = find(write_tree(files))
        assert source.class_names == ("n01", "n02") and source.splits["train"].labels == (0, 0, 1, 1)

    def test_empty_images_folder_that_sorting_left_is_no_class(self, write_tree, find):
        path = write_tree({**SORTED, "val/n02/val_0.JPEG": b"", "val/n01/val_1.JPEG": b""})
        (path / "val" / "images").mkdir()
        assert labels_of(find(path)) == LABELS

    def test_flattened_train_and_val_are_read(self, write_tree, find):
        files = {path.replace("images/", ""): data for path, data in TINY_IMAGENET.items()}
        source = find(write_tree(files))
        assert labels_of(source) == LABELS
        assert source.splits["train"].names == ("train/n01/n01_0.JPEG", "train/n02/n02_0.JPEG", "train/n02/n02_1.JPEG")

    @pytest.mark.parametrize(
        "text",
        [
            ANNOTATIONS.replace("\n", "\r\n").encode(),
            ANNOTATIONS.replace("\n", "\r").encode(),
            ANNOTATIONS.replace("\n", "  \n").encode(),
            ANNOTATIONS.replace("\n", "\t\n").encode(),
            f"\n\n{ANNOTATIONS}\n \n\t\n".encode(),
            ANNOTATIONS.rstrip().encode(),
            codecs.BOM_UTF8 + ANNOTATIONS.encode(),
            ANNOTATIONS.encode("utf-16"),
            codecs.BOM_UTF16_BE + ANNOTATIONS.encode("utf-16-be"),
            ANNOTATIONS.encode("utf-16-le"),
            ANNOTATIONS.encode("utf-16-be"),
            ANNOTATIONS.encode("utf-32"),
            codecs.BOM_UTF8 + ANNOTATIONS.replace("\n", "\r\n\r\n").encode(),
            b"val_0.JPEG\tn02\nval_1.JPEG\tn01\n",
            b"val_0.JPEG n02\nval_1.JPEG n01\n",
            b"val_0.JPEG,n02\nval_1.JPEG,n01\n",
            b" val_0.JPEG  n02 0 0 9 9\n val_1.JPEG  n01 0 0 9 9\n",
            b"images/val_0.JPEG\tn02\n./val/images/val_1.JPEG\tn01\n",
            b"val_0.png\tn02\nval_1.png\tn01\n",
            ANNOTATIONS.encode() * 2,
        ],
    )
    def test_annotations_as_editors_save_them_are_read(self, write_tree, find, text):
        assert labels_of(find(write_tree({**TINY_IMAGENET, "val/val_annotations.txt": text}))) == LABELS

    @pytest.mark.parametrize("folder", ["val/", ""])
    @pytest.mark.parametrize("name", ["val_annotations.txt", "Val_Annotations.txt"])
    def test_annotations_are_found_in_val_and_above(self, write_tree, find, folder, name):
        files = {path: data for path, data in TINY_IMAGENET.items() if "annotations" not in path}
        assert labels_of(find(write_tree({**files, folder + name: ANNOTATIONS.encode()}))) == LABELS

    @pytest.mark.parametrize(
        ("words", "titles"),
        [
            (None, ("n01", "n02")),
            (b"", ("n01", "n02")),
            (b"n01\tgoldfish\n", ("goldfish", "n02")),
            ("n01\tpoisson doré\nn02\ttriton\n".encode("latin-1"), ("poisson doré", "triton")),
            ("n01\tpoisson doré\nn02\ttriton\n".encode("utf-16"), ("poisson doré", "triton")),
            (codecs.BOM_UTF8 + "n01\tpoisson doré\r\n\r\nn02\ttriton\r\n".encode(), ("poisson doré", "triton")),
            ("n01\t金魚\n".encode("gbk"), None),
            (b"\xff\xfe", ("n01", "n02")),
            (b"\xff\xfe\x00", None),
            (b"n01 goldfish, Carassius auratus\nn02 newt", ("goldfish", "newt")),
        ],
    )
    def test_words_in_any_encoding_only_make_titles(self, write_tree, find, words, titles):
        files = {path: data for path, data in TINY_IMAGENET.items() if path != "words.txt"}
        source = find(write_tree(files if words is None else {**files, "words.txt": words}))
        assert labels_of(source) == LABELS
        assert source.class_titles == titles if titles else len(source.class_titles) == 2

    @pytest.mark.parametrize(
        "wnids",
        [b"n02\n\nn01\n\n", b"\r\nn02\r\nn01", b"n02 \nn01\t\n", codecs.BOM_UTF8 + b"n02\nn01\n", "n02\nn01\n".encode("utf-16"),
         b"n02\nn03\nn01\n", b"n02\nn01\nn02\n"],
    )  # fmt: skip
    def test_listed_order_survives_how_wnids_are_saved(self, write_tree, find, wnids):
        assert find(write_tree({**TINY_IMAGENET, "wnids.txt": wnids})).listed_order == ("n02", "n01")

    @pytest.mark.parametrize("wnids", [b"n02\n", b"nothing of this"])
    def test_listed_order_of_other_classes_is_unknown(self, write_tree, find, wnids):
        assert find(write_tree({**TINY_IMAGENET, "wnids.txt": wnids})).listed_order == ()

    @pytest.mark.parametrize(
        ("path", "data", "message"),
        [
            ("val/val_annotations.txt", b"val_0.JPEG\tn07\n", "line 1 of val_annotations.txt names the class 'n07'"),
            ("val/val_annotations.txt", b"\n\r\nval_0.JPEG\tn02\r\nval_1.JPEG\n", "line 4 .* names the class ''"),
            ("val/val_annotations.txt", b"val_9.JPEG\tn01\n", "line 1 .* names val_9.JPEG, which does not exist"),
            ("val/val_annotations.txt", b"val_0.JPEG\tn01\n", "val/images/val_1.JPEG does not have a class"),
            ("val/val_annotations.txt", ANNOTATIONS.encode() + b"val_0.JPEG\tn01\n", "line 3 .* a second class"),
            ("val/n01/val_0.JPEG", b"", "line 1 .* gives val_0.JPEG the class 'n02', but the file lies in .* 'n01'"),
            ("val/images/val_2.JPEG", b"", "val/images/val_2.JPEG does not have a class"),
        ],
    )  # fmt: skip
    def test_annotations_that_do_not_fit_are_refused(self, write_tree, find, path, data, message):
        with pytest.raises(BadDataError, match=message):
            find(write_tree({**TINY_IMAGENET, path: data}))

    def test_images_left_unsorted_without_annotations_are_refused(self, write_tree, find):
        val = {"val/n02/val_0.JPEG": b"", "val/n01/val_1.JPEG": b"", "val/images/val_2.JPEG": b""}
        with pytest.raises(BadDataError, match="val/images/val_2.JPEG does not have a class"):
            find(write_tree({**SORTED, **val}))

    @pytest.mark.slow
    def test_the_real_archive_has_the_official_classes(self, tinyimagenet_zip, find):
        source = find(tinyimagenet_zip)
        assert source.class_names == CLASS_NAMES["tinyimagenet"]
        assert source.class_titles[0] == "goldfish"
        assert sorted(source.listed_order) == list(source.class_names) and source.listed_order != source.class_names
        assert (len(source.splits["train"].names), len(source.splits["test"].names)) == (20_000, 10_000)
        assert np.bincount(source.splits["test"].labels).tolist() == [50] * 200
