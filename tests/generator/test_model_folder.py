"""The model folder: what diffusers and ddkit read back, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from ddkit.errors import BadFileError, MissingModelError, UsageError
from ddkit.generator.autoencoder import build_autoencoder
from ddkit.generator.config import AutoencoderConfig
from ddkit.generator.model_facts import model_hash, read_facts
from ddkit.generator.model_folder import load_model, save_autoencoder, save_model
from ddkit.generator.uvit import UViT


@pytest.fixture
def folder(make_model, tmp_path):
    save_model(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("architecture", ["uvit", "dit"])
def test_saved_model_loads_unchanged(make_model, tmp_path, architecture):
    model = make_model(architecture)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dataset="colors")
    assert type(loaded.denoiser) is type(model.denoiser)
    assert loaded.facts == model.facts
    assert loaded.autoencoder.config.scaling_factor == 0.7
    for ours, theirs in ((model.denoiser, loaded.denoiser), (model.autoencoder, loaded.autoencoder)):
        theirs = theirs.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(("architecture", "kind"), [("uvit", UViT), ("dit", DiTTransformer2DModel)])
def test_diffusers_loads_every_part(make_model, tmp_path, architecture, kind):
    model = make_model(architecture)
    save_model(model, tmp_path)
    autoencoder = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    assert autoencoder.config.scaling_factor == 0.7
    denoiser = kind.from_pretrained(tmp_path, subfolder="transformer")
    ours = model.denoiser.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in denoiser.state_dict().items())
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler") is not None


def test_all_weights_are_safetensors(folder):
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_model_hash_depends_on_the_weights_alone(folder, make_model, tmp_path):
    before = model_hash(folder)
    save_model(make_model(), tmp_path / "same")
    save_model(make_model(prediction="v"), tmp_path / "other facts")
    assert before == model_hash(tmp_path / "same") == model_hash(tmp_path / "other facts")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["smooth.bias"] += 1
    save_file(tensors, weights)
    assert model_hash(folder) != before


def test_interrupted_save_keeps_the_earlier_part(folder, make_model, monkeypatch):
    def fail(self, path, **options):
        (path / "half").write_text("half")
        raise OSError(28, "No space left on device", str(path))

    before = model_hash(folder)
    monkeypatch.setattr(UViT, "save_pretrained", fail)
    with pytest.raises(BadFileError, match="No space left"):
        save_model(make_model(), folder)
    assert model_hash(folder) == before
    assert load_model(folder).facts.dataset == "colors"
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


class TestInvalidFolders:
    def test_model_of_another_dataset_raises_usage_error(self, folder):
        with pytest.raises(UsageError, match="was trained on 'colors', not on 'cifar100'"):
            load_model(folder, dataset="cifar100")

    def test_empty_folder_raises_missing_model_error(self, tmp_path):
        with pytest.raises(MissingModelError, match="does not hold a complete model") as caught:
            load_model(tmp_path)
        assert "ddkit train" in caught.value.remedy

    def test_missing_folder_raises_missing_model_error_that_says_so(self, tmp_path):
        with pytest.raises(MissingModelError, match="there is no such folder"):
            load_model(tmp_path / "mistyped")

    @pytest.mark.parametrize(
        "missing",
        ["transformer", "vae", "vae/config.json", "transformer/diffusion_pytorch_model.safetensors"],
    )
    def test_missing_part_raises_missing_model_error_that_names_it(self, folder, missing):
        path = folder / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(MissingModelError, match=missing.split("/")[0]):
            load_model(folder)

    def test_truncated_weights_raise_bad_file_error(self, folder):
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(BadFileError, match="does not fit its config.json: Error while deserializing"):
            load_model(folder)

    @pytest.mark.parametrize("change", ["a tensor more", "a tensor less", "another shape"])
    def test_weights_that_do_not_fit_raise_bad_file_error(self, folder, change):
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        if change == "a tensor more":
            tensors["stranger"] = torch.zeros(1)
        elif change == "a tensor less":
            del tensors["smooth.bias"]
        else:
            tensors["smooth.bias"] = torch.zeros(5)
        save_file(tensors, path)
        with pytest.raises(BadFileError, match="does not fit"):
            load_model(folder)

    def test_network_of_another_class_raises_bad_file_error(self, folder):
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
        with pytest.raises(BadFileError, match="FluxTransformer2DModel"):
            load_model(folder)

    def test_parts_of_different_models_raise_bad_file_error(self, folder, tmp_path):
        """Each whole in itself, such as a folder copied to the wrong place."""
        facts = json.loads((folder / "ddkit.json").read_text())
        (folder / "ddkit.json").write_text(json.dumps({**facts, "class_names": ["red", "green"]}))
        with pytest.raises(BadFileError, match="transformer knows 3 classes, but ddkit.json lists 2"):
            load_model(folder)
        (folder / "ddkit.json").write_text(json.dumps(facts))
        other = build_autoencoder(AutoencoderConfig(pixel_patch=4, channels=(8,), latent_channels=3, norm_groups=4), 16, seed=1)
        save_autoencoder(other, folder)
        with pytest.raises(BadFileError, match="latents of 2 channels, but the autoencoder decodes 3"):
            load_model(folder)

    def test_foreign_ddkit_json_raises_bad_file_error(self, folder):
        (folder / "ddkit.json").write_text('{"format": 99}')
        with pytest.raises(BadFileError, match="was not written by this version of ddkit"):
            read_facts(folder)
        (folder / "ddkit.json").write_text('{"format": 1, "dataset": "colors"}')
        with pytest.raises(BadFileError, match="not complete"):
            read_facts(folder)
