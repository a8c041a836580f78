"""The group: help without torch, errors as one message, the exit statuses."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddkit.cli
from ddkit.cli import COMMANDS


def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, "-m", "ddkit", *arguments], capture_output=True, text=True, **kwargs)


def test_help_names_every_command_and_imports_no_torch():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from ddkit.cli import main\n"
        "print(CliRunner().invoke(main, ['--help']).output)\n"
        "print('heavy:', sorted({'torch', 'diffusers', 'matplotlib', 'scipy'} & set(sys.modules)))\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.rstrip().endswith("heavy: []")
    assert all(f"  {command} " in finished.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_its_help_with_an_example(command):
    finished = run(command, "--help")
    assert finished.returncode == 0
    assert "Example:" in finished.stdout


def test_a_misspelt_command_is_wrong_usage_and_offers_the_nearest():
    finished = run("evalute")
    assert finished.returncode == 2
    assert "Did you mean 'evaluate'?" in finished.stderr


def test_a_users_mistake_is_one_message_and_debug_shows_the_traceback(tmp_path):
    finished = run("data", "show", "tinyimagnet", cwd=tmp_path)
    assert finished.returncode == 2
    assert "Did you mean 'tinyimagenet'?" in finished.stderr and "Traceback" not in finished.stderr
    for arguments in (("--debug", "data", "show", "tinyimagnet"), ("data", "show", "tinyimagnet", "--debug")):
        assert "Traceback" in run(*arguments, cwd=tmp_path).stderr


@pytest.mark.parametrize("fault", ["ValueError", "RuntimeError", "OSError"])
def test_a_fault_of_ours_has_a_status_of_its_own(fault):
    code = (
        "import ddkit.cli.completion as module\n"
        "from ddkit.cli import main\n"
        "def broken(*_, **__): raise " + fault + "('no such thing')\n"
        "module.completion.callback = broken\n"
        "main()\n"
    )
    for flags, traceback in (([], False), (["--debug"], True)):
        finished = subprocess.run([sys.executable, "-c", code, *flags, "completion", "bash"], capture_output=True, text=True)
        assert (finished.returncode == 70) != traceback
        assert f"{fault}: no such thing" in finished.stderr and ("Traceback" in finished.stderr) == traceback


def test_computation_does_not_know_the_terminal():
    """No module outside the command line imports click or the command line; only the console report draws with rich."""
    package = Path(ddkit.cli.__file__).parent.parent
    for path in package.rglob("*.py"):
        place = path.relative_to(package)
        if place.parts[0] == "cli" or place.name == "__main__.py":
            continue
        imported = {name.split(".")[0] for name in _imports(path)} | _imports(path)
        forbidden = {"click", "ddkit.cli"} | (set() if place.parts[0] == "report" else {"rich"})
        assert not imported & forbidden, place


def _imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_completion_prints_a_script_for_the_shell():
    finished = run("completion", "bash")
    assert finished.returncode == 0
    assert "_DDKIT_COMPLETE=bash_complete" in finished.stdout
    assert subprocess.run(["bash", "-n"], input=finished.stdout, text=True).returncode == 0
