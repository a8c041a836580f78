"""The autoencoder: sizes, its loss, pretrained ones, and latents on disk."""

import dataclasses
import logging
import signal

import pytest
import torch
from diffusers import AutoencoderKL

from ddkit.errors import BadFileError, InterruptedRunError, MissingModelError, UsageError
from ddkit.generator.autoencoder import (
    AutoencoderLoss,
    build_autoencoder,
    decode,
    encode,
    images_at_once,
    pixels_per_latent,
    to_signed,
)
from ddkit.generator.config import AutoencoderConfig
from ddkit.generator.pretrained import load_pretrained_autoencoder
from ddkit.generator.training import latents
from ddkit.generator.training.latents import cached_latents


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        (AutoencoderConfig(pixel_patch=1, channels=(8, 8, 16)), 4),
        (AutoencoderConfig(pixel_patch=2, channels=(8, 16)), 4),
        (AutoencoderConfig(pixel_patch=4, channels=(8,)), 4),
    ],
)
def test_encode_then_decode_keeps_the_shape(config, factor):
    autoencoder = build_autoencoder(config, 16, seed=0)
    assert config.factor == pixels_per_latent(autoencoder) == factor
    latents = encode(autoencoder, torch.zeros(2, 3, 16, 16), 4)
    assert latents.shape == (2, 4, 4, 4) == (2, *config.latent_shape(16))
    assert decode(autoencoder, latents, 16).shape == (2, 3, 16, 16)


def test_images_at_once_fall_with_the_image_size():
    small = build_autoencoder(AutoencoderConfig(pixel_patch=4, channels=(64,)), 32, seed=0)
    assert images_at_once(small, 8) == 256
    with torch.device("meta"):
        large = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), sample_size=256,
        )  # fmt: skip
    assert images_at_once(large, 32) == 2**30 // (4 * 128 * 256 * 256) == 32
    assert images_at_once(large, 2048) == 1


def test_build_autoencoder_depends_on_the_seed_alone(config):
    torch.manual_seed(1)
    first = build_autoencoder(config.autoencoder, 16, seed=3).state_dict()
    torch.manual_seed(2)
    again = build_autoencoder(config.autoencoder, 16, seed=3).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_image_side_that_is_not_a_multiple_raises_usage_error():
    with pytest.raises(UsageError, match="multiple of 4"):
        build_autoencoder(AutoencoderConfig(), 30, seed=0)


def test_to_signed_maps_bytes_to_minus_one_to_one():
    assert to_signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_autoencoder_loss_is_the_sum_of_its_three_terms(config, images):
    autoencoder = build_autoencoder(config.autoencoder, 16, seed=0)
    pixels, noise = to_signed(images.images), torch.zeros(12, 2, 4, 4)
    loss, squared = AutoencoderLoss(autoencoder, kl_weight=0.5)(pixels, noise)
    latents = encode(autoencoder, pixels, 4)
    errors = decode(autoencoder, latents, 16) - pixels
    log_variance = -5.0  # what it begins with
    kl = 0.5 * (latents.square() + torch.tensor(log_variance).exp() - 1 - log_variance).mean()
    assert squared.item() == pytest.approx(errors.square().mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx((errors.abs().mean() + squared + 0.5 * kl).item(), rel=1e-4)


class TestPretrained:
    @pytest.fixture
    def folder(self, tmp_path):
        """An autoencoder as others have them: pixels as they are, three levels, its own latent scale."""
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            scaling_factor=0.18215,
        ).save_pretrained(tmp_path / "model" / "vae")
        return tmp_path / "model"

    def test_load_pretrained_autoencoder_reads_its_own_folder_and_a_pipelines(self, folder):
        for source in (folder, folder / "vae"):
            assert pixels_per_latent(load_pretrained_autoencoder(str(source))) == 4

    def test_encode_and_decode_resize_images_of_another_size(self, folder):
        autoencoder = load_pretrained_autoencoder(str(folder))
        latents = encode(autoencoder, torch.zeros(1, 3, 16, 16), 8)
        assert latents.shape == (1, 4, 8, 8)
        assert decode(autoencoder, latents, 16).shape == (1, 3, 16, 16)

    def test_missing_pretrained_autoencoder_is_refused(self, tmp_path):
        with pytest.raises(BadFileError, match="config.json"):
            load_pretrained_autoencoder(str(tmp_path))
        with pytest.raises(MissingModelError, match="no folder nowhere"):
            load_pretrained_autoencoder("nowhere")


def ask_to_stop(report):
    signal.raise_signal(signal.SIGTERM)


class TestLatents:
    @pytest.fixture
    def autoencoder(self, config):
        return build_autoencoder(config.autoencoder, 16, seed=0)

    def make(self, path, autoencoder, images, flips=True, identity="one", reports=None):
        listen = (lambda report: None) if reports is None else reports.append
        return cached_latents(path, autoencoder, images, 4, flips=flips, identity=identity, progress=listen)

    def test_latents_of_mirrored_images_are_encoded_separately(self, tmp_path, autoencoder, images):
        made = self.make(tmp_path / "latents.safetensors", autoencoder, images)
        assert made.latents.shape == (12, 2, 2, 4, 4)
        with torch.no_grad():
            mirrored = encode(autoencoder, to_signed(images.images).flip(-1), 4)
        assert torch.allclose(made.latents[:, 1].float(), mirrored, atol=1e-2)
        assert made.std == pytest.approx(made.latents.float().std().item(), rel=1e-3)

    def test_cached_latents_are_encoded_once(self, tmp_path, autoencoder, images):
        reports = []
        path = tmp_path / "latents.safetensors"
        first = self.make(path, autoencoder, images, flips=False, reports=reports)
        encoded = len(reports)
        again = self.make(path, autoencoder, images, flips=False, reports=reports)
        assert len(reports) == encoded > 0
        assert torch.equal(first.latents, again.latents) and first.std == again.std
        assert first.latents.shape[1] == 1

    def test_stopped_encoding_continues_after_the_encoded_images(self, tmp_path, autoencoder, images, monkeypatch):
        monkeypatch.setattr(latents, "images_at_once", lambda autoencoder, side: 5)
        path = tmp_path / "latents.safetensors"
        with pytest.raises(InterruptedRunError, match="after encoding 5 of 12 images"):
            cached_latents(path, autoencoder, images, 4, flips=True, identity="one", progress=ask_to_stop)
        (partial,) = tmp_path.iterdir()
        with partial.open("ab") as file:  # as a kill in the middle of writing leaves it
            file.write(b"torn")
        reports = []
        resumed = self.make(path, autoencoder, images, reports=reports)
        assert [report.done for report in reports] == [10, 12]
        straight = self.make(tmp_path / "other" / "latents.safetensors", autoencoder, images)
        assert torch.equal(resumed.latents, straight.latents) and resumed.std == straight.std
        assert [found.name for found in tmp_path.iterdir() if found.is_file()] == ["latents.safetensors"]

    def test_partial_latents_of_other_images_are_not_used(self, tmp_path, autoencoder, images, monkeypatch):
        monkeypatch.setattr(latents, "images_at_once", lambda autoencoder, side: 5)
        path = tmp_path / "latents.safetensors"
        with pytest.raises(InterruptedRunError):
            cached_latents(path, autoencoder, images, 4, flips=True, identity="one", progress=ask_to_stop)
        reports = []
        self.make(path, autoencoder, images, identity="two", reports=reports)
        assert [report.done for report in reports] == [5, 10, 12]
        assert [found.name for found in tmp_path.iterdir()] == ["latents.safetensors"]

    @pytest.mark.parametrize("how", ["changed", "cut short"])
    def test_latents_of_changed_data_or_damaged_files_are_encoded_again(self, tmp_path, autoencoder, images, caplog, how):
        path = tmp_path / "latents.safetensors"
        self.make(path, autoencoder, images)
        identity = "one"
        if how == "changed":
            images, identity = dataclasses.replace(images, images=images.images.flip(0)), "two"
        else:
            path.write_bytes(path.read_bytes()[:100])
        with caplog.at_level(logging.WARNING):
            latents = self.make(path, autoencoder, images, identity=identity)
        fresh = self.make(tmp_path / "other.safetensors", autoencoder, images, identity=identity)
        assert torch.equal(latents.latents, fresh.latents)
        assert "encoded again" in caplog.text
