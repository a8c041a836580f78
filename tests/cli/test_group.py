"""The group: help without torch, errors as one message, the exit statuses."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import processes
import pytest
import torch
from click.testing import CliRunner

import ddkit.cli
from ddkit.cli import COMMANDS, main


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


def test_output_that_nobody_reads_ends_as_with_sigpipe():
    """Status 1 would mean an unacceptable submission."""
    for words in (["data", "list"], ["data", "list", "--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        finished = subprocess.run([sys.executable, "-m", "ddkit", *words], stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert finished.returncode == 141 and "Error" not in finished.stderr, finished.stderr


def commands_of(group: click.Group, parent: click.Context | None = None) -> Iterator[tuple[str, click.Command, click.Context]]:
    """(name, command, context) of every command, those of groups within groups included."""
    above = click.Context(group, parent=parent, info_name=group.name, **group.context_settings)
    for name in group.list_commands(above):
        command = group.get_command(above, name)
        yield name, command, click.Context(command, parent=above, info_name=name, **command.context_settings)
        if isinstance(command, click.Group):
            yield from commands_of(command, above)


def options_of(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


ALL = list(commands_of(main))


def test_help_shows_every_summary_whole():
    shown = run("--help", env={**os.environ, "COLUMNS": "100"}).stdout
    for name, command, context in ALL:
        assert command.short_help and command.short_help.endswith("."), f"{name} has no short_help"
        if context.parent.command is main:
            assert f"{name}  " in shown and command.short_help in shown, name


@pytest.mark.parametrize("name, command, context", ALL, ids=[name for name, *_ in ALL])
def test_help_texts_are_sentences_or_imperatives(name, command, context):
    for option in options_of(command):
        assert option.help, f"{name} {option.opts[-1]} has no help"
        assert not re.match(r"(Of|With|Whether|As)\b", option.help), f"{name} {option.opts[-1]}: {option.help}"
    assert not re.match(r"(Of|With|Whether|As)\b", command.help), name


@pytest.mark.parametrize("name, command, context", ALL, ids=[name for name, *_ in ALL])
def test_defaults_in_help_are_those_that_are_used(name, command, context):
    for option in options_of(command):
        default = None if "UNSET" in repr(option.default) else option.get_default(context)  # click's mark since 8.3
        if isinstance(option.show_default, str):
            assert default is None, f"{name} {option.opts[-1]} describes a default that is a value"
        elif default not in (None, ()) and not option.is_flag and option.opts != ["--quality"] and not option.count:
            values = [str(one) for one in (default if isinstance(default, (list, tuple)) else [default])]
            shown = option.get_help_record(context)[1]
            assert all(value in shown for value in values) and "[default:" in shown, f"{name} {option.opts[-1]}: {shown}"


# Without these, the command does not do what they ask for, so that there is no default to show.
_ADDITIONS = {
    "--time", "--recipe", "--classes", "--class-map", "--ema-decay", "--autoencoder", "--candidates", "--from-real",
    "--compile", "--set", "--ignore", "--dataset", "--fix-order", "--html", "--compare", "--quality",
}  # fmt: skip


@pytest.mark.parametrize("name, command, context", ALL, ids=[name for name, *_ in ALL])
def test_option_with_a_value_says_what_holds_without_it(name, command, context):
    for option in options_of(command):
        if not (option.is_flag and not option.secondary_opts or option.required or option.count):
            shown = option.get_help_record(context)[1]
            said = "[default:" in shown or "not given" in shown
            assert said or option.opts[0] in _ADDITIONS, f"{name} {option.opts}: {shown}"


def test_no_default_in_help_is_typed_by_hand():
    """A default in a help text is computed, or describes where the value comes from: it holds no value itself."""
    choices = {
        option.opts[-1]: option.type.choices
        for _, command, _ in ALL for option in options_of(command) if isinstance(option.type, click.Choice)
    }  # fmt: skip
    for path in Path(ddkit.cli.__file__).parent.glob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
            names = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            for keyword in call.keywords:
                typed = re.findall(r"\[default: ([^]]*)", _literal(keyword.value)) if keyword.arg == "help" else []
                typed += [_literal(keyword.value)] if keyword.arg == "show_default" else []
                for text in typed:
                    place = f"{path.name}: {names} {text!r}"
                    assert not re.search(r"\d", re.sub(r"track \d", "", text)), place
                    words = set(re.findall(r"[\w+-]+", text))
                    assert not words & {value for name in names for value in choices.get(name, ())}, place


def test_selection_methods_in_help_are_those_that_there_are():
    from ddkit.cli.generate import _METHODS
    from ddkit.sets.select import DEFAULT_METHOD, FEATURE_METHODS, LABEL_METHODS

    assert _METHODS[0] == DEFAULT_METHOD and set(_METHODS) == {*FEATURE_METHODS, *LABEL_METHODS}


def _literal(node: ast.expr) -> str:
    """The text of a string as it is typed, with a mark in place of each value of an f-string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_its_help_with_an_example(command):
    finished = CliRunner().invoke(main, [command, "--help"])
    assert finished.exit_code == 0
    assert "Example:" in finished.stdout


@pytest.mark.parametrize(("typed", "meant"), [("evalute", "evaluate"), ("prepare", "data prepare")])
def test_a_misspelt_command_is_wrong_usage_and_offers_the_nearest(typed, meant):
    finished = CliRunner().invoke(main, [typed])
    assert finished.exit_code == 2
    assert f"Did you mean '{meant}'?" in finished.stderr


def test_a_users_mistake_is_one_message_and_debug_shows_the_traceback(tmp_path):
    finished = run("data", "show", "tinyimagnet", cwd=tmp_path)
    assert finished.returncode == 2
    assert "Did you mean 'tinyimagenet'?" in finished.stderr and "Traceback" not in finished.stderr
    for arguments in (("--debug", "data", "show", "tinyimagnet"), ("data", "show", "tinyimagnet", "--debug")):
        assert "Traceback" in run(*arguments, cwd=tmp_path).stderr


@pytest.mark.parametrize("fault", ["ValueError", "RuntimeError", "OSError"])
def test_a_bug_exits_with_70_and_debug_shows_its_traceback(fault):
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


@pytest.mark.slow
def test_memory_that_runs_out_on_the_cpu_is_one_message(tmp_path):
    for name, ipc in (("small.pt", 1), ("large.pt", 100)):  # 1 and 123 MB
        torch.save(torch.rand(100 * ipc, 3, 32, 32), tmp_path / name)
    code = (
        "import resource, sys\n"
        "from ddkit.cli import main\n"
        "options = ['--dataset', 'cifar100', '--ipc']\n"
        "main(['check', 'small.pt', *options, '1'], standalone_mode=False)\n"  # imports everything
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**25,) * 2)\n"
        "main(['check', 'large.pt', *options, '100'])\n"
    )
    finished = processes.run("-c", code, cwd=tmp_path)
    assert finished.returncode == 3, finished.stderr
    assert "The memory of this machine is used up." in finished.stderr and "bug" not in finished.stderr


def test_completion_prints_a_script_for_the_shell():
    finished = run("completion", "bash")
    assert finished.returncode == 0
    assert "_DDKIT_COMPLETE=bash_complete" in finished.stdout
    assert subprocess.run(["bash", "-n"], input=finished.stdout, text=True).returncode == 0
