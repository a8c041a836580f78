"""Options that several commands share, and types of options."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ddkit.cli import debug_option
from ddkit.cli._output import Output
from ddkit.errors import UsageError
from ddkit.generator.config import SAMPLERS, SAMPLING_PRECISIONS

SUBMISSION_FOLDER = Path("submission")
BUNDLE_FILE = Path("track2.zip")
RUNS_FOLDER = Path("runs")
TRIALS_FOLDER = RUNS_FOLDER / "tune"

PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
COUNT = click.IntRange(1)
TRACK = click.Choice(["1", "2"])
SAMPLER = click.Choice(SAMPLERS)
SAMPLING_PRECISION = click.Choice(SAMPLING_PRECISIONS)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json, --quiet, --verbose and --debug; the command receives an `output` made of them."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
    @click.option("-q", "--quiet", is_flag=True, help="Print neither progress nor notes.")
    @click.option(
        "-v", "--verbose", count=True, show_default=False, help="Print ddkit's log; twice, the libraries' logs as well."
    )
    @debug_option
    @functools.wraps(command)
    def with_output(*args: Any, as_json: bool, quiet: bool, verbose: int, **kwargs: Any) -> Any:
        with Output(as_json=as_json, quiet=quiet, verbosity=verbose) as output:
            return command(*args, output=output, **kwargs)

    return with_output


device_option = click.option("--device", default="auto", metavar="auto|cpu|cuda[:N]|mps", help="Compute on this device.")
seed_option = click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Use this random seed.")
recorded_seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    help="Use this random seed; 0 if not given. A resumed run keeps its first seed.",
)


def compute_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --device, --seed and the options of `output_options`."""
    return device_option(seed_option(output_options(command)))


def resumable_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the same as `compute_options`, with a seed that is None if it is not given."""
    return device_option(recorded_seed_option(output_options(command)))


def ignore_option(text: str) -> Callable[..., Any]:
    """Add --ignore CODE, which may be repeated; the command receives `ignore_codes`."""
    return click.option("--ignore", "ignore_codes", multiple=True, type=FindingCode(), metavar="CODE", help=text)


def save_every_option(default: str) -> Callable[..., Any]:
    """Add --save-every DURATION; the command receives `save_every_seconds`."""
    text = "Save the state this often; a kill loses at most this."
    return click.option("--save-every", "save_every_seconds", type=Duration(), default=default, help=text)


class FindingCode(click.ParamType):
    """The code of a finding of `ddkit check`, such as C006, in upper or lower case."""

    name = "code"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        code = str(value).strip().upper()
        if not re.fullmatch(r"[FTLNC]\d{3}", code):
            self.fail(f"'{value}' is not the code of a finding, which is a letter and three digits, such as C006.", param, ctx)
        return code


class Duration(click.ParamType):
    """A length of time such as 90s, 20m or 1.5h, converted to seconds as a float. A number alone is refused."""

    name = "duration"
    _seconds_per = {"s": 1.0, "m": 60.0, "h": 3600.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", str(value).strip().lower())
        if match is None or float(match[1]) <= 0:
            self.fail(f"'{value}' is not a length of time with a unit. Write 90s, 20m or 1.5h.", param, ctx)
        return float(match[1]) * self._seconds_per[match[2]]


def given_options(parameters: Iterable[str]) -> list[str]:
    """Those of these parameters of the running command that the user gave, as they are typed; an argument in capitals."""
    ctx, names = click.get_current_context(), set(parameters)
    return [
        parameter.opts[0] if isinstance(parameter, click.Option) else parameter.opts[0].upper()
        for parameter in ctx.command.params
        if parameter.name in names and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]


def refuse_unused(parameters: Iterable[str], where: str) -> None:
    """Raise UsageError if one of these was given, where it does nothing. where: ends the sentence: "with --from-real"."""
    if unused := given_options(parameters):
        have, them = ("has", "it") if len(unused) == 1 else ("have", "them")
        raise UsageError(f"{', '.join(unused)} {have} no effect {where}.", f"Leave {them} out.")


def example(text: str) -> str:
    """A command's epilog: its example, line by line as written."""
    return "\b\nExample:\n  " + text.replace("\n", "\n  ")
