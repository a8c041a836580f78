"""`ddkit data`: list, prepare and show datasets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddkit.challenge import DATASETS
from ddkit.cli._options import COUNT, FILE, PATH, example, output_options, refuse_unused
from ddkit.cli._output import Output, plain_table
from ddkit.data import store
from ddkit.data.class_names import SPLIT_NAMES
from ddkit.errors import BadDataError, MissingDataError, counted
from ddkit.runtime.files import cache_folder, require_ending

if TYPE_CHECKING:
    from ddkit.data.store import StoreFacts

_NOT_PREPARED = "not prepared"

_name_argument = click.argument(
    "name", shell_complete=lambda ctx, parameter, word: [name for name in store.known_names() if name.startswith(word)]
)


@click.group(
    short_help="List, prepare and show datasets.",
    epilog=example("ddkit data prepare tinyimagenet --from tiny-imagenet-200.zip"),
)
def data() -> None:
    """List, prepare and show datasets.

    cifar100 and tinyimagenet are those of the challenge, glyphs is drawn by ddkit for practice, and any folder or archive
    of images becomes a dataset under a name that you choose.
    """


@data.command("list", short_help="List built-in and prepared datasets.", epilog=example("ddkit data list"))
@output_options
def list_datasets(output: Output) -> None:
    """List the built-in and the prepared datasets."""
    rows = [_row(name) for name in store.known_names()]
    numbers = ("classes", "pixels", "train", "test")
    table = plain_table("dataset", *numbers, "from", right=numbers)
    for row in rows:
        counts = [f"{row[split]:,}" if row[split] else "-" for split in ("train", "test")]
        table.add_row(row["name"], str(row["classes"] or "-"), str(row["image_size"] or "-"), *counts, row["state"])
    output.note(f"Prepared datasets are kept in {cache_folder()}.")
    output.result(rows, table)
    if missing := [row["name"] for row in rows if row["state"] == _NOT_PREPARED]:
        output.finish([], f"ddkit data prepare {missing[0]}")


@data.command(
    short_help="Prepare a dataset from its images.",
    epilog=example("ddkit data prepare birds --from photos.zip --image-size 64"),
)
@_name_argument
@click.option(
    "--from",
    "source",
    type=PATH,
    metavar="PATH",
    help="Read this folder or archive. If not given, a built-in dataset is downloaded or drawn.",
)
@click.option(
    "--image-size",
    type=click.IntRange(8, 1024),
    metavar="PIXELS",
    help="Crop images of other sizes to squares and resize them to this side.  [default: the size of "
    "the images, which must all have it]",
)
@click.option(
    "--test-split",
    type=click.Choice(SPLIT_NAMES["test"]),
    help="Use this folder as the test split, if several have labels.  [default: the first of these that is there]",
)
@click.option("--skip-bad", is_flag=True, help="Leave out files that are not complete images.")
@click.option("--force", is_flag=True, help="Prepare the dataset again even if it is prepared.")
@output_options
def prepare(output: Output, name: str, source: Path | None, force: bool, **options: Any) -> None:
    """Prepare a dataset, so that it opens in milliseconds.

    \b
    PATH is recognized by its content. It may hold:
      <split>/<class>/<image>   splits train and test (or val), in any format that Pillow reads
      tiny-imagenet-200         as published, or with its validation images sorted by class
      cifar-100-python          the files train, test and meta
      parquet files             a dataset of Hugging Face (needs pip install 'ddkit[parquet]')
      .npz or .npy arrays       x_train, y_train, x_test, y_test
    as a folder, a zip or a tar, also below other folders. Or it is one of the challenge's test files, *_test.pt, which
    has no training split.
    """
    from ddkit.data.prepare import prepare as prepare_dataset

    folder = store.store_folder(name)
    if source is None:
        store.dataset_spec(name)  # an unknown name is refused before anything is said
        if name not in DATASETS:
            refuse_unused(options, "without --from")
    made_before = _date_of(name)
    origin = f" from {source}" if source else ""
    if source is None and name in DATASETS and (force or made_before is None):
        origin = " (drawn here)" if name == "glyphs" else " (downloaded from its official address)"
    output.note(f"Preparing {name}{origin} in {folder}.")
    prepare_dataset(name, source, force=force, progress=output.progress, **options)
    facts = store.store_facts(name)
    for split, split_facts in facts.splits.items():
        if split_facts.skipped:
            output.note(f"These {split} files were left out: {', '.join(split_facts.skipped)}", label="warning")
    output.result({"folder": str(folder), **dataclasses.asdict(facts)}, _summary(facts))
    if facts.prepared == made_before:
        output.note(f"It was prepared already, in {folder}; --force prepares it again.")
    output.finish([folder] if facts.prepared != made_before else [], f"ddkit generate --dataset {name} --from-real random")


@data.command(
    short_help="Draw images of a dataset.", epilog=example("ddkit data show cifar100 --classes apple,worm --per-class 20")
)
@_name_argument
@click.option("--split", type=click.Choice(("train", "test")), default="train", help="Draw images of this split.")
@click.option("--per-class", type=COUNT, default=10, help="Draw this many images in each row.")
@click.option("--classes", metavar="NAME,...", help="Draw only these: names or numbers, separated by commas.")
@click.option("--out", type=FILE, metavar="PNG", help="Write the picture to this file.  [default: NAME-SPLIT.png]")
@output_options
def show(output: Output, name: str, split: str, per_class: int, classes: str | None, out: Path | None) -> None:
    """Draw a contact sheet: the first images of each class in a row."""
    store.dataset_spec(name)  # an unknown name is refused at once, before torch is loaded
    out = out or Path(f"{name}-{split}.png")
    require_ending(out, ".png")
    from ddkit.data.prepare import open_dataset
    from ddkit.sets.contact_sheet import contact_sheet, save_png

    output.note(f"Drawing the first {per_class} {split} images of each class of {name}.")
    images = open_dataset(name, split, progress=output.progress)
    titles = store.class_titles(name)
    chosen = store.find_classes(name, classes.split(",")) if classes else range(len(titles))
    rows = [row for label in chosen for row in (images.labels == label).nonzero().flatten()[:per_class].tolist()]
    sheet = contact_sheet(images.images[rows], images.labels[rows], titles, per_class=per_class)
    save_png(sheet, out)
    output.result({"out": str(out), "classes": [images.class_names[label] for label in chosen]})
    output.finish([out], f"ddkit generate --dataset {name} --from-real random")


def _row(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "classes": None, "image_size": None, "train": 0, "test": 0}
    if spec := DATASETS.get(name):
        row.update(classes=spec.num_classes, image_size=spec.image_size)
    try:
        facts = store.store_facts(name)
    except MissingDataError:
        return {**row, "state": _NOT_PREPARED}
    except BadDataError as error:
        return {**row, "state": error.message}
    counts = {split: split_facts.images for split, split_facts in facts.splits.items()}
    row.update(classes=len(facts.class_names), image_size=facts.image_size, **counts)
    return {**row, "state": str(facts.source.get("path") or facts.source["kind"])}


def _date_of(name: str) -> str | None:
    """When a store was made; None if it is missing, or damaged and so will be made again."""
    try:
        return store.store_facts(name).prepared if store.is_prepared(name) else None
    except BadDataError:
        return None


def _summary(facts: StoreFacts) -> str:
    counts = ", ".join(
        f"{split.images:,} {name} images ({' to '.join(map(str, dict.fromkeys(split.per_class)))} a class)"
        for name, split in facts.splits.items()
    )
    return f"{facts.name}: {counted(len(facts.class_names), 'class', 'classes')}, {facts.image_size} pixels, {counts}"
