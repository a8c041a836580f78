"""A practice submission that has nothing wrong with it: real images of the built-in letters, ten a class."""

import pytest

from ddkit.challenge import GLYPHS
from ddkit.data.images import normalise
from ddkit.data.store import load_dataset
from ddkit.submission.layout import save_set, tensor_path


@pytest.fixture(scope="session")
def glyph_store(tmp_path_factory):
    """A cache folder in which the letters are prepared."""
    folder = tmp_path_factory.mktemp("glyph-cache")
    load_dataset("glyphs", "train", cache=folder)
    return folder


@pytest.fixture
def glyph_images(glyph_store, monkeypatch):
    """(100, 3, 32, 32) float32, normalised, the first ten training images of each class; the letters are prepared."""
    monkeypatch.setenv("DDKIT_CACHE", str(glyph_store))
    real = load_dataset("glyphs", "train")
    return normalise(real.images.unflatten(0, (10, -1))[:, :10].flatten(0, 1), GLYPHS)


@pytest.fixture
def folder(tmp_path, glyph_images):
    """A submission folder with glyphs.pt, its JSON and its contact sheet."""
    folder = tmp_path / "submission"
    save_set(tensor_path(folder, "glyphs"), glyph_images, GLYPHS, tuple("AEHKLOSTXZ"), {"method": "first images"})
    return folder
