"""Track 2 bundles: the same bytes each time, complete, and opened without trust."""

import json
import os
import subprocess
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from ddkit.data.prepare import prepare
from ddkit.data.store import load_dataset, train_sha256
from ddkit.errors import BadFileError, DDKitError, MissingModelError, UsageError
from ddkit.generator.model_facts import model_hash
from ddkit.generator.model_folder import load_model
from ddkit.generator.modes import find_modes
from ddkit.generator.sampling import SamplingSettings
from ddkit.history import PackedRecords
from ddkit.packing.bundle import (
    BundleModel,
    BundleSettings,
    build_folder,
    datasets_of,
    open_bundle,
    pack_bundle,
    read_bundle_settings,
    requirements,
    rounding_cost,
    zip_folder,
)
from ddkit.runtime.files import sha256_of

WEIGHTS = "models/colors/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(colors, colors_model):
    return BundleModel(colors, colors_model, BundleSettings(SamplingSettings("unipc", steps=6, guidance=1.25), keep=1.0))


def test_bundle_holds_scripts_models_requirements_and_a_readme(model, tmp_path):
    folder = build_folder([model], tmp_path / "entry")
    assert {path.name for path in folder.iterdir()} == {
        "generate.py", "shards.py", "worker.py", "sampling.py", "classifier.py", "denoiser.py", "linear_plan.py",
        "container.py", "models", "requirements.txt", "README.md", "SHA256SUMS",
    }  # fmt: skip
    assert datasets_of(folder) == ["colors"]
    facts = read_bundle_settings(folder, "colors")
    assert (facts["steps"], facts["guidance"], facts["num_classes"], facts["image_size"]) == (6, 1.25, 2, 16)
    scheduler = json.loads((folder / "models" / "colors" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "UniPCMultistepScheduler"
    weights = model.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert (folder / WEIGHTS).read_bytes() == weights.read_bytes()
    readme = (folder / "README.md").read_text()
    assert "unipc, 6 steps, guidance 1.25" in readme and "--dataset colors" in readme and "$" not in readme
    assert (folder / "requirements.txt").read_text().split() == requirements()
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements()


def test_a_bundle_with_mode_guidance_holds_the_modes_of_the_real_images(model, tmp_path):
    sampling = SamplingSettings(steps=2, guidance=1.0, mode_guidance=0.25)
    guided = BundleModel(model.dataset, model.folder, BundleSettings(sampling, keep=1.0))
    folder = build_folder([guided], tmp_path / "entry")
    modes = load_file(folder / "models" / "colors" / "modes.safetensors")["modes"]
    assert modes.shape == (2, 5, 2, 4, 4) and modes.dtype == torch.float16
    real = load_dataset("colors", "train")
    wanted = find_modes(model.folder, load_model(model.folder), real, 5, dataset_sha256=train_sha256("colors"))
    assert torch.equal(modes, wanted.half())
    facts = read_bundle_settings(folder, "colors")
    assert (facts["mode_guidance"], facts["modes"], facts["model_sha256"]) == (0.25, 5, model_hash(model.folder))
    assert "guidance 1, mode guidance 0.25, " in (folder / "README.md").read_text()
    plain = build_folder([model], tmp_path / "plain")
    assert not (plain / "models" / "colors" / "modes.safetensors").exists()


def test_its_hashes_are_those_of_sha256sum(model, tmp_path):
    folder = build_folder([model], tmp_path / "entry")
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == len((folder / "SHA256SUMS").read_text().splitlines())


def test_the_same_models_make_the_same_zip(model, tmp_path):
    first = pack_bundle([model], tmp_path / "first.zip", proof=None)
    os.utime(model.folder / "ddkit.json", (0, 0))
    second = pack_bundle([model], tmp_path / "second.zip", proof=None)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.sha256 == sha256_of(second.path)
    assert "generate.py" in [file.name for file in first.files]


def test_a_packed_bundle_is_recorded_and_a_name_of_other_files_leaves_the_earlier_zip(model, tmp_path):
    out, records, heard = tmp_path / "entry.zip", PackedRecords(tmp_path / "packed.jsonl"), []
    options = {"proof": None, "records": records, "on_event": heard.append}
    first = pack_bundle([model], out, name="first", **options)
    pack_bundle([model], out, name="first", **options)
    (record,) = PackedRecords(records.path).records
    assert (record.name, record.path, record.sha256, record.track) == ("first", str(out), first.sha256, 2)
    assert record.files == {file.name: file.sha256 for file in first.files}
    half = BundleModel(model.dataset, model.folder, BundleSettings(half=True, keep=1.0))
    with pytest.raises(UsageError, match="'first' was given to other files"):
        pack_bundle([half], out, name="first", **options)
    assert sha256_of(out) == first.sha256
    pack_bundle([model], out, **options)
    pack_bundle([half], out, **options)
    assert [each.name for each in PackedRecords(records.path).records] == ["first", "entry", "entry-2"]
    assert len(heard) == 1 and "recorded as 'entry-2'" in heard[0]


def test_half_precision_halves_the_weights_and_changes_little(model, tmp_path):
    half = BundleModel(model.dataset, model.folder, BundleSettings(model.settings.sampling, half=True, keep=1.0))
    weights = load_file(build_folder([half], tmp_path / "half") / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    cost = rounding_cost(model, images=8)
    assert cost.images == 8 and 0 < cost.mean < 2 and cost.largest < 60


def test_models_that_cannot_be_bundled_raise(model, colors, tmp_path):
    with pytest.raises(UsageError, match="one model for each"):
        build_folder([model, model], tmp_path / "entry")
    with pytest.raises(MissingModelError):
        build_folder([BundleModel(colors, tmp_path / "nowhere")], tmp_path / "entry")
    many = BundleSettings(SamplingSettings("unipc", steps=1000, guidance=1.25), keep=1.0)
    with pytest.raises(UsageError, match="cannot take as many as 1000 steps"):
        build_folder([BundleModel(colors, model.folder, many)], tmp_path / "entry")
    facts = json.loads((model.folder / "ddkit.json").read_text())
    (model.folder / "ddkit.json").write_text(json.dumps(facts | {"label_dropout": 0.0}))
    with pytest.raises(UsageError, match="without label dropout"):
        build_folder([model], tmp_path / "entry")
    for split in ("train", "test"):
        (tmp_path / "pictures" / split / "red").rename(tmp_path / "pictures" / split / "green")
    prepare(colors, tmp_path / "pictures", force=True)
    with pytest.raises(UsageError, match="class 1 was red and is green"):
        build_folder([model], tmp_path / "entry")
    assert not (tmp_path / "entry").exists()


def test_a_zip_a_folder_and_a_script_open_alike(model, tmp_path):
    folder = build_folder([model], tmp_path / "entry")
    zipped = zip_folder(folder, tmp_path / "entry.zip")
    for path in (folder, folder / "generate.py", zipped):
        with open_bundle(path) as found:
            assert datasets_of(found) == ["colors"]
            assert (found / "SHA256SUMS").read_bytes() == (folder / "SHA256SUMS").read_bytes()
    assert not found.exists()


@pytest.mark.parametrize("name", ["../generate.py", "/generate.py", "a\\..\\..\\generate.py", "C:generate.py"])
def test_members_that_lead_out_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "")
    with pytest.raises(BadFileError, match="leads out"), open_bundle(tmp_path / "bad.zip"):
        pass


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("generate.py",) * 2, ("a", "a/b"), ("a/b", "a"), ("a", "a/b/c")])
def test_members_that_clash_are_refused_by_name(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), "")
    with pytest.raises(BadFileError, match=rf"bad\.zip: the member '{names[1]}' clashes"), open_bundle(tmp_path / "bad.zip"):
        pass


def test_paths_that_are_not_bundles_raise(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "set.pt").write_text("")
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "generate.py").write_text("")  # which is not what was asked for
    refused = {
        "empty": BadFileError,
        "text.zip": BadFileError,
        "set.pt": UsageError,
        "mine.py": UsageError,
        "absent": MissingModelError,
    }
    for name, error in refused.items():
        with pytest.raises(error), open_bundle(tmp_path / name):
            pass


def test_real_images_that_are_missing_are_named_with_the_way_to_pack_without_them(colors, colors_model, own_cache, tmp_path):
    for path in own_cache.glob(f"{colors}/train*"):
        path.unlink()
    guided = BundleSettings(SamplingSettings(mode_guidance=0.2), keep=1.0)
    for settings in (BundleSettings(), guided):
        with pytest.raises(DDKitError) as caught:
            build_folder([BundleModel(colors, colors_model, settings)], tmp_path / "entry")
        assert "with --keep 1 --mode-guidance 0 it has neither" in str(caught.value.remedy)
        assert not (tmp_path / "entry").exists()
