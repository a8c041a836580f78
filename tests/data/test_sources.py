"""Sources, recognized by content wherever the layout lies, and the challenge's reference files."""

import gzip
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddkit.challenge import CIFAR100, TINYIMAGENET
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.images import normalize
from ddkit.errors import BadDataError, MissingDataError


def pixels_of(split):
    return np.concatenate(list(split.blocks()))


def names_of(source):
    return [name.rpartition("/")[2] for name in source.splits["test"].names]


class TestPlaces:
    """The layout is found wherever people's archives have it."""

    TOPS = ("", "photos/", "a/photos/", "archive (1)/a/photos/", "./photos/", ".\\photos\\")

    @pytest.mark.parametrize("top", TOPS)
    @pytest.mark.parametrize("name", ["x", "x.zip", "x.tgz", "x.tar.xz", "x.tar.bz2", "x.tar"])
    def test_layout_below_other_folders_is_found(self, write_tree, photos, find, top, name):
        if "\\" in top and name == "x":
            pytest.skip("a folder has no names of another system")
        separator = "\\" if "\\" in top else "/"
        source = find(write_tree({top + path.replace("/", separator): data for path, data in photos.items()}, name))
        assert (source.class_names, names_of(source)) == (("cat", "dog"), ["0.png", "1.png"] * 2)

    @pytest.mark.parametrize(
        "others",
        [
            ["__MACOSX/photos/._train", "__MACOSX/._photos", "photos/.DS_Store", "photos/train/cat/._0.png"],
            ["photos/train/cat/Thumbs.db", "photos/train/desktop.ini", "photos/Thumbs.db", "desktop.ini"],
            ["photos/noisy_labels.csv", "photos/train.csv", "README.md", "LICENSE.txt"],
            ["docs/guide/index.html", "code/train.py", "code/models/net.py"],
            ["photos/unlabeled/1.png", "photos/annotations/boxes.json"],
            ["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"],
            ["other/train/notes.txt", "other/test/notes.txt"],
            ["train.txt", "test.txt", "meta.json"],
            ["photos/.cache/train/cat/0.png", "photos/@eaDir/train/0.png"],
            ["weights/model.zip", "weights/broken.tar.gz"],
        ],
    )
    @pytest.mark.parametrize("name", ["x", "x.zip", "x.tar.gz"])
    def test_other_files_next_to_the_layout_do_no_harm(self, write_tree, photos, find, others, name):
        files = {f"photos/{path}": data for path, data in photos.items()}
        source = find(write_tree({**dict.fromkeys(others, b"x"), **files}, name))
        assert (source.class_names, source.splits["train"].labels) == (("cat", "dog"), (0, 0, 0, 1, 1, 1))

    @pytest.mark.parametrize(
        "inner", ["photos.tar", "photos.tgz", "photos.tar.gz", "photos.tar.bz2", "photos.tar.xz", "photos.zip"]
    )
    @pytest.mark.parametrize("outer", ["outer", "outer.zip", "outer.tar.gz"])
    @pytest.mark.parametrize("folder", ["", "download/"])
    def test_archive_inside_a_folder_or_an_archive_is_opened(self, write_tree, photos, find, inner, outer, folder):
        data = write_tree({f"photos/{path}": data for path, data in photos.items()}, inner).read_bytes()
        source = find(write_tree({folder + inner: data, "README.md": b""}, outer))
        assert source.class_names == ("cat", "dog")
        content = source.splits["test"]
        assert content.tree.read(content.names[3]) == photos["test/dog/1.png"]

    def test_layout_in_a_folder_is_preferred_to_archives_next_to_it(self, write_tree, photos, picture, find):
        other = write_tree({path: picture() for path in ("train/x/1.png", "test/x/1.png")}, "other.zip")
        source = find(write_tree({**photos, "other.zip": other.read_bytes()}))
        assert source.class_names == ("cat", "dog")

    def test_several_datasets_are_named_unless_their_classes_tell(self, write_tree, photos, find):
        files = {f"{top}/{path}": data for top in ("pets", "more") for path, data in photos.items()}
        files |= {f"birds/{split}/owl/1.png": b"" for split in ("train", "test")}
        path = write_tree(files)
        with pytest.raises(BadDataError, match="several datasets: birds, more, pets") as caught:
            find(path)
        assert "the path of one of them" in caught.value.remedy
        assert find(path, classes=("owl",)).class_names == ("owl",)

    def test_dataset_that_is_meant_may_lie_deeper_than_another(self, write_tree, photos, find):
        files = {**photos, **{f"deep/er/{split}/owl/1.png": b"" for split in ("train", "test")}}
        path = write_tree({f"pets/{path}" if not path.startswith("deep") else path: data for path, data in files.items()})
        assert find(path).class_names == ("cat", "dog")
        assert find(path, classes=("owl",)).class_names == ("owl",)

    def test_damaged_archive_inside_a_folder_is_named(self, write_tree, photos, find):
        data = write_tree(photos, "photos.tar.gz").read_bytes()
        with pytest.raises(BadDataError, match=r"photos.tar.gz is not a whole archive"):
            find(write_tree({"photos.tar.gz": data[: len(data) // 2]}, "folder"))


class TestReferenceFiles:
    @pytest.mark.parametrize("spec", [CIFAR100, TINYIMAGENET])
    def test_pixels_of_a_reference_file_come_back_exactly_and_ordered_by_class(self, tmp_path, spec, find):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (5, *spec.image_shape), generator=generator, dtype=torch.uint8)
        labels = torch.tensor([3, 1, 3, 0, 1])
        torch.save({"images_val": normalize(images, spec), "labels_val": labels}, tmp_path / "some_test.pt")
        source = find(tmp_path / "some_test.pt")
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
            ({"images_val": torch.zeros(2, 3, 32, 32), "labels_val": torch.tensor([0, 100])}, "outside the classes 0 to 99"),
        ],
    )
    def test_other_tensor_files_are_refused(self, tmp_path, value, message, find):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(BadDataError, match=message):
            find(tmp_path / "x.pt")

    def test_values_normalized_with_other_constants_are_refused(self, tmp_path, find):
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        wrong = normalize(images, TINYIMAGENET)
        torch.save({"images_val": wrong, "labels_val": torch.tensor([0, 1])}, tmp_path / "x.pt")
        with pytest.raises(BadDataError, match="not normalized with the mean and standard deviation of cifar100"):
            pixels_of(find(tmp_path / "x.pt").splits["test"])

    def test_file_of_code_is_not_run(self, tmp_path, find):
        class Code:
            def __reduce__(self):
                return (print, ("code ran",))

        torch.save({"images_val": Code(), "labels_val": 1}, tmp_path / "x.pt")
        with pytest.raises(BadDataError, match="has no images_val"):
            find(tmp_path / "x.pt")


WORDS = ["train", "val", "test", "images", "cat", "dog", "meta", "data", "a", "Cat", "1.png", "2.png", "train.npy", "x.zip"]
WORDS += ["val_annotations.txt", "words.txt", "wnids.txt", "x.parquet", "test.parquet", "x.tar", "train.npz", "README.md", ".."]
CONTENTS = [
    b"",
    b"1.png\tcat\n",
    b"cat dog\n",
    b"PK\x05\x06" + bytes(18),
    b"\x1f\x8b",
    b"\x93NUMPY\x01",
    b"PAR1PAR1",
    b"\x80\x04.",
]


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("/".join), st.sampled_from(CONTENTS), max_size=12
    )
)
def test_zip_of_any_content_is_a_dataset_or_one_error(tmp_path, find, files):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    try:
        source = find(path)
    except (BadDataError, MissingDataError) as error:
        assert error.message
    else:
        assert all(set(split.labels) == set(range(len(source.class_names))) for split in source.splits.values())


@pytest.mark.parametrize(
    ("data", "kind"), [(b"7z\xbc\xaf\x27\x1c", "7z"), (b"Rar!\x1a\x07", "RAR"), (b"\x28\xb5\x2f\xfd", "Zstandard")]
)
def test_archives_that_are_not_read_are_named(tmp_path, find, data, kind):
    (tmp_path / "data").write_bytes(data)
    with pytest.raises(BadDataError, match=f"is a {kind} archive") as caught:
        find(tmp_path / "data")
    assert "Unpack it" in caught.value.remedy


def test_arrow_files_are_refused_with_the_command_that_converts_them(write_tree, find):
    with pytest.raises(BadDataError, match="not have a layout that ddkit knows") as caught:
        find(
            write_tree(
                {f"{split}/data-00000-of-00001.arrow": b"" for split in ("train", "test")} | {"dataset_dict.json": b"{}"}
            )
        )
    assert "to_parquet(f'parquet/{s}.parquet')" in caught.value.remedy


def test_other_files_are_refused_with_the_known_layouts(tmp_path, find):
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(BadDataError, match="neither a folder nor an archive") as caught:
        find(tmp_path / "notes.pdf")
    assert "cifar-100-python" in caught.value.remedy
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(BadDataError, match="not a whole archive"):
        find(tmp_path / "text.gz")
    with pytest.raises(MissingDataError, match="does not exist"):
        find(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_real_cifar100_is_an_image_folder(cifar100_zip, find):
    source = find(cifar100_zip)
    assert source.class_names == CLASS_NAMES["cifar100"]
    assert (source.class_names[0], source.class_names[99]) == ("apple", "worm")
    assert np.bincount(source.splits["train"].labels).tolist() == [500] * 100
    assert source.splits["train"].names[0] == "cifar100/train/apple/apple_s_000027.webp"
