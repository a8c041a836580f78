import os

import pytest
import torch
from PIL import Image

from ddkit.challenge import GLYPHS
from ddkit.data.images import normalize
from ddkit.errors import InvalidSubmissionError, MissingDataError, UsageError
from ddkit.runtime.files import sha256_of
from ddkit.runtime.tensor_files import save_torch
from ddkit.sets.distilled import (
    KIND_GENERATED,
    KIND_SUBMISSION,
    class_labels,
    likely_dataset,
    read_provenance,
    read_set,
    save_set,
)


@pytest.fixture
def images():
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return normalize(pixels, GLYPHS)


def test_rows_stand_class_by_class():
    assert class_labels(3, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert class_labels(3, 2).dtype == torch.int64


def test_a_saved_set_is_what_the_scorer_loads(tmp_path, images):
    files = save_set(tmp_path / "glyphs.pt", images, GLYPHS, {"seed": 7})
    loaded = torch.load(files.tensor, weights_only=True)
    assert loaded.dtype == torch.float32 and loaded.is_contiguous()
    assert torch.equal(loaded, images) and torch.equal(read_set(files.tensor).images, images)
    assert read_provenance(files.tensor)["seed"] == 7
    assert read_provenance(files.tensor)["images_per_class"] == 2
    with Image.open(files.sheet) as sheet:
        assert sheet.format == "PNG" and sheet.height > 10 * 48


def test_a_view_does_not_drag_its_storage_along(tmp_path, images):
    whole = torch.cat([images] * 20)
    files = save_set(tmp_path / "glyphs.pt", whole[:20], GLYPHS, {})
    assert files.tensor.stat().st_size < 2 * images.numel() * 4


@pytest.mark.parametrize("shape", [(15, 3, 32, 32), (0, 3, 32, 32), (20, 3, 16, 16), (20, 32, 32)])
def test_save_set_of_another_shape_raises_and_writes_nothing(tmp_path, shape):
    with pytest.raises(InvalidSubmissionError, match="not a set for glyphs"):
        save_set(tmp_path / "glyphs.pt", torch.zeros(shape), GLYPHS, {})
    assert list(tmp_path.iterdir()) == []


def test_read_set_of_what_check_refuses_raises_the_same_message(tmp_path, images):
    torch.save({"images": images}, tmp_path / "glyphs.pt")
    with pytest.raises(InvalidSubmissionError, match="a dict with the keys 'images'"):
        read_set(tmp_path / "glyphs.pt", "glyphs")


class TestReadSet:
    def test_a_saved_set_is_read_with_its_provenance_and_labels(self, tmp_path, images):
        files = save_set(tmp_path / "glyphs.pt", images, GLYPHS, {"kind": KIND_GENERATED})
        one = read_set(files.tensor)
        assert torch.equal(one.images, images) and one.spec is GLYPHS and one.path == files.tensor
        assert one.sha256 == sha256_of(files.tensor) and one.kind == KIND_GENERATED and one.warnings == ()
        assert one.ipc == 2 and torch.equal(one.labels, class_labels(10, 2))

    def test_the_dataset_is_taken_from_the_provenance_of_a_file_of_another_name(self, tmp_path, images):
        files = save_set(tmp_path / "mine.pt", images, GLYPHS, {})
        assert read_set(files.tensor).spec is GLYPHS
        files.provenance.unlink()
        with pytest.raises(UsageError, match="not named after a known dataset"):
            read_set(files.tensor)
        assert read_set(files.tensor, "glyphs").spec is GLYPHS

    def test_a_set_read_for_another_dataset_than_its_provenance_names_is_warned_of(self, tmp_path, images, caplog):
        path, provenance, _ = vars(save_set(tmp_path / "glyphs.pt", images, GLYPHS, {})).values()
        provenance.write_text(provenance.read_text().replace('"glyphs"', '"letters"'))
        assert read_set(path, "glyphs").spec is GLYPHS
        assert "was made for letters" in caplog.text and "is read as a set for glyphs" in caplog.text

    def test_provenance_of_another_tensor_is_ignored(self, tmp_path, images, caplog):
        files = save_set(tmp_path / "glyphs.pt", images, GLYPHS, {"kind": KIND_GENERATED})
        save_torch(images + 1, files.tensor)
        one = read_set(files.tensor)
        assert one.provenance == {} and one.kind == KIND_SUBMISSION
        assert "does not belong" in caplog.text

    def test_warnings_of_the_file_are_handed_on(self, tmp_path, images):
        save_torch(images.requires_grad_(), tmp_path / "glyphs.pt")
        one = read_set(tmp_path / "glyphs.pt")
        assert [finding.code for finding in one.warnings] == ["T005"] and not one.images.requires_grad

    def test_another_number_of_images_than_asked_for_raises_invalid_submission(self, tmp_path, images):
        save_torch(images, tmp_path / "glyphs.pt")
        with pytest.raises(InvalidSubmissionError, match="20 rows"):
            read_set(tmp_path / "glyphs.pt", ipc=3)

    def test_a_folder_a_zip_and_a_missing_file_raise_usage_and_missing_data_errors(self, tmp_path):
        (tmp_path / "glyphs.zip").write_bytes(b"PK")
        for path in (tmp_path, tmp_path / "glyphs.zip"):
            with pytest.raises(UsageError, match="is a"):
                read_set(path, "glyphs")
        with pytest.raises(MissingDataError, match=r"glyphs does not exist.*--dataset glyphs --out \S+glyphs\.pt$"):
            read_set(tmp_path / "glyphs")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_a_pipe_raises_usage_error_and_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "glyphs.pt")
        with pytest.raises(UsageError, match="pipe"):
            read_set(tmp_path / "glyphs.pt")


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("cifar-100.pt", "cifar100"), ("cifar100.pth", "cifar100"), ("cifar100 (1).pt", "cifar100"),
        ("CIFAR_100.pt", "cifar100"), ("tiny_imagenet.pt", "tinyimagenet"), ("Tiny-ImageNet.pt.pt", "tinyimagenet"),
        ("cifar100_ipc10.pt", "cifar100"), ("cifar10.pt", "cifar100"), ("cifar100-final.pt", "cifar100"),
        ("my_tinyimagenet_v2.pt", "tinyimagenet"), ("cifer100.pt", "cifar100"), ("images.pt", ""), ("result.pt", ""),
    ],
)  # fmt: skip
def test_the_nearest_dataset_is_found_for_a_file_of_a_wrong_name(name, dataset):
    assert likely_dataset(name) == dataset
