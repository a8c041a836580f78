"""`ddkit pack`: the zip to upload."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from ddkit.cli._options import SUBMISSION_FOLDER, example, surface_options
from ddkit.cli._surface import Surface


@click.command(epilog=example("ddkit pack submission --out my-entry.zip"))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=SUBMISSION_FOLDER)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("submission.zip"),
              show_default=True, help="The zip to write.")
@click.option("--strict", is_flag=True, help="Refuse to pack what has warnings.")
@click.option("--ignore", "ignored", multiple=True, metavar="CODE",
              help="Pack in spite of findings of this code; repeatable.")
@surface_options
def pack(surface: Surface, folder: Path, out: Path, strict: bool, ignored: tuple[str, ...]) -> None:
    """Check FOLDER and write the submission zip, with the tensors at its root.

    The zip is read back as the scorer reads it. What `ddkit check` refuses is not packed, and an earlier zip
    stays as it was. The same tensors always make the same zip.
    """
    from ddkit.files import sha256_of
    from ddkit.submission import pack as packing

    surface.say(f"Checking {escape(str(folder))} and packing it into {escape(str(out))}.")
    path = packing.pack(folder, out, strict=strict, ignore_codes=ignored, progress=surface.listen)
    files = packing.packed_files(path)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, justify in (("in the zip", "left"), ("bytes", "right"), ("SHA-256", "left")):
        table.add_column(heading, justify=justify)
    for file in files:
        table.add_row(escape(file.name), f"{file.size:,}", file.sha256)
    table.add_row(f"[bold]{escape(path.name)}[/]", f"{path.stat().st_size:,}", sha256_of(path))
    surface.result({"path": str(path), "sha256": sha256_of(path), "files": [vars(file) for file in files]}, table)
    surface.say(f"Upload {escape(str(path))}: read back and verified.")
    surface.done([path], "ddkit report")
