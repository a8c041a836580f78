"""`ddkit completion`: what a shell needs to complete ddkit's words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ddkit.cli._options import example


@click.command(epilog=example('eval "$(ddkit completion bash)"        # in ~/.bashrc'))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes ddkit's commands and options in SHELL."""
    kind = get_completion_class(shell)
    click.echo(kind(ctx.find_root().command, {}, "ddkit", "_DDKIT_COMPLETE").source())
