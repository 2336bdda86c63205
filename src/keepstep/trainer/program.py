"""What a function or an object that a script gives is known by, when a resume compares it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any

import xxhash

# Their versions are in every manifest: what they bring along is known by its name.
LIBRARIES = ("accelerate", "datasets", "keepstep", "peft", "torch", "transformers", "trl")
PLAIN = (bool, int, float, str, type(None))


def known_by(given: Any) -> str | None:
    """A function's name and a digest of what it does; of an object that is called, of its class
    and its plain attributes.

    What others lie in (a function that it calls, a file that it reads) is not looked at. Comments,
    blank lines and the place of a function change nothing, where its source can be read.

    Args:
        given: a function, an object that can be called, or None.

    Returns:
        As in `loss, 0f3a…`; the name alone of what a library brings along; None for None.
    """
    if given is None:
        return None
    kind, name = _kind(given), called(given)
    ours = (kind.__module__ or "").split(".")[0] not in LIBRARIES
    told = [_source_of(kind)] if ours else []
    if ours or given is not kind:  # a library's own function has only its own defaults
        told += [fact for fact in _facts(given) if fact]
    return f"{name}, {xxhash.xxh3_64_hexdigest(repr(told).encode())}" if told else name


def called(given: Any) -> str | None:
    """A function's name, or the class of an object; None for None."""
    return None if given is None else str(_kind(given).__qualname__)


def _kind(given: Any) -> Any:
    function = given.func if isinstance(given, partial) else given
    return function if hasattr(function, "__qualname__") else type(function)


def _facts(given: Any) -> Iterator[Any]:
    """The plain values that it was made with: arguments, a closure's variables, attributes."""
    if isinstance(given, partial):
        yield [value for value in given.args if isinstance(value, PLAIN)]
        yield _plain(given.keywords)
    elif isinstance(given, FunctionType):
        yield [v for v in (given.__defaults__ or ()) if isinstance(v, PLAIN)]
        names, cells = given.__code__.co_freevars, given.__closure__ or ()
        yield _plain(dict(_filled(zip(names, cells, strict=True))))
    elif hasattr(given, "__dict__"):
        yield _plain(vars(given))


def _filled(cells: Iterable[tuple[str, CellType]]) -> Iterator[tuple[str, Any]]:
    """The closure's variables that have a value by now."""
    for name, cell in cells:
        try:
            yield name, cell.cell_contents
        except ValueError:  # it is assigned further down in the function around it
            continue


def _plain(values: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted((n, v) for n, v in values.items() if isinstance(v, PLAIN))


def _source_of(kind: Any) -> str:
    """Its source as Python reads it; its bytecode where there is no source."""
    try:
        text = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return repr(list(_bytecode(getattr(kind, "__code__", None))))
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:  # a lambda in the middle of an expression
        return text.strip()


def _bytecode(code: CodeType | None) -> Iterator[Any]:
    if code is None:
        return
    yield from (code.co_code, code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _bytecode(constant)
        elif isinstance(constant, frozenset):  # in another order in every process
            yield sorted(map(repr, constant))
        else:
            yield constant
