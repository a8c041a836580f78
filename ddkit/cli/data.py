"""`ddkit data`: what is prepared, preparing more, and looking at it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from ddkit.challenge import DATASETS
from ddkit.cli._options import example, output_options
from ddkit.cli._output import Output

if TYPE_CHECKING:
    from ddkit.data.store import ImageSet, StoreFacts


def _complete_name(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from ddkit.data.store import known_names

    return [name for name in known_names() if name.startswith(incomplete)]


_name_argument = click.argument("name", shell_complete=_complete_name)


@click.group(epilog=example("ddkit data prepare tinyimagenet --from tiny-imagenet-200.zip"))
def data() -> None:
    """Datasets: list, prepare, show.

    cifar100 and tinyimagenet are the challenge's, glyphs is drawn here for practice, and any folder or zip of
    images becomes a dataset under a name you give it.
    """


@data.command("list", epilog=example("ddkit data list"))
@output_options
def list_datasets(output: Output) -> None:
    """The built-in datasets and the prepared ones."""
    from ddkit.data.store import known_names
    from ddkit.runtime.files import cache_folder

    rows = [_row(name) for name in known_names()]
    table = Table(box=None, pad_edge=False)
    for heading in ("dataset", "classes", "pixels", "train", "test", "from"):
        table.add_column(heading, justify="right" if heading in ("classes", "pixels", "train", "test") else "left")
    for row in rows:
        counts = [f"{row[split]:,}" if row[split] else "-" for split in ("train", "test")]
        table.add_row(row["name"], str(row["classes"] or "-"), str(row["image_size"] or "-"), *counts, row["state"])
    output.say(f"Prepared datasets lie in {escape(str(cache_folder()))}.")
    output.result(rows, table)


@data.command(epilog=example("ddkit data prepare birds --from photos.zip --image-size 64"))
@_name_argument
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A folder or archive; what it holds is found out. Without it: download, or draw.",
)
@click.option(
    "--image-size",
    type=click.IntRange(8, 1024),
    metavar="PIXELS",
    help="Crop images of other sizes to squares and resize them to this.",
)
@click.option("--skip-bad", is_flag=True, help="Leave out files that are no whole images.")
@click.option("--force", is_flag=True, help="Prepare it anew even if it is there.")
@output_options
def prepare(output: Output, name: str, source: Path | None, image_size: int | None, skip_bad: bool, force: bool) -> None:
    """Prepare a dataset, so that it opens in milliseconds.

    \b
    PATH may be:
      cifar-100-python       the official archive (.tar.gz) or its folder
      tiny-imagenet-200      the official archive (.zip) or its folder
      images                 <split>/<class>/<image>, split train and test (or val), a folder or a zip
      *_test.pt              the challenge's test file (test split only)
    """
    from ddkit.data.prepare import prepare as prepare_dataset
    from ddkit.data.store import dataset_spec, is_prepared, store_facts, store_folder

    folder = store_folder(name)
    if source is None:
        dataset_spec(name)
    made_before = _date_of(name) if is_prepared(name) else None
    output.say(f"Preparing {escape(name)} {escape(_whence(name, source))} in {escape(str(folder))}.")
    prepare_dataset(name, source, image_size=image_size, skip_bad=skip_bad, force=force, progress=output.listen)
    facts = store_facts(name)
    for split, split_facts in facts.splits.items():
        if split_facts.skipped:
            output.say(f"[yellow]left out[/yellow] of {split}: {escape(', '.join(split_facts.skipped))}")
    output.result(_as_json(facts, folder), _summary(facts))
    if facts.prepared == made_before:
        output.say(f"It was prepared already, in {escape(str(folder))}; --force prepares it anew.")
    output.done([folder] if facts.prepared != made_before else [], f"ddkit train --dataset {name}")


@data.command(epilog=example("ddkit data show cifar100 --classes apple,worm --per-class 20"))
@_name_argument
@click.option("--split", type=click.Choice(("train", "test")), default="train", show_default=True)
@click.option("--per-class", type=click.IntRange(min=1), default=10, show_default=True, help="Pictures a row.")
@click.option("--classes", metavar="NAME,...", help="Only these: names or numbers, separated by commas.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="PNG", help="The picture. Default: NAME-SPLIT.png here."
)
@output_options
def show(output: Output, name: str, split: str, per_class: int, classes: str | None, out: Path | None) -> None:
    """Draw a contact sheet: one row a class, the first images of each."""
    from ddkit.data.store import class_titles, dataset_spec, find_classes

    dataset_spec(name)  # a misspelt name is said at once, before torch is loaded
    from ddkit.data.prepare import open_dataset
    from ddkit.sets.contact_sheet import contact_sheet, save_png

    output.say(f"Drawing the first {per_class} {split} images of each class of {escape(name)}.")
    images = open_dataset(name, split, progress=output.listen)
    titles = class_titles(name)
    chosen = find_classes(name, classes.split(",")) if classes else range(len(titles))
    sheet = contact_sheet(*_first_images(images, chosen, per_class), titles, per_class=per_class)
    out = out or Path(f"{name}-{split}.png")
    save_png(sheet, out)
    output.result({"out": str(out), "classes": [images.class_names[label] for label in chosen]})
    output.done([out], f"ddkit train --dataset {name}")


def _first_images(images: ImageSet, labels: Any, per_class: int) -> tuple[Any, Any]:
    import torch

    rows = torch.cat([(images.labels == label).nonzero().flatten()[:per_class] for label in labels])
    return images.images[rows], images.labels[rows]


def _row(name: str) -> dict[str, Any]:
    from ddkit.data.store import store_facts
    from ddkit.errors import BadDataError, MissingDataError

    row: dict[str, Any] = {"name": name, "classes": None, "image_size": None, "train": 0, "test": 0}
    if spec := DATASETS.get(name):
        row.update(classes=spec.num_classes, image_size=spec.image_size)
    try:
        facts = store_facts(name)
    except MissingDataError:
        return {**row, "state": f"not prepared: ddkit data prepare {name}"}
    except BadDataError as error:
        return {**row, "state": error.message}
    counts = {split: split_facts.images for split, split_facts in facts.splits.items()}
    row.update(classes=len(facts.class_names), image_size=facts.image_size, **counts)
    return {**row, "state": str(facts.source.get("path") or facts.source["kind"])}


def _date_of(name: str) -> str | None:
    """When a store was made; None where it is damaged, and so will be made again."""
    from ddkit.data.store import store_facts
    from ddkit.errors import BadDataError

    try:
        return store_facts(name).prepared
    except BadDataError:
        return None


def _whence(name: str, source: Path | None) -> str:
    if source is not None:
        return f"from {source}"
    return "(drawn here)" if name == "glyphs" else "(downloaded from its official address unless it is there)"


def _summary(facts: StoreFacts) -> str:
    counts = ", ".join(
        f"{split.images:,} {name} images ({_span(split.per_class)} a class)" for name, split in facts.splits.items()
    )
    return escape(f"{facts.name}: {len(facts.class_names)} classes, {facts.image_size} pixels, {counts}")


def _span(per_class: tuple[int, int]) -> str:
    low, high = per_class
    return str(low) if low == high else f"{low} to {high}"


def _as_json(facts: StoreFacts, folder: Path) -> dict[str, Any]:
    import dataclasses

    return {"folder": str(folder), **dataclasses.asdict(facts)}
