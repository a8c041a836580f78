"""The modes of each class in latent space: what k-means finds, of kept latents and of images."""

import dataclasses
import shutil
import threading

import pytest
import torch

from ddkit.errors import UsageError
from ddkit.generator.modes import find_modes
from ddkit.generator.training.train import TrainingRequest, train
from ddkit.runtime.files import cache_folder


@pytest.fixture
def trained(data, config, tmp_path):
    """A trained model and its folder, whose latents of the 12 training images are next to it."""
    short = dataclasses.replace(config, denoiser_optimizer=dataclasses.replace(config.denoiser_optimizer, steps=1))
    return train(data, TrainingRequest(short, tmp_path / "run")), tmp_path / "run"


def modes_of(trained, data, count, *, images=None, sha256=None, **options):
    model, folder = trained
    return find_modes(folder, model, images or data.images, count, dataset_sha256=sha256 or data.sha256, **options)


def latents_of(trained, data):
    from safetensors.torch import load_file

    model, folder = trained
    latents = load_file(folder / "checkpoints" / "latents.safetensors")["latents"][:, 0].float()
    return latents * model.autoencoder.config.scaling_factor


def test_single_mode_is_the_mean_of_the_scaled_latents_of_its_class(trained, data):
    modes, latents = modes_of(trained, data, 1), latents_of(trained, data)
    assert modes.shape == (3, 1, 2, 4, 4) and modes.dtype == torch.float32
    for label in range(3):
        torch.testing.assert_close(modes[label, 0], latents[data.images.labels == label].mean(dim=0), atol=1e-4, rtol=1e-4)


def test_more_modes_than_a_class_has_images_are_its_images_in_random_order_repeated(trained, data):
    labels = torch.tensor([0] * 7 + [1] * 4 + [2])
    unequal = dataclasses.replace(data.images, labels=labels)
    latents, modes = latents_of(trained, data), modes_of(trained, data, 5, images=unequal, sha256=data.sha256)
    assert modes.shape == (3, 5, 2, 4, 4)
    rows = torch.cdist(modes[1].flatten(1), latents.flatten(1)).argmin(dim=1).tolist()
    assert sorted(rows[:4]) == [7, 8, 9, 10] and rows[:4] != [7, 8, 9, 10] and rows[4] == rows[0]
    torch.testing.assert_close(modes[1], latents[rows])
    torch.testing.assert_close(modes[2], latents[[11] * 5])
    assert torch.cdist(latents[:7].flatten(1), modes[0].flatten(1)).min(dim=1).values.max() > 1e-3  # means of some


def test_same_seed_finds_the_same_modes(trained, data):
    first = modes_of(trained, data, 2)
    (kept,) = (cache_folder() / "_modes").glob("*.safetensors")
    kept.unlink()
    assert torch.equal(modes_of(trained, data, 2), first)


def test_without_latents_the_images_are_encoded(trained, data):
    _, folder = trained
    of_latents, latents = modes_of(trained, data, 1), latents_of(trained, data)
    (folder / "checkpoints" / "latents.safetensors").unlink()
    seen = []
    of_images = modes_of(trained, data, 1, seed=1, progress=seen.append)
    torch.testing.assert_close(of_images, of_latents, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(of_images[1, 0], latents[data.images.labels == 1].mean(dim=0), atol=2e-3, rtol=1e-3)
    assert {(each.task, each.total) for each in seen} == {("Encoding the training set", 12), ("Finding modes", 3)}


def test_images_are_encoded_once_for_any_number_of_modes(trained, data):
    _, folder = trained
    (folder / "checkpoints" / "latents.safetensors").unlink()
    seen = []
    for count in (1, 2):
        modes_of(trained, data, count, progress=seen.append)
    assert [each.task for each in seen].count("Encoding the training set") == 1


def test_two_searches_at_the_same_time_do_not_encode_into_one_file(trained, data):
    """The second begins when the first has encoded all images and not yet read them."""
    _, folder = trained
    expected = [modes_of(trained, data, count) for count in (1, 2)]
    for path in (folder / "checkpoints" / "latents.safetensors", *(cache_folder() / "_modes").glob("*.safetensors")):
        path.unlink()
    found, second = {}, threading.Thread(target=lambda: found.update(two=modes_of(trained, data, 2)))

    def begin_the_second(report):
        if report.task == "Encoding the training set":
            second.start()
            second.join(0.3)  # it has to wait

    found["one"] = modes_of(trained, data, 1, progress=begin_the_second)
    second.join()
    for modes, name in zip(expected, ("one", "two"), strict=True):
        torch.testing.assert_close(found[name], modes, atol=2e-3, rtol=1e-3)


def test_modes_are_found_where_the_cache_cannot_be_written(trained, data):
    _, folder = trained
    expected = modes_of(trained, data, 1)
    (folder / "checkpoints" / "latents.safetensors").unlink()
    shutil.rmtree(cache_folder() / "_modes")
    (cache_folder() / "_modes").write_text("a file where the folder would be")
    torch.testing.assert_close(modes_of(trained, data, 1), expected, atol=2e-3, rtol=1e-3)


def test_latents_of_other_images_are_not_used(trained, data):
    others = dataclasses.replace(data.images, images=255 - data.images.images)
    modes, changed = modes_of(trained, data, 1), modes_of(trained, data, 1, images=others, sha256="of-other-pixels")
    assert (modes - changed).abs().max() > 0.1


def test_modes_that_were_found_are_kept(trained, data):
    model, folder = trained
    modes = modes_of(trained, data, 2)
    (folder / "checkpoints" / "latents.safetensors").unlink()
    seen = []
    assert torch.equal(modes_of(trained, data, 2, progress=seen.append), modes) and not seen


def test_a_class_without_images_raises_usage_error(trained, data):
    lacking = dataclasses.replace(data.images, labels=data.images.labels.clamp(max=1))
    with pytest.raises(UsageError, match="at least one training image of every class"):
        modes_of(trained, data, 1, images=lacking)
