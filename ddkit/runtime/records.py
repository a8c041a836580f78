"""Records: JSON values as the dataclass that describes them, checked against its type hints, and changes to its fields."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from ddkit.errors import BadFileError, UsageError, did_you_mean

Count = Annotated[int, range(2**63)]
"""A whole number that is not negative; a field's second argument of Annotated holds the values that are allowed."""

_Record = TypeVar("_Record")


def read_record(kind: type[_Record], value: object) -> _Record:
    """The dataclass `kind` of which `dataclasses.asdict`, and perhaps JSON, made `value`.

    Fields may be bool, int, float, str, None, Any, tuples, mappings, other such dataclasses, and unions and Annotated of
    these. Lists become tuples; numbers must fit into 64 bits, and text into UTF-8.
    Raises BadFileError that names the fields that are unknown, offering the nearest name, missing or of another type.
    """
    if not isinstance(value, dict):
        raise BadFileError("not a JSON object")
    hints, fields = _hints(typing.cast(Any, kind)), dataclasses.fields(typing.cast(Any, kind))
    if unknown := sorted(value.keys() - hints.keys()):
        raise BadFileError(f"unknown fields {', '.join(unknown)}", did_you_mean(unknown[0], tuple(hints)))
    required = {field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING}
    if missing := sorted(required - value.keys()):
        raise BadFileError(f"fields missing: {', '.join(missing)}")
    found = {}
    for name, item in value.items():
        try:
            found[name] = _converted(hints[name], item)
        except ValueError:
            raise BadFileError(f"{name} cannot be {json.dumps(item, default=str):.60}") from None
        except BadFileError as error:
            raise BadFileError(f"{name}: {error.message}", error.remedy) from None
    return kind(**found)


def override(config: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with some fields changed, also those of dataclasses in it.

    settings: values by dotted name, such as {"denoiser_optimizer.steps": 500}.
    Raises UsageError for an unknown name or a value that its class refuses.
    """
    known = tuple(f.name for f in dataclasses.fields(config))
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in settings.items():
        name, _, rest = path.partition(".")
        if name not in known:
            raise UsageError(f"{type(config).__name__} has no setting '{name}'.", did_you_mean(name, known))
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            changes[name] = value
    for name, inner in nested.items():
        changes[name] = override(changes.get(name, getattr(config, name)), inner)
    return dataclasses.replace(config, **changes)


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names, such as "pool.size"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{inner}": kept for inner, kept in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Lines such as "objective.prediction: v, not flow" for each setting in which `theirs` differs from `ours`."""
    mine, other = flatten(ours), flatten(theirs)
    return [f"{name}: {other.get(name)}, not {mine.get(name)}" for name in mine | other if mine.get(name) != other.get(name)]


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _converted(hint: Any, value: Any) -> Any:
    """The value as its hint describes it. Raises ValueError if it is of another type."""
    if type(value) is hint and hint is float:  # most of a record's values
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if (value := _converted(arguments[0], value)) in arguments[1]:
            return value
    elif origin in (typing.Union, types.UnionType):
        for each in arguments:
            try:
                return _converted(each, value)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(_converted(each, item) for each, item in zip(kinds, value, strict=True))
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _converted(arguments[1], item) for key, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return read_record(typing.cast(type, hint), value)
    elif hint is Any or (hint is type(None) and value is None):
        return value
    elif type(value) is hint is str:
        value.encode()  # a UnicodeEncodeError, which is a ValueError, for half characters, which JSON can hold
        return value
    elif type(value) is hint or (hint is float and type(value) is int):
        if isinstance(value, bool) or abs(value) < 2**63:
            return value
    raise ValueError
