"""What every test may use: the real archives where they are, and a cache folder that is not the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
SHARED_DATA = Path(os.environ.get("DDKIT_TEST_DATA", ROOT.parent / "shared" / "data"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-files", type=int, default=10_000, help="mutated submissions that the fuzz test reads")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prepared data and measured facts go to a folder of the test's own, also in the processes it starts."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DDKIT_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return FIXTURES


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
def colours(tmp_path: Path) -> str:
    """The name of a prepared dataset of 16 px: "blue" and "red", five training and two test images each."""
    from PIL import Image

    from ddkit.data.prepare import prepare

    for split, count in (("train", 5), ("test", 2)):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, value + 10 * i) for value in colour)
                Image.new("RGB", (16, 16), shade).save(folder / f"{i}.png")
    prepare("colours", tmp_path / "pictures")
    return "colours"
