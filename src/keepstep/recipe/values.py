"""What a field takes: a value of YAML or a flag's text, read as the field's type says.

As TRL's own parser takes it (trl 1.16), where that takes it; what it takes without a look, and a
library trips over later, is refused here: YAML's values, which argparse does not check, and a
scalar for a list, which would be taken letter by letter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import date
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl.scripts._hf_argparser import string_to_bool

# A number, or one word in its place: argparse knows of no such type but `float | str`.
WORDS = {"save_interval_seconds": "auto"}
FILES = ("accelerator_config", "deepspeed", "fsdp_config")  # a mapping, or the path of a JSON file


def kinds_of(hint: Any) -> list[Any]:
    """The types that a field's annotation is made of."""
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def takes_several(hint: Any) -> bool:
    """Whether a flag is followed by one value or more."""
    return any(get_origin(kind) is list for kind in kinds_of(hint))


def takes(hint: Any, kind: type) -> bool:
    """Whether values of this type are among those that a field holds."""
    return kind in kinds_of(hint)


def read(field: Field[Any], hint: Any, value: Any) -> Any:
    """What the field holds when the recipe says `value`.

    Raises:
        ValueError: it is no value of the field's type; says what it is instead.
    """
    kinds = kinds_of(hint)
    if field.name in WORDS:
        kinds = [Literal[WORDS[field.name]] if kind is str else kind for kind in kinds]
    if value is None or _says_none(value, kinds):
        if NoneType in kinds or field.default is None:
            return None
        raise ValueError("it is empty")
    choices = _choices(field, kinds)
    if choices:
        return _one_of(value, choices)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    mappings = [kind for kind in kinds if kind is dict or get_origin(kind) is dict]
    if lists:
        (item,) = get_args(lists[0])
        words = isinstance(item, type) and issubclass(item, Enum)
        if words and isinstance(value, str):
            value = value.split()
        if isinstance(value, list) or str not in kinds:
            listed = value if isinstance(value, list) else [value]
            found = [_read_one([item], each) for each in listed]
            return found[0] if len(found) == 1 and str in kinds and not words else found
    elif mappings and field.name not in FILES:
        kinds = [kind for kind in kinds if kind is not str]
    return _read_one(kinds, value)


def _says_none(value: Any, kinds: list[Any]) -> bool:
    """As a flag says it; for text it is a word like others (`report_to: none`)."""
    texts = any(kind is str or get_origin(kind) in (list, dict) for kind in kinds)
    return isinstance(value, str) and value.lower() in ("none", "null") and not texts


def _choices(field: Field[Any], kinds: list[Any]) -> list[Any]:
    named = field.metadata.get("choices")
    if named:
        return list(named)
    for kind in kinds:
        if get_origin(kind) is Literal and len(kinds) == 1:
            return list(get_args(kind))
        if isinstance(kind, type) and issubclass(kind, Enum):
            return [member.value for member in kind]
    return []


def _one_of(value: Any, choices: list[Any]) -> Any:
    if value is False and "no" in choices:  # YAML reads a bare `no` so
        return "no"
    if isinstance(value, Enum):
        value = value.value
    if value not in choices:
        raise ValueError(f"{value!r} is none of: {', '.join(map(str, choices))}")
    return value


class _Other(Exception):
    """A value is not of this kind; of another one, maybe."""


def _read_one(kinds: list[Any], value: Any) -> Any:
    """As the first of the kinds that takes it: `2` is a number before it is a text."""
    order = (bool, int, float, str)
    for kind in sorted(kinds, key=lambda kind: order.index(kind) if kind in order else -1):
        try:
            return _reader(kind)(value)
        except _Other:
            continue
    raise ValueError(_refusal(kinds, value))


def _reader(kind: Any) -> Callable[[Any], Any]:
    simple = {bool: _boolean, int: _whole, float: _number, str: _text, dict: _mapping}
    if kind in simple:
        return simple[kind]
    if get_origin(kind) is dict:
        return lambda value: _mapping(value, *get_args(kind))
    if get_origin(kind) is Literal:
        return lambda value: _literal(value, get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return lambda value: _member(kind, value)
    return lambda value: _object(kind, value)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if not isinstance(value, str):
        raise _Other
    try:
        return bool(string_to_bool(value))
    except Exception as error:  # argparse's
        raise _Other from error


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise _Other
    try:
        number = float(value)
        if isinstance(value, (str, int)):
            try:
                return int(value)
            except ValueError:  # `1e3`
                pass
        if number.is_integer():
            return int(number)
    except (ValueError, TypeError, OverflowError) as error:
        raise _Other from error
    raise _Other


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise _Other
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise _Other from error
    if math.isnan(number):
        raise _Other
    return number


def _text(value: Any) -> str:
    if isinstance(value, date):  # a datetime, too
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _Other
    return str(value)


def _mapping(value: Any, names: Any = str, of: Any = Any) -> Any:
    """A mapping; of JSON, which transformers reads itself, the text (a flag has no other form)."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            found = json.loads(value)
        except json.JSONDecodeError as error:
            what = f"{value!r} is no JSON, which a flag takes: names and texts in double quotes"
            raise ValueError(f"{what} ({error})") from error
        if of is Any:
            return value.strip()
        value = found
    if not isinstance(value, Mapping):
        raise _Other
    if of is Any or of is None:
        return dict(value)
    found = {}
    for name, item in value.items():
        try:
            found[name] = _read_one([of], item)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def _literal(value: Any, allowed: tuple[Any, ...]) -> Any:
    if not any(value is one or (value == one and type(value) is type(one)) for one in allowed):
        raise _Other
    return value


def _member(kind: type[Enum], value: Any) -> Enum:
    try:
        return kind(value)
    except ValueError as error:
        known = ", ".join(str(member.value) for member in kind)
        raise ValueError(f"{value!r} is none of: {known}") from error


def _object(kind: Any, value: Any) -> Any:
    """A dataclass of the libraries, as `DatasetConfig`: its fields, or its first one alone."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise _Other
    known = {field.name: field for field in fields(kind) if field.init}
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _mapping(value, str, None)
    if isinstance(value, str):
        value = {next(iter(known)): value}
    if not isinstance(value, Mapping):
        raise _Other
    unknown = [str(name) for name in value if name not in known]
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; it has {', '.join(known)}")
    hints, found = get_type_hints(kind), {}
    for name, item in value.items():
        try:
            found[name] = read(known[name], hints[name], item)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    missing = [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and name not in found
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing")
    return kind(**found)


def _refusal(kinds: list[Any], value: Any) -> str:
    if isinstance(value, bool) and bool not in kinds:
        return f"{value!r} is not {_told(kinds)} (YAML reads a bare yes, no, on, off so: quote it)"
    if isinstance(value, float) and str in kinds:
        return f"{value!r} is a number to YAML, which keeps not all of its digits: quote it"
    return f"{value!r} is not {_told(kinds)}"


def _told(kinds: list[Any]) -> str:
    names = {bool: "true or false", int: "int", float: "float", str: "str"}
    if any(kind is dict or get_origin(kind) is dict for kind in kinds):
        return "a mapping, as in `{name: value}`"
    known = [names[kind] for kind in kinds if kind in names]
    words = [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if known and words:
        return f"a value of type {' or '.join(known)}, nor {' or '.join(words)}"
    if known == ["true or false"]:
        return known[0]
    return f"a value of type {' or '.join(known)}" if known else "what it takes"
