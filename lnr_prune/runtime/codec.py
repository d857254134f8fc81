"""Strict reading of JSON: it fits a dataclass's types, or an error names the place; nothing is guessed."""

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from lnr_prune.errors import PlanError

LARGEST = 64 * 2**20  # characters of JSON
Kind = TypeVar("Kind")


def parsed(text: str) -> Any:
    """Plain data from JSON text.

    Raises:
        PlanError: If the text is not JSON, is far too long, or has an entry twice.
    """
    if len(text) > LARGEST:
        raise PlanError(f"its record has {len(text):,} characters, expected at most {LARGEST:,}")
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"its record is not JSON: {error}") from error


def typed(value: Any, kind: type[Kind], where: str = "the record", tensors: Sequence[Tensor] = ()) -> Kind:
    """The dataclass that plain data describes.

    Its fields may be mappings, tuples, unions with None, strings, numbers, tensors, and dataclasses of all these.
    Control characters in strings, which a terminal might obey, are replaced.

    Args:
        value: The plain data.
        kind: The dataclass, or any other type that its fields may have.
        where: What errors call the data.
        tensors: The tensors; where a field is a tensor, the data has its index in this sequence.

    Raises:
        PlanError: If something is missing, unknown, or of another type.
    """
    record: Kind = _typed(value, kind, where, tensors)
    return record


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} appears twice")
    return entries


def _typed(value: Any, hint: Any, where: str, tensors: Sequence[Tensor]) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _dataclass(_as(dict, value, where), hint, where, tensors)
    if origin in (Union, types.UnionType):
        (some,) = (option for option in inner if option is not type(None))
        return None if value is None else _typed(value, some, where, tensors)
    if origin is tuple:
        entries = _as(list, value, where)
        if inner[1:] != (...,) and len(entries) != len(inner):
            raise PlanError(f"{where} has {len(entries)} entries, expected {len(inner)}")
        each = inner[:1] * len(entries) if inner[1:] == (...,) else inner
        return tuple(
            _typed(entry, part, f"{where}[{i}]", tensors)
            for i, (entry, part) in enumerate(zip(entries, each, strict=True))
        )
    if origin in (Mapping, dict):
        key, part = inner
        return {
            _key(name, key, where): _typed(entry, part, f"{where}[{shown(name)}]", tensors)
            for name, entry in _as(dict, value, where).items()
        }
    if hint is str:
        return "".join(
            c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in _as(str, value, where)
        )
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise PlanError(f"{where} is an int of {value.bit_length()} bits, expected at most 63")
    if hint is float and type(value) is int:
        return float(value)
    if hint is Tensor:
        number = _as(int, value, where)
        if not 0 <= number < len(tensors):
            raise PlanError(f"{where} is tensor {number} of {len(tensors)}")
        return tensors[number]
    if hint not in (bool, int, float):
        raise TypeError(f"{where}: no way to read {hint}")
    return _as(hint, value, where)


def _dataclass(entries: dict[str, Any], kind: Any, where: str, tensors: Sequence[Tensor]) -> Any:
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    if unknown := entries.keys() - known.keys():
        raise PlanError(f"{where} has an unknown entry {shown(min(unknown))}")
    for name, field in known.items():
        if name not in entries and field.default is MISSING and field.default_factory is MISSING:
            raise PlanError(f"{where} lacks its entry {name!r}")
    return kind(**{name: _typed(entry, hints[name], f"{where}.{name}", tensors) for name, entry in entries.items()})


def _as(kind: type[Kind], value: Any, where: str) -> Kind:
    if type(value) is not kind:
        names = {dict: "an object", list: "a list", str: "a string", int: "an int", float: "a number", bool: "a bool"}
        raise PlanError(f"{where} is {shown(value)}, expected {names[kind]}")
    return value


def _key(name: str, kind: type, where: str) -> Any:
    if kind is int:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise PlanError(f"{where} has an entry {shown(name)}, expected an int as its name")
        return int(name)
    return _typed(name, kind, where, ())


def shown(value: Any) -> str:
    """A value as errors show it, always short."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
