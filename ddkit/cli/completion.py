"""`ddkit completion`: the script with which a shell completes commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ddkit.cli._options import example


@click.command(
    short_help="Print the script for completion in a shell.",
    epilog=example('eval "$(ddkit completion bash)"        # in ~/.bashrc'),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script with which your shell completes ddkit's commands and options."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "ddkit", "_DDKIT_COMPLETE").source())
