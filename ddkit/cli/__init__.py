"""The command `ddkit`. Each command's module holds its options and how its result is shown.

No module imports torch before its command runs, so that help is shown at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from ddkit import __version__
from ddkit.errors import DDKitError, did_you_mean
from ddkit.runtime.environment import explain_broken_install
from ddkit.runtime.files import explain_os_error

# In the order in which they are used. Each is a click command of that name in the module `ddkit.cli.<name>`.
COMMANDS = (
    "demo", "enter", "data", "train", "generate", "refine", "evaluate", "check", "tune", "pack", "report", "push", "pull",
    "doctor", "completion",
)  # fmt: skip

_OF_DATA = ("data list", "data prepare", "data show")

_EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h; 1, which Python uses, means an unacceptable submission
_EXIT_INTERRUPTED = 130
_EXIT_PIPE = 141  # as shells show a command that SIGPIPE ended


class _Group(click.Group):
    """Load the modules of commands when they are needed, and turn errors into messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"ddkit.cli.{name}"), name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f"Unknown command '{args[0]}'. {did_you_mean(args[0], (*COMMANDS, *_OF_DATA))}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise  # click handles these
        except (BrokenPipeError, SystemExit):  # nobody reads the output any more, which rich tells by the latter
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left is written at the end
            ctx.exit(_EXIT_PIPE)
        except Exception as error:
            if ctx.find_root().meta.get("ddkit.debug"):
                raise
            explained = _explained(error)
            bug = f"This is a bug in ddkit. {type(error).__name__}: {error}"
            shown = explained or DDKitError(bug, "Run it with --debug for the traceback.")
            label = "" if shown.exit_code == _EXIT_INTERRUPTED else click.style("Error: ", fg="red", bold=True)
            click.echo(label + shown.message, err=True)
            if shown.remedy:
                click.echo(shown.remedy, err=True)
            ctx.exit(explained.exit_code if explained else _EXIT_BUG)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(_EXIT_INTERRUPTED)


def _explained(error: Exception) -> DDKitError | None:
    """The error in words for the user; None for a bug."""
    if isinstance(error, DDKitError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return explain_os_error(error, error.filename or "writing")
    if not isinstance(error, (RuntimeError, ImportError, MemoryError)):
        return None
    if "torch" in sys.modules or isinstance(error, MemoryError):
        from ddkit.runtime.device import explain_gpu_error

        if explained := explain_gpu_error(error):
            return explained
    return explain_broken_install(error)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:  # it may be given before or after the command's name
        ctx.find_root().meta["ddkit.debug"] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember_debug, help="Show the traceback of an error."
)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
)
@click.version_option(__version__, prog_name="ddkit")
@debug_option
def main() -> None:
    """Enter a dataset distillation challenge, and know beforehand what you will score.

    \b
    Try it:    ddkit demo
    Enter:     ddkit enter --time 8h
    Track 1:   ddkit data prepare, generate, refine, evaluate, check, pack, report
    Track 2:   ddkit data prepare, train, tune, pack --track 2, evaluate --track 2
    """
