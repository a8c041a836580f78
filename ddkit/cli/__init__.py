"""The command `ddkit`: one module a command, options and words only.

Nothing here or in a command's module imports torch until the command runs, so that help is instant.
"""

from __future__ import annotations

import importlib
import signal
import sys
from types import FrameType
from typing import Any

import click

from ddkit import __version__
from ddkit.errors import DDKitError, did_you_mean
from ddkit.runtime.environment import explain_broken_install
from ddkit.runtime.files import explain_os_error

# In the order of the user's way through them. Each is `ddkit.cli.<module>` holding a click command of that name.
COMMANDS = ("demo", "data", "train", "generate", "refine", "evaluate", "check", "tune", "pack", "report", "completion")


_FAULT = 70  # EX_SOFTWARE of sysexits; Python's own 1 is that of an unacceptable submission


class _Group(click.Group):
    """Loads a command's module when it is asked for, and turns errors into messages and exit statuses."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"ddkit.cli.{name}"), name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f"There is no command '{args[0]}'. {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):
            # Click's own ways to end, which are RuntimeErrors too.
            raise
        except (click.ClickException, BrokenPipeError):
            # Of the latter, whoever read our output has gone; click ends quietly on it.
            raise
        except Exception as error:
            if wants_traceback(ctx):
                raise
            explained = _explained(error)
            _say(explained or DDKitError(f"This is a fault of ddkit: {type(error).__name__}: {error}", "--debug shows where."))
            ctx.exit(explained.exit_code if explained else _FAULT)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


def _explained(error: Exception) -> DDKitError | None:
    """What an error means for the user; None of one that is a fault of ours."""
    if isinstance(error, DDKitError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return explain_os_error(error, error.filename or "writing")
    return explain_broken_install(error) if isinstance(error, (RuntimeError, ImportError)) else None


def wants_traceback(ctx: click.Context) -> bool:
    """Whether --debug stood before or after the command's name."""
    return bool(ctx.find_root().meta.get("ddkit.debug"))


def _say(error: DDKitError) -> None:
    click.echo(click.style("Error: ", fg="red", bold=True) + error.message, err=True)
    if error.remedy:
        click.echo(error.remedy, err=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta["ddkit.debug"] = True


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ddkit")
@click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember_debug, help="Show the traceback of an error."
)
def main() -> None:
    """Enter a dataset-distillation challenge, and know beforehand what you will score.

    \b
    Try it:     ddkit demo
    For real:   ddkit train, generate, evaluate, check, pack, report  (in this order)
    """


if __name__ == "__main__":
    sys.exit(main())
