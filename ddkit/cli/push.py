"""`ddkit push`: upload a generator or a distilled set to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from ddkit.cli._options import FILE, example, output_options
from ddkit.cli._output import Output
from ddkit.results import RESULTS_FILE


@click.command(
    short_help="Upload a generator or a set to the Hugging Face hub.",
    epilog=example(
        "ddkit push submission/cifar100.pt user/cifar100-10 --license cc-by-4.0 --dry-run\n"
        "ddkit push runs/cifar100 user/cifar100-generator"
    ),
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.argument("hub_id", metavar="USER/NAME")
@click.option(
    "--license",
    metavar="ID",
    help="State this license in the card, by the hub's identifier, such as cc-by-4.0.  [default: unknown]",
)
@click.option("--private", is_flag=True, help="Create a repository that only you can see.")
@click.option("--dry-run", is_flag=True, help="Show the card and the files, and upload nothing.")
@click.option(
    "--results",
    type=FILE,
    default=RESULTS_FILE,
    help="List the scores in this file in the card, if they are of this set or of this generator's sets.",
)
@output_options
def push(output: Output, path: Path, hub_id: str, license: str | None, private: bool, dry_run: bool, results: Path) -> None:
    """Upload the generator in the folder PATH, or the distilled set in the .pt file PATH, as USER/NAME.

    A card is written from what is recorded: how it was made, and its scores in the results file. Absolute paths of this
    machine are left out. Log in first: hf auth login.
    """
    from ddkit import hub

    planned = hub.plan_upload(path, hub_id, license=license, results=results)
    data = {"hub_id": hub_id, "kind": planned.kind, "files": sorted(planned.files), "card": planned.card}
    if dry_run:
        output.result(data, planned.card)
        output.note(f"It would upload {', '.join(planned.files)}.")
        return
    if not license:
        output.note("The card says that the license is unknown. Add --license ID, such as cc-by-4.0.", label="warning")
    output.note(f"Uploading {len(planned.files)} files to the {planned.kind} {hub_id}.")
    url = hub.push(planned, private=private)
    output.result({**data, "url": url}, url)
    output.finish([url], planned.command)
