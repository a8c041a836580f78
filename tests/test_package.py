"""What `pip install .` puts on a machine, and the sources it comes from."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ddkit

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [("ruff", "check"), ("ruff", "format", "--check"), ("mypy",), ("lint-imports",)],
    ids=["lint", "format", "types", "layers"],
)
def test_sources_pass_the_tools_of_contributing(command):
    tool = Path(sys.executable).with_name(command[0])
    if not tool.exists():
        pytest.skip(f"{command[0]} is not installed: pip install '.[test]'")
    checked = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    # A copy, since building leaves a build folder behind.
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout, so the list of source files is not known")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(out)], cwd=source, check=True, capture_output=True
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_data_file(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ddkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours <= packed, ours - packed


def test_an_installed_wheel_runs_without_the_sources(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    finished = subprocess.run(
        [sys.executable, "-c",
         "import sys; sys.path.insert(0, 'site'); import ddkit; assert 'site' in ddkit.__file__;"
         "from ddkit.cli import main; main(['--version'])"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert f"ddkit, version {ddkit.__version__}" in finished.stdout
