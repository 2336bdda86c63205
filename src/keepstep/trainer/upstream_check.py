"""Compares the table of foreign hooks (upstream.py) with the libraries that are installed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from types import CodeType, FunctionType, ModuleType
from typing import Any

from keepstep.errors import KeepstepError
from keepstep.trainer.upstream import CALLERS, HOOKS, SFT_TRAINER, TESTED, TRAINER, Hook


class UpstreamError(KeepstepError, ImportError):  # type: ignore[misc]  # its path is a str
    """Installed libraries that keepstep does not fit: which, what was expected, what was found."""


@dataclass(frozen=True)
class Fault:
    """A hook that is not as the table says.

    Attributes:
        library: whose it is.
        text: what was expected, what was found.
    """

    library: str
    text: str


def check(trainer: type, mixin: type) -> None:
    """Compare the table with the installed libraries, and with the Trainer that is extended.

    Args:
        trainer: a new class, made of `mixin` and of a Trainer.
        mixin: keepstep's part of it.

    Raises:
        UpstreamError: a hook is not there, takes other arguments, or is not called any more; or
            `mixin` comes after the Trainer, whose methods would then win.
    """
    faults = [*_order(trainer, mixin), *foreign_faults(), *override_faults(trainer)]
    if faults:
        raise UpstreamError(_told(faults))


def _order(trainer: type, mixin: type) -> Iterator[Fault]:
    """Python takes the first class that has a method."""
    base = resolve(TRAINER)
    for kind in trainer.__mro__[: trainer.__mro__.index(mixin)]:
        if issubclass(kind, base) and not issubclass(kind, mixin):
            text = f"class {trainer.__name__}: the methods of {kind.__name__} come before "
            text += f"{mixin.__name__}'s; expected: class {trainer.__name__}({mixin.__name__}, "
            yield Fault(_library(kind), f"{text}{kind.__name__})")
            return


def override_faults(trainer: type) -> Iterator[Fault]:
    """What keepstep overrides, in each class of another library that `trainer` is made of."""
    theirs = [k for k in trainer.__mro__ if not k.__module__.startswith("keepstep.")]
    code = {kind: words_by_function(kind) for kind in theirs}
    for hook in HOOKS:
        if hook.kind != "overridden" or hook.owner not in (TRAINER, SFT_TRAINER):
            continue
        owner = resolve(hook.owner)
        having = [k for k in theirs if hook.name in vars(k) and issubclass(k, resolve(TRAINER))]
        having = [kind for kind in having if kind is not trainer]
        if not issubclass(trainer, owner):
            continue
        if not having:
            text = f"expected {hook.signature}, to override it; found nothing of that name"
            yield Fault(hook.library, f"{hook.owner}.{hook.name}: {text}")
        for kind in having:
            fault = _signature_fault(hook, vars(kind)[hook.name])
            if fault is not None:
                place = f"{kind.__module__}.{kind.__qualname__}"
                yield Fault(_library(kind), f"{place}.{hook.name}: {fault}")
        callers = (w for f in code.values() for name, w in f.items() if name != hook.name)
        if having and hook.called and not any(hook.name in words for words in callers):
            text = "expected that the library calls it; nothing in it does any more"
            yield Fault(hook.library, f"{hook.owner}.{hook.name}: {text}")


@cache
def foreign_faults() -> tuple[Fault, ...]:
    """All the others: what is called, replaced and read, whoever does it."""
    return tuple(
        Fault(hook.library, f"{hook.owner}.{hook.name}: {fault}")
        for hook in HOOKS
        if hook.kind != "overridden" or hook.owner not in (TRAINER, SFT_TRAINER)
        if (fault := foreign_fault(hook)) is not None
    )


def foreign_fault(hook: Hook) -> str | None:
    """What is not as the table says; None: it is."""
    try:
        owner = resolve(hook.owner)
    except (ImportError, AttributeError) as error:
        return f"expected {hook.owner}; found nothing of that name ({error})"
    if hook.kind in ("read", "replaced") and not hook.parameters:
        declared = getattr(owner, "__annotations__", {})
        known = hook.kind == "read" and hasattr(owner, hook.name)
        if known or hook.name in declared or hook.name in words_of(owner):
            return None
        return "expected an attribute of that name; the code there does not speak of any"
    if not hasattr(owner, hook.name):
        return f"expected {hook.signature}; found nothing of that name"
    caller = CALLERS.get(hook.owner)
    if hook.kind == "overridden" and caller and hook.name not in words_of(resolve(caller)):
        return f"expected that {caller} calls it; nothing there does any more"
    return _signature_fault(hook, inspect.getattr_static(owner, hook.name))


def _signature_fault(hook: Hook, found: Any) -> str | None:
    """Whether its first parameters are those that keepstep names, or counts on by position."""
    if not hook.parameters:
        return None
    parameters = [
        p for p in inspect.signature(_function(found)).parameters.values() if p.name != "self"
    ]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    passes_on = any(p.kind == p.VAR_POSITIONAL for p in parameters)  # to what it overrides itself
    expected = list(hook.parameters)
    if passes_on:
        expected = expected[: len(named)]
    if named[: len(expected)] == expected:
        return None
    return f"expected {hook.signature}; found ({', '.join(p.name for p in parameters)})"


def resolve(place: str) -> Any:
    """The module, or the class of one, that a dotted name stands for.

    Raises:
        ImportError, AttributeError: there is none.
    """
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        module, _, name = place.rpartition(".")
        if error.name != place:
            raise
        return getattr(importlib.import_module(module), name)


def words_by_function(owner: Any) -> dict[str, set[str]]:
    """The functions of a class (without its bases) or of a module → the names in their code."""
    found = {}
    for name, member in vars(owner).items():
        function = _function(member)
        if type(function) is FunctionType:  # not `isinstance`, which asks a deprecated name
            found[name] = set(_words(function.__code__))
    return found


def words_of(owner: Any) -> set[str]:
    """The names in the code of a class (with its bases), or of a module (with its classes)."""
    kinds = owner.__mro__ if isinstance(owner, type) else [owner]
    if isinstance(owner, ModuleType):
        inside = (k for k in vars(owner).values() if issubclass(type(k), type))
        kinds = [owner, *(k for k in inside if k.__module__ == owner.__name__)]
    return {word for kind in kinds for words in words_by_function(kind).values() for word in words}


def _function(member: Any) -> Any:
    """What a property, a class method or a decorated function is made of."""
    if type(member) is property:
        member = member.fget
    elif type(member) in (classmethod, staticmethod):
        member = member.__func__
    return inspect.unwrap(member) if type(member) is FunctionType else member


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words(constant)


def _library(kind: type) -> str:
    return kind.__module__.split(".")[0]


def _told(faults: list[Fault]) -> str:
    """All of it at once, and what to do."""
    lines = ["keepstep does not fit what is installed:"]
    for fault in dict.fromkeys(faults):
        installed = f" {version(fault.library)}" if fault.library in TESTED else ""
        lines.append(f"  {fault.library}{installed}: {fault.text}")
    tested = [f"{n}=={TESTED[n]}" for n in sorted({f.library for f in faults} & TESTED.keys())]
    if tested:
        lines.append(f"    Hint: these are tested: pip install {' '.join(tested)}")
    return "\n".join(lines)
