import shutil

import pytest
import torch

from ddkit.checks.classifier import class_information, class_model, fit_class_model, image_features
from ddkit.data.store import ImageSet, load_dataset
from ddkit.errors import BadDataError


def test_class_model_knows_images_that_it_was_not_fitted_on(glyph_images):
    test = load_dataset("glyphs", "test")
    guessed = class_model("glyphs").log_probabilities(test.images.float() / 255).argmax(dim=1)
    assert (guessed == test.labels).float().mean() > 0.8


@pytest.mark.slow
def test_class_model_is_read_from_the_cache_and_fitted_again_if_that_is_damaged(letters, own_cache):
    first = class_model("glyphs")
    (kept,) = (own_cache / "_checks").glob("glyphs-*.safetensors")
    written = kept.stat().st_mtime_ns
    assert torch.equal(class_model("glyphs").weight, first.weight) and kept.stat().st_mtime_ns == written
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    torch.testing.assert_close(class_model("glyphs").weight, first.weight)
    assert len(kept.read_bytes()) == len(whole)


@pytest.mark.slow
def test_class_model_tells_the_progress_of_the_fit_and_nothing_once_it_is_kept(letters, own_cache):
    shutil.rmtree(own_cache / "_checks")
    told = []
    class_model("glyphs", progress=told.append)
    assert told[0].done == 0 and told[-1].done == told[-1].total == 2000
    assert all("glyphs" in each.task for each in told)
    told.clear()
    class_model("glyphs", progress=told.append)
    assert told == []


@pytest.mark.slow
def test_class_model_is_fitted_if_the_cache_cannot_be_written(letters, own_cache):
    shutil.rmtree(own_cache / "_checks")
    (own_cache / "_checks").write_text("")
    assert class_model("glyphs").weight.isfinite().all()


def test_image_features_of_one_image_do_not_depend_on_the_others():
    images = torch.rand(300, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    together = image_features(images)
    assert together.shape == (300, 1024) and together.isfinite().all()
    torch.testing.assert_close(image_features(images[260:261]), together[260:261])


def test_image_features_of_flat_and_extreme_images_are_finite():
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.full((3, 32, 32), 1e30)])
    assert image_features(images).isfinite().all()


def test_class_information_of_certain_and_of_constant_guesses():
    certain = torch.eye(8).clamp_min(1e-12).log()
    assert class_information(certain) == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-4)
    idle = torch.full((20, 8), 1 / 8).log()
    assert class_information(idle) == pytest.approx(0, abs=1e-6)


def test_fit_class_model_without_images_of_a_class_raises_bad_data_error():
    real = ImageSet(torch.zeros(6, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 0, 0, 1, 1, 1]), ("a", "b", "c"))
    with pytest.raises(BadDataError, match="Class 2 has 0 training images"):
        fit_class_model(real, 3, "glyphs")
