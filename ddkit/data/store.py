"""The prepared store: a dataset's pixels and labels as memory-mapped tensors that open in milliseconds.

`<cache>/<dataset>/{train,test}.safetensors` hold `images` (N, 3, S, S) uint8 and `labels` (N,) int64, ordered by
class and, within a class, by file name; `meta.json` says where they come from. `ddkit.data.prepare` makes stores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import safetensors

from ddkit.challenge import DATASETS, DatasetSpec
from ddkit.data.class_names import CLASS_NAMES
from ddkit.errors import BadDataError, BadFileError, MissingDataError, UsageError, did_you_mean
from ddkit.runtime.files import cache_folder, read_json
from ddkit.runtime.records import read_record

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "test")
META_FILE = "meta.json"


@dataclass(frozen=True, repr=False)
class ImageSet:
    """Real images with labels.

    images: (N, 3, S, S) uint8. labels: (N,) int64, indices into class_names.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        side = self.images.shape[-1]
        return f"ImageSet({len(self):,} images of {side} x {side} pixels, {len(self.class_names)} classes)"


@dataclass(frozen=True)
class SplitFacts:
    """One split of a store. per_class: the smallest and largest number of images of any class."""

    images: int
    per_class: tuple[int, int]
    sha256: str  # of the safetensors file
    skipped: tuple[str, ...] = ()  # unusable files that --skip-bad left out


@dataclass(frozen=True)
class StoreFacts:
    """The contents of a store's meta.json.

    source: the layout ("kind"), the path and the settings that the store was made from.
    class_titles: readable names ("goldfish") in the order of class_names; empty if those are readable themselves.
    listed_order: the class names in the order in which the source lists them (the shuffled wnids.txt of TinyImageNet);
        empty if it lists none.
    """

    name: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_names: tuple[str, ...]
    splits: Mapping[str, SplitFacts]
    source: Mapping[str, Any]
    class_titles: tuple[str, ...] = ()
    listed_order: tuple[str, ...] = ()
    prepared: str = ""  # ISO 8601, UTC
    ddkit_version: str = ""
    format: Annotated[int, (1,)] = 1

    @property
    def spec(self) -> DatasetSpec:
        """The built-in numbers of a built-in dataset, else those measured on the training split."""
        known = DATASETS.get(self.name)
        return known or DatasetSpec(self.name, len(self.class_names), self.image_size, self.mean, self.std)


def load_dataset(name: str, split: str) -> ImageSet:
    """Open a prepared split, memory-mapped. `ddkit.data.prepare.open_dataset` prepares a built-in dataset first.

    name: a built-in dataset or one the user prepared. split: "train" or "test".
    Raises UsageError for an unknown name or split, MissingDataError with the command to type if it is not prepared,
    BadDataError if the store is damaged or has another format version.
    """
    if split not in SPLITS:
        raise UsageError(f"There is no split '{split}'.", "Splits are train and test.")
    facts = store_facts(name)
    expected = (_split_facts(name, facts, split).images, 3, facts.image_size, facts.image_size)
    try:
        with safetensors.safe_open(store_folder(name) / f"{split}.safetensors", framework="pt") as file:
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(name, f"{split}.safetensors: {error}") from error
    if tuple(images.shape) != expected or tuple(labels.shape) != expected[:1]:
        raise _damaged(name, f"{split}.safetensors holds {tuple(images.shape)}, meta.json says {expected}")
    return ImageSet(images, labels, facts.class_names)


def dataset_spec(name: str) -> DatasetSpec:
    """The numbers of a built-in dataset, or those measured when the user prepared one.

    Raises UsageError for an unknown name, offering the most similar one, and BadDataError for a damaged store.
    """
    return DATASETS.get(name) or store_facts(name).spec


def class_names(name: str) -> tuple[str, ...]:
    """The classes' own names in class order. Those of a built-in dataset are known before it is prepared.

    Raises what `store_facts` raises.
    """
    return CLASS_NAMES[name] if name in CLASS_NAMES and not is_prepared(name) else store_facts(name).class_names


def class_titles(name: str) -> tuple[str, ...]:
    """Readable class names in class order: "goldfish" for the class n01443537.

    For a built-in dataset that is not prepared, the classes' own names. Raises what `store_facts` raises.
    """
    return (store_facts(name).class_titles if is_prepared(name) else ()) or class_names(name)


def find_classes(name: str, wanted: Sequence[str]) -> list[int]:
    """Labels of classes given by names, titles or numbers, in the order given.

    Raises UsageError that offers the most similar name, and what `store_facts` raises.
    """
    facts = store_facts(name)
    known = {str(label): label for label in range(len(facts.class_names))}
    # Names come last, because a class may have a number for its name.
    known.update({title.lower(): label for label, title in reversed(list(enumerate(facts.class_titles)))})
    known.update({class_name.lower(): label for label, class_name in enumerate(facts.class_names)})
    labels = []
    for word in (word.strip() for word in wanted):
        if word.lower() not in known:
            raise UsageError(f"'{name}' has no class '{word}'.", did_you_mean(word, facts.class_titles or facts.class_names))
        labels.append(known[word.lower()])
    return labels


def train_sha256(name: str) -> str:
    """Hexadecimal SHA-256 of the prepared training split's file, as recorded when it was written.

    Raises what `store_facts` raises, and MissingDataError if that split is not prepared.
    """
    return _split_facts(name, store_facts(name), "train").sha256


def _split_facts(name: str, facts: StoreFacts, split: str) -> SplitFacts:
    if split not in facts.splits:
        raise MissingDataError(
            f"The prepared '{name}' has no {split} split, because {facts.source.get('path') or 'its source'} has none.",
            f"Get all of it: {_command(name)}",
        )
    return facts.splits[split]


def list_prepared() -> tuple[str, ...]:
    """Names of the prepared datasets, sorted, damaged ones among them."""
    folder = cache_folder()
    if not folder.is_dir():
        return ()
    return tuple(sorted(name for path in folder.glob(f"*/{META_FILE}") if _can_be_name(name := path.parent.name)))


def known_names() -> tuple[str, ...]:
    """Names of the built-in datasets, then of the other prepared ones."""
    return tuple(dict.fromkeys((*DATASETS, *list_prepared())))


def is_prepared(name: str) -> bool:
    """True if a store of that name exists, damaged or not."""
    return (store_folder(name) / META_FILE).is_file()


def _can_be_name(name: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) is not None and len(name) <= 64


def store_folder(name: str) -> Path:
    """The folder of the store of that name, whether it exists or not. Raises UsageError for an impossible name."""
    if not _can_be_name(name):
        raise UsageError(
            f"'{name}' cannot be a dataset's name.",
            f"Names have lower-case letters, digits, '.', '_' and '-'. {did_you_mean(name, known_names())}",
        )
    return cache_folder() / name


def store_facts(name: str) -> StoreFacts:
    """Read and check the meta.json of a store.

    Raises UsageError for a name that is neither built-in nor prepared, MissingDataError for a built-in dataset that is
    not prepared, BadDataError for a store that is damaged or has another format version.
    """
    folder = store_folder(name)
    if not is_prepared(name):
        if name in DATASETS:
            raise MissingDataError(f"The dataset '{name}' is not prepared.", f"Prepare it: {_command(name)}")
        own = f"To prepare your own images: ddkit data prepare {name} --from PATH"
        raise UsageError(f"Unknown dataset '{name}'.", f"{did_you_mean(name, known_names())} {own}")
    try:
        value = read_json(folder / META_FILE)
    except BadFileError as error:
        raise _damaged(name, error.message) from error
    try:
        return read_record(StoreFacts, value)
    except BadFileError as error:
        raise _damaged(name, f"meta.json does not have the expected contents ({error})") from error


def _damaged(name: str, what: str) -> BadDataError:
    return BadDataError(
        f"The prepared '{name}' is damaged: {what.rstrip('.')}.", f"Prepare it again: {_command(name, force=True)}"
    )


def _command(name: str, *, force: bool = False) -> str:
    source = "" if name in DATASETS else " --from PATH"
    return f"ddkit data prepare {name}{source}{' --force' if force else ''}"
