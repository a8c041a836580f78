"""What every test may use: the real archives where they are, and a cache folder that is not the user's."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from ddkit.results import Result
from ddkit.runtime.files import write_json

ROOT = Path(__file__).resolve().parent.parent
_CLASSES = {"cifar100": 100, "tinyimagenet": 200}
SHARED_DATA = Path(os.environ.get("DDKIT_TEST_DATA", ROOT.parent / "shared" / "data"))
SHARED_CASES = Path(os.environ.get("DDKIT_TEST_CASES", ROOT.parent / "shared" / "cases"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-files", type=int, default=500, help="mutated files that the fuzz test reads (10,000: thorough)")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage while modules are imported, and later not among what they hold: that takes a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared data and measured facts go to a folder of the test's own, also in the processes it starts."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DDKIT_CACHE", str(cache))
    return cache


@pytest.fixture(autouse=True)
def few_images_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are compared on as few images as they can be: which one is the fastest decides nothing that a test looks at."""
    from ddkit.network import autotune

    monkeypatch.setattr(autotune, "_LEAST_IMAGES", 1)
    monkeypatch.setattr(autotune, "_REPEATS", 1)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the tests share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def measured_before(request: pytest.FixtureRequest, own_cache: Path, shared_folder: Path) -> Iterator[None]:
    """What one test has compiled and measured serves the next: the test's cache begins with it, unless marked `empty_cache`."""
    if request.node.get_closest_marker("empty_cache"):
        yield
        return
    engines, kernels = shared_folder / "_engines.json", shared_folder / "_kernels"
    known = json.loads(engines.read_text()) if engines.exists() else {}
    if known:
        (own_cache / engines.name).write_text(json.dumps(known))
    if kernels.exists():
        shutil.copytree(kernels, own_cache / kernels.name, copy_function=os.link)
    yield
    with contextlib.suppress(OSError, ValueError):  # a test may have damaged its cache
        found = json.loads((own_cache / engines.name).read_text())
        if new := {key: plan for key, plan in found.items() if key not in known}:
            with FileLock(f"{engines}.lock"):
                known = json.loads(engines.read_text()) if engines.exists() else {}
                write_json(engines, new | known)
    for library in own_cache.glob("_kernels/*.so"):
        kernels.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(library, kernels / library.name)


@pytest.fixture
def gpu():
    """A pretended GPU, which fails as a real one would, and counts what the host waits for."""
    from pretended_gpu import pretend_gpu

    with pretend_gpu() as pretended:
        yield pretended


@pytest.fixture
def second_gpu(gpu):
    """The name of the second of two pretended GPUs, where what wrongly goes to the first one meets what does not."""
    gpu.memory = [(70 * 2**30, 80 * 2**30)] * 2
    return "cuda:1"


@pytest.fixture
def forked_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts on the clock are forked from a process that has imported what each of theirs would import for ten seconds."""
    import processes

    from ddkit.evaluation import timed_script

    starting = SimpleNamespace(Popen=processes.Script, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(timed_script, "subprocess", starting)


def shorten_measurements(patch: pytest.MonkeyPatch) -> None:
    """Measure for a tenth of a second what is measured for one to three otherwise, and refine by default with few images."""
    from ddkit.distill.settings import PRESETS
    from ddkit.entering import plan
    from ddkit.evaluation.estimate import estimate_evaluation
    from ddkit.generator.training.estimate import estimate
    from ddkit.generator.training.plan import measure_costs

    patch.setattr(plan, "_TRIED", 0.1)
    patch.setattr(plan, "_REAL_PER_CLASS", 12)
    patch.setitem(estimate_evaluation.__kwdefaults__, "tried_seconds", 0.1)
    for measure in (estimate, measure_costs):
        patch.setitem(measure.__kwdefaults__, "seconds", 0.1)
    pool = replace(PRESETS["track1"].pool, size=2)
    few = replace(PRESETS["track1"], batch_real=2, val_epochs=0, held_out=0.02, dm_steps=1, pool=pool)
    patch.setitem(PRESETS, "track1", few)


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans and dry runs take a moment."""
    shorten_measurements(monkeypatch)


@pytest.fixture
def case() -> Callable[[str], Path]:
    """case("05-torchvision-root") -> the folder of a small input that people really have."""

    def find(name: str) -> Path:
        path = SHARED_CASES / name
        if not path.is_dir():
            pytest.skip(f"real input missing: {path} (set DDKIT_TEST_CASES to the folder that holds it)")
        return path

    return find


def _archive(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"real data missing: {path} (set DDKIT_TEST_DATA to the folder that holds it)")
    return path


@pytest.fixture
def cifar100_zip() -> Path:
    """The real CIFAR-100 as an image folder in a zip."""
    return _archive("cifar100.zip")


@pytest.fixture
def tinyimagenet_zip() -> Path:
    """The real tiny-imagenet-200.zip, with 100 training images a class."""
    return _archive("tiny-imagenet-200.zip")


@pytest.fixture
def colors(tmp_path: Path) -> str:
    """The name of a prepared dataset of 16 px: "blue" and "red", five training and two test images each."""
    from PIL import Image

    from ddkit.data.prepare import prepare

    for split, count in (("train", 5), ("test", 2)):
        for name, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, value + 10 * i) for value in color)
                Image.new("RGB", (16, 16), shade).save(folder / f"{i}.png")
    prepare("colors", tmp_path / "pictures")
    return "colors"


@pytest.fixture
def save_colors_model(colors) -> Callable[..., Path]:
    """Writes models of the dataset `colors` with random weights, none of them nought, for any architecture and prediction."""
    import torch

    from ddkit.data.store import load_dataset, train_sha256
    from ddkit.generator.autoencoder import build_autoencoder
    from ddkit.generator.config import AutoencoderConfig, DenoiserConfig
    from ddkit.generator.model_facts import ModelFacts
    from ddkit.generator.model_folder import Model, save_model
    from ddkit.generator.networks import build_denoiser

    def save(folder: Path, architecture: str = "uvit", prediction: str = "flow") -> Path:
        names = load_dataset(colors, "train").class_names
        autoencoder = build_autoencoder(AutoencoderConfig(channels=(8,), latent_channels=2, norm_groups=4), 16, seed=1)
        config = DenoiserConfig(architecture, hidden_size=16, depth=3, num_heads=2, tokens_per_side=2)
        denoiser = build_denoiser(config, (2, 4, 4), len(names), seed=2)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in (*denoiser.parameters(), *autoencoder.parameters()):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        facts = ModelFacts(colors, names, 16, prediction, "none", 0, 0, train_sha256(colors))
        save_model(Model(denoiser.eval(), autoencoder.eval(), facts), folder)
        return folder

    return save


@pytest.fixture
def colors_model(save_colors_model, tmp_path: Path) -> Path:
    """A model folder of the dataset `colors`."""
    return save_colors_model(tmp_path / "colors-model")


@pytest.fixture(scope="session")
def save_dit() -> Callable[[Path, Sequence[str]], Path]:
    """Writes a DiTPipeline folder with random weights: latents of 8 x 8, images of 16 px, a predicted variance."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    def save(folder: Path, titles: Sequence[str]) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformer = DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
                sample_size=8, patch_size=2, num_embeds_ada_norm=len(titles),
            )  # fmt: skip
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
            )  # fmt: skip
        first, *others = transformer.transformer_blocks
        for block in others:  # as in the pretrained ones
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
        DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        index["id2label"] = {str(i): title for i, title in enumerate(titles)}
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return save


def _prepare_letters(cache: Path, **per_class: int) -> Path:
    """Prepare the letters in that cache folder, with so many images of each class in the splits that are named.

    The classifier that judges the order of rows is there too.
    """
    from ddkit.checks.classifier import class_model
    from ddkit.data import glyphs
    from ddkit.data.prepare import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDKIT_CACHE", str(cache))
        for split, count in per_class.items():
            patch.setitem(glyphs.PER_CLASS, split, count)
        prepare("glyphs")
        class_model("glyphs")
    return cache


@pytest.fixture(scope="session")
def glyph_store(shared_folder: Path) -> Path:
    """A cache folder in which the letters are prepared, with fewer test images, as every evaluation looks at all of them."""
    return _prepare_letters(shared_folder / "glyph-cache", test=20)


@pytest.fixture(scope="session")
def few_glyphs_store(shared_folder: Path) -> Path:
    """A cache folder in which a few of the letters are prepared."""
    return _prepare_letters(shared_folder / "few-glyphs-cache", train=60, test=10)


@pytest.fixture
def letters(glyph_store: Path, own_cache: Path) -> str:
    """The name of the drawn letters, which are prepared in the test's own cache, with their classifier."""
    for name in ("glyphs", "_checks"):
        shutil.copytree(glyph_store / name, own_cache / name)
    return "glyphs"


@pytest.fixture
def few_letters(few_glyphs_store: Path, own_cache: Path) -> str:
    """The same of 600 letters and 100 test images."""
    for name in ("glyphs", "_checks"):
        shutil.copytree(few_glyphs_store / name, own_cache / name)
    return "glyphs"


@pytest.fixture
def glyph_images(glyph_store, monkeypatch):
    """(100, 3, 32, 32) float32, normalized, the first ten training images of each class; the letters are prepared."""
    from ddkit.challenge import GLYPHS
    from ddkit.data.images import normalize
    from ddkit.data.store import load_dataset

    monkeypatch.setenv("DDKIT_CACHE", str(glyph_store))
    real = load_dataset("glyphs", "train")
    return normalize(real.images.unflatten(0, (10, -1))[:, :10].flatten(0, 1), GLYPHS)


@pytest.fixture
def folder(tmp_path, glyph_images):
    """A submission folder with glyphs.pt, its JSON and its contact sheet."""
    from ddkit.challenge import GLYPHS
    from ddkit.sets.distilled import save_set

    folder = tmp_path / "submission"
    save_set(folder / "glyphs.pt", glyph_images, GLYPHS, {"method": "first images"})
    return folder


def make_result(name: str, dataset: str, *accuracies: float, epochs_setting: int = 1000, ipc: int = 10, **fields: Any):
    """A result as `ddkit evaluate` records it; official with three rounds of E = 1000."""
    classes = _CLASSES.get(dataset, 4)
    official = epochs_setting == 1000 and len(accuracies) == 3 and dataset in _CLASSES
    reasons = () if official else (f"E = {epochs_setting} instead of 1000",)
    known = {
        "track": 1,
        "sha256": hashlib.sha256(f"{name} {dataset} {accuracies}".encode()).hexdigest(),
        "source": f"{name}/{dataset}.pt",
        "images": classes * ipc,
        "images_per_class": (ipc, ipc),
        "official": official,
        "deviations": reasons,
        "date": "2026-07-12T10:00:00+00:00",
        "loss_curves": ((4.6, 3.0, 2.0, 1.5),) * len(accuracies),
        "per_class": tuple(c / classes for c in range(classes)),
        "confusions": ((0, 1, 20.5), (2, 3, 7.0)),
    }
    return Result(name=name, dataset=dataset, accuracies=accuracies, epochs_setting=epochs_setting, **(known | fields))


@pytest.fixture
def result() -> Callable[..., Result]:
    """Makes results: result(name, dataset, accuracy of each round ..., fields of Result)."""
    return make_result


# Prepares a dataset, and prints the most memory that each of its processes had, in MiB.
PREPARE_AND_MEASURE = """
import glob, json, re, sys
from ddkit.data.prepare import prepare

peaks = {}

def look(progress):
    children = [pid for path in glob.glob('/proc/self/task/*/children') for pid in open(path).read().split()]
    for pid in ['self', *children]:
        try:
            peaks[pid] = int(re.search(r'VmHWM:\\s+(\\d+)', open(f'/proc/{pid}/status').read())[1]) // 1024
        except (OSError, TypeError):
            pass  # it has ended

prepare(*sys.argv[1:], progress=look)
print(json.dumps(list(peaks.values())))
"""


def _prepare_once(name: str, archive: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prepare a real dataset, whose preparation takes long, for all tests of this run."""
    monkeypatch.setenv("DDKIT_CACHE", str(shared / "real-cache"))
    peaks = shared / f"{name}-peaks.json"
    with FileLock(f"{peaks}.lock"):
        if not peaks.exists():
            words = [sys.executable, "-c", PREPARE_AND_MEASURE, name, str(archive)]
            finished = subprocess.run(words, capture_output=True, text=True, check=False)
            assert finished.returncode == 0, finished.stderr
            peaks.write_text(finished.stdout)
    return json.loads(peaks.read_text())


@pytest.fixture
def cifar100_store(cifar100_zip: Path, shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The real CIFAR-100 is prepared: the most memory that each process had for it, in MiB."""
    return _prepare_once("cifar100", cifar100_zip, shared_folder, monkeypatch)


@pytest.fixture
def tinyimagenet_store(tinyimagenet_zip: Path, shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The real TinyImageNet is prepared, likewise."""
    return _prepare_once("tinyimagenet", tinyimagenet_zip, shared_folder, monkeypatch)
