"""Proving bundles: in an environment that has only what they require."""

import subprocess
import sys
import zipfile

import pytest
import torch

from ddkit.challenge import GLYPHS
from ddkit.data.images import normalize
from ddkit.errors import ComputeError, InvalidSubmissionError
from ddkit.generator.sampling import SamplingSettings
from ddkit.packing.bundle import BundleModel, BundleSettings, build_folder, pack_bundle, zip_folder
from ddkit.packing.proof import ProofSettings, _environment, check_made, prove

ENOUGH = ProofSettings(budget=600.0, most=8)  # which one worker makes


@pytest.fixture
def model(colors, colors_model):
    return BundleModel(colors, colors_model, BundleSettings(SamplingSettings(steps=2), "cpu", keep=1.0))


@pytest.mark.slow
def test_a_bundle_that_does_not_run_is_not_packed_and_the_old_one_stays(model, tmp_path):
    out = tmp_path / "entry.zip"
    out.write_bytes(b"the old one")
    # Whoever notices first says so: the script, which keeps its own clock, or the proof.
    with pytest.raises((InvalidSubmissionError, ComputeError), match="budget of 0.1 s"):
        pack_bundle([model], out, proof=ProofSettings(budget=0.1, most=20))
    assert out.read_bytes() == b"the old one" and {path.suffix for path in tmp_path.iterdir()} <= {".zip", ""}


@pytest.mark.slow
def test_a_bundle_that_needs_ddkit_or_more_than_it_says_fails(model, tmp_path):
    folder = build_folder([model], tmp_path / "entry")
    for line, said in (("import ddkit", "ddkit"), ("import torchvision", "torchvision"), ("import matplotlib", "matplotlib")):
        script = (folder / "generate.py").read_text().replace("import argparse\n", f"{line}\nimport argparse\n", 1)
        with zipfile.ZipFile(tmp_path / "altered.zip", "w") as archive:
            archive.write(folder / "models" / "colors" / "entry.json", "models/colors/entry.json")
            archive.writestr("generate.py", script)
        with pytest.raises(ComputeError, match=f"import of {said} halted"):
            prove(tmp_path / "altered.zip", ENOUGH)


@pytest.mark.slow
def test_the_environment_has_the_requirements_and_what_they_require(model, tmp_path):
    python = _environment(tmp_path / "environment", tmp_path, ProofSettings(), lambda progress: None)
    code = (
        "import importlib.metadata as m, importlib.util as u\n"
        "print([u.find_spec(n) is not None for n in ('torch', 'safetensors', 'huggingface_hub', 'numpy', 'ddkit', 'rich')])\n"
        "print(m.version('safetensors'))\n"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    found, version = done.stdout.splitlines()
    assert found == "[True, True, True, True, False, False]" and version[0].isdigit()
    assert sys.prefix not in subprocess.run(
        [python, "-I", "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    ).stdout.split("\n")


@pytest.mark.slow
def test_an_altered_model_is_found(model, tmp_path):
    folder = build_folder([model], tmp_path / "entry")
    weights = folder / "models" / "colors" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ComputeError, match="is not the file that was packed"):
        prove(zip_folder(folder, tmp_path / "entry.zip"), ENOUGH)


class TestWhatWasMade:
    def images(self, per_class=2):
        pixels = torch.randint(0, 256, (10 * per_class, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        return normalize(pixels.to(torch.uint8), GLYPHS), torch.arange(10 * per_class) % 10

    def test_normalized_bytes_in_balance_are_right(self):
        images, labels = self.images()
        check_made(images, labels, GLYPHS)
        check_made(images[:13], labels[:13], GLYPHS)

    @pytest.mark.parametrize("alter, said", [
        (lambda i, n: (i.double(), n), "float64"),
        (lambda i, n: (i / 2, n), "not 8-bit pixels"),
        (lambda i, n: (i * 3, n), "not 8-bit pixels"),
        (lambda i, n: (i, n.clamp(max=3)), "0 to 14 images"),
        (lambda i, n: (i[:1].expand(20, -1, -1, -1), n), "the same"),
        (lambda i, n: (i, n.int()), "int32"),
    ])  # fmt: skip
    def test_everything_else_is_named(self, alter, said):
        with pytest.raises(InvalidSubmissionError, match=said):
            check_made(*alter(*self.images()), GLYPHS)
