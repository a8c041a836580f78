import logging

import pytest
import torch
from PIL import Image

from ddkit.challenge import GLYPHS
from ddkit.data.images import normalize
from ddkit.errors import InvalidSubmissionError
from ddkit.sets.distilled import load_tensor, read_facts, row_labels, save_set, tensor_path

NAMES = tuple("AEHKLOSTXZ")


@pytest.fixture
def images():
    pixels = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return normalize(pixels, GLYPHS)


def test_rows_stand_class_by_class():
    assert row_labels(3, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert row_labels(3, 2).dtype == torch.int64


def test_a_saved_set_is_what_the_scorer_loads(tmp_path, images):
    files = save_set(tensor_path(tmp_path, "glyphs"), images, GLYPHS, NAMES, {"seed": 7})
    loaded = torch.load(files.tensor, weights_only=True)
    assert loaded.dtype == torch.float32 and loaded.is_contiguous()
    assert torch.equal(loaded, images) and torch.equal(load_tensor(files.tensor, GLYPHS), images)
    assert read_facts(files.tensor)["seed"] == 7
    assert read_facts(files.tensor)["images_per_class"] == 2
    with Image.open(files.sheet) as sheet:
        assert sheet.format == "PNG" and sheet.height > 10 * 48


def test_a_view_does_not_drag_its_storage_along(tmp_path, images):
    whole = torch.cat([images] * 20)
    files = save_set(tmp_path / "glyphs.pt", whole[:20], GLYPHS, NAMES, {})
    assert files.tensor.stat().st_size < 2 * images.numel() * 4


def test_the_same_set_makes_the_same_bytes_under_any_name(tmp_path, images):
    first = save_set(tmp_path / "one.pt", images, GLYPHS, NAMES, {})
    second = save_set(tmp_path / "two.pt", images, GLYPHS, NAMES, {})
    assert first.tensor.read_bytes() == second.tensor.read_bytes()


def test_facts_of_another_tensor_are_left_aside(tmp_path, images, caplog):
    files = save_set(tmp_path / "glyphs.pt", images, GLYPHS, NAMES, {"seed": 7})
    torch.save(images + 1, files.tensor)
    with caplog.at_level(logging.WARNING):
        assert read_facts(files.tensor) == {}
    assert "does not belong" in caplog.text
    files.facts.unlink()
    assert read_facts(files.tensor) == {}


@pytest.mark.parametrize("shape", [(15, 3, 32, 32), (0, 3, 32, 32), (20, 3, 16, 16), (20, 32, 32)])
def test_what_is_no_set_is_not_written(tmp_path, shape):
    with pytest.raises(InvalidSubmissionError, match="no set for glyphs"):
        save_set(tmp_path / "glyphs.pt", torch.zeros(shape), GLYPHS, NAMES, {})
    assert list(tmp_path.iterdir()) == []


def test_loading_what_check_refuses_says_the_same(tmp_path, images):
    torch.save({"images": images}, tmp_path / "glyphs.pt")
    with pytest.raises(InvalidSubmissionError, match="a dict with the keys 'images'"):
        load_tensor(tmp_path / "glyphs.pt", GLYPHS)
