"""What a team has packed, under which names, and what a file's hash says about it.

Evaluations are kept in the results file (`ddkit.results`), packed zips in `packed.jsonl` next to it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from ddkit.errors import UsageError
from ddkit.results import RESULTS_FILE, Result
from ddkit.runtime.files import sha256_of_files
from ddkit.runtime.jsonl import append_line, parse_lines, require_appendable
from ddkit.runtime.records import Count, read_record

FORMAT_VERSION = 1
RECIPE_FILE = "recipe.toml"
_LARGEST_RECIPE = 1 << 20  # bytes


def packed_file(results: str | os.PathLike[str] = RESULTS_FILE) -> Path:
    """The file of packed zips that belongs to a file of results: packed.jsonl next to it."""
    return Path(results).with_name("packed.jsonl")


PACKED_FILE = packed_file()


@dataclass(frozen=True)
class Packed:
    """A zip that was packed.

    name: unique for its content. path: where it was written. sha256: of the zip. files: name of each member -> SHA-256.
    date: ISO 8601, UTC. recipe: the file that says how its sets were made; "" if there is none.
    """

    name: str
    path: str
    sha256: str
    track: Count
    files: Mapping[str, str]
    date: str
    recipe: str = ""
    format: Count = FORMAT_VERSION

    @property
    def evaluated_as(self) -> dict[str, str]:
        """Dataset -> the SHA-256 that evaluations record: of the dataset's tensor, or of all files of a track 2 bundle."""
        if self.track == 1:
            return {name.removesuffix(".pt"): sha256 for name, sha256 in self.files.items() if name.endswith(".pt")}
        whole = sha256_of_files(self.files)
        return {PurePosixPath(name).parts[1]: whole for name in self.files if fnmatch(name, "models/*/entry.json")}


class PackedRecords:
    """The file of packed zips, with its records in memory.

    records: all of them, oldest first. problems: a text on each line that cannot be used.
    Raises BadFileError if the file cannot be read or, unless `writes` is False, not be written, before anything is packed.
    """

    def __init__(self, path: str | os.PathLike[str] = PACKED_FILE, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.records, self.problems = parse_lines(self.path, functools.partial(read_record, Packed))
        if writes:
            require_appendable(self.path)

    def choose_name(self, name: str | None, default: str, files: Mapping[str, str]) -> tuple[str, str]:
        """The name for a zip that will hold these files, and a sentence if it is not the one that was to be expected.

        name: that the user gave; None takes `default`, with a number if it is in use. files: name -> SHA-256.
        Raises UsageError for a name that cannot be one or was given to other files before.
        """
        require_name(name)
        wanted = default if name is None else name.strip()
        other = self._other(wanted, files)
        if other is None:
            return wanted, ""
        number = next(k for k in range(2, len(self.records) + 3) if self._other(f"{wanted}-{k}", files) is None)
        free, when = f"{wanted}-{number}", other.date[:10] or "an earlier day"
        if name is not None:
            raise UsageError(f"The name '{wanted}' was given to other files on {when}, {other.path}.", f"Try --name {free}")
        reason = f"because '{wanted}' names other files, which were packed on {when}"
        return free, f"The zip is recorded as '{free}', {reason}. Choose a name with --name."

    def add(self, name: str, path: Path, sha256: str, track: int, files: Mapping[str, str], recipe: str = "") -> Packed:
        """Record a packed zip, unless the same is recorded under that name. Raises BadFileError."""
        known = next((each for each in self.records if (each.name, each.sha256) == (name, sha256)), None)
        if known is not None:
            return known
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        packed = Packed(name, str(path), sha256, track, dict(files), now, recipe)
        append_line(self.path, dataclasses.asdict(packed))
        self.records += (packed,)
        return packed

    def _other(self, name: str, files: Mapping[str, str]) -> Packed | None:
        """The latest record of that name with other files than these."""
        same_name = (each for each in reversed(self.records) if each.name == name)
        return next((each for each in same_name if dict(each.files) != dict(files)), None)


@dataclass(frozen=True)
class Known:
    """What the records say about a file by its hash, newest first.

    results: its evaluations. packed: the zips that held it; for a zip, the records of itself.
    """

    file: str
    sha256: str
    results: tuple[Result, ...] = ()
    packed: tuple[Packed, ...] = ()

    @property
    def recipe(self) -> str:
        """The recipe that made the file; "" if none is known."""
        paths = (*(find_recipe(each.source, self.sha256) for each in self.results), *(each.recipe for each in self.packed))
        return next(filter(None, paths), "")

    def sentences(self) -> list[str]:
        """What is known, for people."""
        texts = []
        for each in self.results:
            verdict = "official" if each.official else "not official"
            texts.append(
                f"{self.file} was evaluated on {_day(each.date)} as '{each.name}': {100 * each.mean:.2f} % on {each.dataset}, "
                f"{verdict}, E = {each.epochs_setting}."
            )
        for packed in self.packed:
            texts.append(f"{self.file} was packed on {_day(packed.date)} as '{packed.name}' into {packed.path}.")
        if not texts:
            texts.append(f"{self.file} is in none of the records: it was neither evaluated nor packed as it is.")
        return texts + ([f"{self.file} was made by the recipe {self.recipe}."] if self.recipe else [])


def require_name(name: str | None) -> None:
    """Raise UsageError for what cannot be the name of a zip. None stands for a name that ddkit chooses."""
    if name is not None and (not name.strip() or not name.isprintable()):
        raise UsageError(f"{name!r} cannot be a name.", "Give it letters: --name my-entry")


def known_files(hashes: Mapping[str, str], results: Sequence[Result], packed: Sequence[Packed]) -> tuple[Known, ...]:
    """What the records say about these files, by name -> SHA-256, in their order."""
    return tuple(
        Known(
            name,
            sha256,
            tuple(each for each in reversed(results) if each.sha256 == sha256),
            tuple(each for each in reversed(packed) if sha256 in (each.sha256, *each.files.values())),
        )
        for name, sha256 in hashes.items()
    )


def find_recipe(source: str | os.PathLike[str], sha256: str) -> str:
    """The path of the recipe that says how the set at `source` was made; "" if there is none.

    It lies next to the set, under the set's own name or as recipe.toml, or one folder above, and names the set's hash.
    """
    path = Path(source)
    # A folder such as "." or "/" has no name to change the ending of.
    places = (path.parent / f"{path.stem}.toml", path.parent / RECIPE_FILE, path.parent.parent / RECIPE_FILE)
    return next((str(place) for place in places if sha256 and _names_hash(place, sha256)), "")


def _names_hash(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and path.stat().st_size <= _LARGEST_RECIPE and sha256.encode() in path.read_bytes()
    except OSError:
        return False


def _day(date: str) -> str:
    return date[:10] or "an unknown day"
