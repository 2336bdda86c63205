"""What may be believed of a text that lies in a run folder. Pure: no disk, no torch.

Bits flip, and anybody may have written there. So JSON is read without what it leaves open (names
given twice, NaN, numbers and depths without end), values have the types that are asked for, file
names stay in their folder, and a line carries a check of itself.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from operator import itemgetter
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from keepstep.errors import KeepstepError

LONGEST_NUMBER = 25  # digits and sign; counts of bytes have 20
DEEPEST = 20
LONGEST_NAME = 1024  # bytes of a path
LONGEST_PART = 255  # bytes of what is between two slashes: the file systems' own bound
CHECK = "check"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# A component is neither `.` nor `..`, and has no backslash and no control character.
PART = r"(?!\.{1,2}(?:/|\Z))[^/\\\x00-\x1f\x7f-\x9f]+"
NAME = re.compile(rf"(?![A-Za-z]:){PART}(?:/{PART})*")
CHECKED = re.compile(r'(\{.+), "([^"]*)": "([0-9a-f]{8})"\}', re.DOTALL)


class TextError(KeepstepError, ValueError):
    """A text that is not what it should be; says what is wrong with it."""


class UnknownFieldError(TextError):
    """There is more in it than this version knows, and nothing is missing."""


def parse(text: str) -> Any:
    """JSON, and nothing that other readers may take for something else.

    Raises:
        TextError: a name twice, NaN or infinity, half a surrogate pair, endless numbers or depth,
            something behind the end, or no JSON at all.
    """
    try:
        values = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse,
            parse_float=_float,
            parse_int=_int,
        )
        if SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()
        return values
    except TextError:
        raise
    except UnicodeEncodeError as error:
        raise TextError("half a surrogate pair") from error
    except RecursionError as error:
        raise TextError("it is nested too deep") from error
    except ValueError as error:
        raise TextError(str(error)) from error


def build(kind: Any, value: Any, what: str = "") -> Any:
    """`value`, of parsed JSON, as `kind`: a plain type, a dataclass, or a container of such.

    Args:
        what: names the value in an error.

    Raises:
        UnknownFieldError: a dataclass would have to have more fields.
        TextError: it is of another type.
    """
    try:
        return _reader(kind)(value)
    except _Misfit as misfit:
        raise misfit.told(what) from None


def name_fault(name: str) -> str | None:
    """Why this is no name of a file below a folder: relative, normal, of bounded length; None: it
    is one."""
    if NAME.fullmatch(name) is None:
        return f"{shown(name)} is no name of a file in its folder"
    if len(name) > LONGEST_PART:
        longest = max(len(part.encode()) for part in name.split("/"))
        if longest > LONGEST_PART or len(name.encode()) > LONGEST_NAME:
            return f"{shown(name)} is too long for a file's name"
    return None


def names_fault(names: Iterable[str]) -> str | None:
    """Why these cannot be names of different files below one folder; None: they can."""
    known: set[str] = set()
    folders: set[str] = set()
    for name in names:
        fault = name_fault(name)
        if fault is not None:
            return fault
        normal = name if name.isascii() else unicodedata.normalize("NFC", name)
        if normal in known:
            return f"{shown(name)} is there twice"
        known.add(normal)
        while (normal := normal.rpartition("/")[0]) and normal not in folders:
            folders.add(normal)
    both = sorted(known & folders)
    return f"{shown(both[0])} is a file and a folder" if both else None


def shown(text: str) -> str:
    """A foreign text as a message holds it: quoted, escaped, not too long."""
    return repr(text if len(text) <= 80 else f"{text[:60]}…{text[-15:]}")


def with_check(line: str) -> str:
    """A JSON object on one line, with a check of itself as its last field."""
    return f'{line[:-1]}, "{CHECK}": "{zlib.crc32(line.encode()):08x}"}}'


def checked(line: str) -> tuple[dict[str, Any], bool]:
    """The object on a line, and whether it carries a check (an older version's does not).

    Raises:
        TextError: the line is not what was written.
    """
    match = CHECKED.fullmatch(line)
    if match is not None:  # of whatever name: that may be what has changed
        body, name, check = match.groups()
        if name != CHECK or int(check, 16) != zlib.crc32(f"{body}}}".encode()):
            raise TextError("its check differs")
        line = f"{body}}}"
    values = parse(line)
    if not isinstance(values, dict):
        raise TextError(f"it is {_kind(values)}, no object")
    if CHECK in values:
        raise TextError("its check differs")
    return values, match is not None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise TextError(f"{shown(max(names, key=names.count))} is there twice")
    return found


def _refuse(text: str) -> None:
    raise TextError(f"{text} is no number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise TextError(f"{shown(text)} is no finite number")
    return value


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise TextError(f"{shown(text)} is beyond all counts")
    return int(text)


Reader = Callable[[Any], Any]


class _Misfit(Exception):
    """A value of another type, on its way out to where its name is known. (To name each of the
    hundred thousand values of some manifests ahead takes longer than to read them.)"""

    def __init__(self, text: str, error: type[TextError] = TextError) -> None:
        super().__init__(text)
        self._text, self._error = text, error
        self._names: list[str] = []

    def within(self, name: str) -> _Misfit:
        """The same, of what has this name in the value around it."""
        self._names.append(name)
        return self

    def told(self, what: str) -> TextError:
        """The error, of a value that is called `what`."""
        names = [*([what] if what else []), *reversed(self._names)]
        return self._error(f"{'.'.join(names) or 'it'} {self._text}")


@cache
def _reader(kind: Any) -> Reader:
    """What makes values into `kind`. Made once for each: thousands of manifests are read."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _anything
    if kind is float:
        return _number
    if kind in (int, str, bool):
        return _plain(kind)
    if is_dataclass(kind):
        return _fields(kind)
    if origin in (dict, Mapping):
        return _mapping(_reader(arguments[1]))
    if origin is Literal:
        return _one_of(arguments)
    if NoneType in arguments:
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return _optional(_reader(other))
    if origin is tuple:
        return _sequence(arguments)
    raise NotImplementedError(f"{kind} is not read from JSON")


def _plain(kind: type) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is not kind:  # a bool is no int here
            raise _Misfit(f"is {_kind(value)}, not {kind.__name__}")
        return value

    return read


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _Misfit(f"is {_kind(value)}, not a number")
    return float(value)


def _optional(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


def _one_of(choices: tuple[Any, ...]) -> Reader:
    def read(value: Any) -> Any:
        if value not in choices:
            raise _Misfit(f"is none of {', '.join(map(str, choices))}")
        return value

    return read


def _mapping(read: Reader) -> Reader:
    def read_all(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise _Misfit(f"is {_kind(value)}, not an object")
        found, name = {}, ""
        try:
            for name, entry in value.items():
                found[name] = read(entry)
        except _Misfit as misfit:
            raise misfit.within(name) from None
        return found

    return read_all


def _sequence(kinds: tuple[Any, ...]) -> Reader:
    """`tuple[X, ...]`, or `tuple[X, Y]`."""
    endless = len(kinds) == 2 and kinds[1] is Ellipsis
    readers = [_reader(kind) for kind in kinds if kind is not Ellipsis]

    def read(value: Any) -> tuple[Any, ...]:
        listed = type(value) in (list, tuple)
        if not listed or not (endless or len(value) == len(readers)):
            raise _Misfit(f"is {_kind(value)}, not a list of that length")
        of_each = readers * len(value) if endless else readers
        return tuple([reads(entry) for reads, entry in zip(of_each, value, strict=True)])

    return read


def _fields(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    readers = {f.name: _reader(hints[f.name]) for f in fields(kind)}
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _Misfit(f"is {_kind(value)}, not an object")
        if value.keys() != readers.keys():
            missing = [name for name in needed if name not in value]
            if missing:
                raise _Misfit(f"has no {missing[0]}")
            unknown = value.keys() - readers.keys()
            if unknown:
                raise _Misfit(f"has a field {shown(min(unknown))}", UnknownFieldError)
        found, name = {}, ""
        try:
            for name, entry in value.items():
                found[name] = readers[name](entry)
        except _Misfit as misfit:
            raise misfit.within(name) from None
        return kind(**found)

    plain = [hints[name] for name in readers if hints[name] in (int, str, bool)]
    return _at_once(kind, list(readers), plain, read) if len(plain) == len(readers) > 1 else read


def _at_once(kind: Any, names: list[str], kinds: list[type], one_by_one: Reader) -> Reader:
    """The same where all fields are plain, as those of a file are: a manifest has thousands."""
    of_fields = itemgetter(*names)

    def read(value: Any) -> Any:
        if type(value) is dict and len(value) == len(names):
            try:
                entries = of_fields(value)
            except KeyError:
                return one_by_one(value)
            if list(map(type, entries)) == kinds:
                return kind(*entries)
        return one_by_one(value)

    return read


def _anything(value: Any, depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise _Misfit("is nested too deep")
    if isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            _anything(entry, depth + 1)
    return value


def _kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return shown(value) if isinstance(value, str) else str(value)
