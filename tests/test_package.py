"""What `pip install .` puts on a machine, and the sources it comes from."""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import processes
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


# In a process that has imported ddkit and the libraries that it needs, which takes longer than all that follows.
FORGET_DDKIT = "import sys\nfor name in [*sys.modules]:\n    if name.partition('.')[0] == 'ddkit': del sys.modules[name]\n"


@pytest.mark.slow
def test_every_module_is_imported_where_those_of_unix_do_not_exist():
    code = FORGET_DDKIT + (
        "import importlib, pkgutil\n"
        "import psutil  # which has a part for each system, and on Unix imports these modules itself\n"
        "for unix in ('resource', 'fcntl', 'pwd', 'grp', 'termios'): sys.modules[unix] = None\n"
        "import ddkit\n"
        "for module in pkgutil.walk_packages(ddkit.__path__, 'ddkit.'):\n"
        "    if module.name != 'ddkit.__main__': importlib.import_module(module.name)"
    )
    finished = processes.run("-c", code)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked files, since building leaves a build folder behind."""
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout, so the list of source files is not known")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def build(kind, source, out):
    subprocess.run([sys.executable, "setup.py", "-q", kind, "-d", str(out)], cwd=source, check=True, capture_output=True)
    (built,) = (path for path in out.iterdir() if path.suffix in (".whl", ".gz"))
    return built


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("bdist_wheel", source, tmp_path_factory.mktemp("wheel"))


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


@pytest.mark.slow
def test_the_source_archive_makes_the_same_wheel(source, wheel, tmp_path):
    archive = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = build("bdist_wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        ours = [name for name in first.namelist() if not name.endswith(("/RECORD", "/SOURCES.txt"))]
        assert set(first.namelist()) == set(second.namelist())
        assert all(first.read(name) == second.read(name) for name in ours)


def test_the_metadata_names_version_pythons_and_extras(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        facts = email.message_from_bytes(packed.read(name))
    assert facts["Version"] == ddkit.__version__ and facts["Requires-Python"] == ">=3.10"
    assert facts["Keywords"] and facts["Project-URL"] and "Apache-2.0" in (facts["License"] or facts["License-Expression"])
    assert {"inception", "notebook", "parquet", "tensorboard", "test"} == set(facts.get_all("Provides-Extra"))
    assert "Typing :: Typed" in facts.get_all("Classifier")
    assert "# ddkit" in facts.get_payload() and "](.github/images" not in facts.get_payload()


def test_release_notes_have_the_version():
    notes = (ROOT / ".github" / "RELEASE_NOTES.md").read_text(encoding="utf-8")
    assert f"## {ddkit.__version__}\n" in notes


@pytest.mark.slow
def test_an_installed_wheel_evaluates_without_a_compiler_and_says_so(wheel, letters, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    commands = (["generate", "--dataset", letters, "--ipc", "2", "--from-real", "first"],
                ["evaluate", "--rounds", "1", "--epochs-setting", "0"])  # fmt: skip
    code = FORGET_DDKIT + (
        "sys.path.insert(0, 'site')\nimport ddkit\nassert 'site/ddkit' in ddkit.__file__\nfrom ddkit.cli import main\n"
        f"for words in {commands}:\n    assert not main(words, standalone_mode=False)"
    )
    finished = processes.run("-c", code, cwd=tmp_path, env={**os.environ, "CXX": "no-such-compiler"})
    assert finished.returncode == 0, finished.stderr
    said = " ".join(finished.stderr.split())
    assert "computes several times more slowly" in said and "Install g++ or clang++" in said
