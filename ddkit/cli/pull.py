"""`ddkit pull`: download a distilled set from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from ddkit.cli._options import FILE, example, output_options
from ddkit.cli._output import Output


@click.command(
    short_help="Download a set from the Hugging Face hub.",
    epilog=example("ddkit pull user/cifar100-10 --out theirs/cifar100.pt"),
)
@click.argument("hub_id", metavar="USER/NAME")
@click.option(
    "--dataset", metavar="NAME", help="Name the set's dataset.  [default: from the JSON on the hub, or its file name]"
)
@click.option("--out", type=FILE, help="Write the set to this file.  [default: submission/<dataset>.pt]")
@click.option("--replace", is_flag=True, help="Write the set even if another one is there.")
@output_options
def pull(output: Output, hub_id: str, dataset: str | None, out: Path | None, replace: bool) -> None:
    """Download the distilled set USER/NAME, and write it with its JSON and its contact sheet.

    Nothing in the file is executed. A generator on the hub needs no download: give its id to --model, as in
    ddkit generate --model USER/NAME.
    """
    from ddkit.hub import pull as download

    files = download(hub_id, out, dataset=dataset, replace=replace)
    output.result({"tensor": files.tensor, "facts": files.provenance, "sheet": files.sheet})
    output.finish([files.tensor, files.provenance, files.sheet], "ddkit evaluate", files.tensor)
