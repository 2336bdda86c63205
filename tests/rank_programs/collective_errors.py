"""What each rank hears of an error: collective_errors.py CASE. Every rank says it in one line."""

from __future__ import annotations

import errno
import os
import sys
import threading
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from keepstep.policy.selection import SelectionError
from keepstep.ranks import collectives
from keepstep.ranks.carried_error import rank_of
from keepstep.ranks.collectives import any_of, on_all, on_main
from keepstep.recipe.problems import ConfigError, Problem
from keepstep.save.failure import Cause, SaveError

WHAT = "trying"


class TwoWordsError(ValueError):
    """Cannot be pickled as most errors are: its arguments are not those of its `__init__`."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")
        self.second = second


@dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses every attribute, Python's own among them."""

    text: str


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("an error that cannot be told")


def unpicklable() -> NoReturn:
    class LocalError(OSError):
        """Other processes do not have it."""

    raise LocalError("of a function")


def raise_(error: BaseException) -> NoReturn:
    raise error


def with_a_lock() -> NoReturn:
    error = TwoWordsError("one", "two")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


full = errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file"
cause = Cause(1, "no space", "OSError", errno.ENOSPC)
ERRORS = {
    "selection": lambda: raise_(SelectionError("there is no step 3")),
    "full": lambda: raise_(OSError(*full)),
    "two-words": lambda: raise_(TwoWordsError("one", "two")),
    "with-a-lock": with_a_lock,
    "save": lambda: raise_(SaveError("checkpoint-3 was not saved", [cause], 3)),
    "config": lambda: raise_(ConfigError([Problem("a"), Problem("b")])),
    "key": lambda: raise_(KeyError("name")),
    "frozen": lambda: raise_(FrozenError("cold")),
    "unpicklable": unpicklable,
    "silent": lambda: raise_(SilentError()),
    "value": threading.Lock,
    "interrupt": lambda: raise_(KeyboardInterrupt()),
    "exit": lambda: raise_(SystemExit(3)),
}


def told(error: BaseException) -> str:
    attributes = [
        f"{name}={getattr(error, name)}"
        for name in ("errno", "filename", "second", "step", "ranks", "disk_full", "code")
        if getattr(error, name, None) not in (None, ())
    ]
    if isinstance(error, ConfigError):
        attributes.append(f"problems={len(error.problems)}")
    notes = [note.split(" on ")[0] for note in getattr(error, "__notes__", [])]
    return f"{type(error).__name__} | {error} | {' '.join(attributes)} | {rank_of(error)} {notes}"


def say(text: str) -> None:
    os.write(1, f"rank {collectives.rank()}: {text}\n".encode())


case = sys.argv[1]
dist.init_process_group("gloo")
rank, last = collectives.rank(), collectives.world_size() - 1
fail = ERRORS.get(case, lambda: raise_(AssertionError(f"no case {case}")))
try:
    value = on_main(WHAT, fail)
    say(f"main: no error, {type(value).__name__}")
except BaseException as error:
    say(f"main: {told(error)}")
try:
    got = on_all(WHAT, fail if rank == last else lambda: rank)
    say(f"last: no error, {type(got).__name__}")
except BaseException as error:
    say(f"last: {told(error)}")
try:
    on_all(WHAT, fail)
    say("all: no error")
except BaseException as error:
    say(f"all: {told(error)}")
say(f"then {on_main(WHAT, lambda: 7)} {on_all(WHAT, lambda: rank)} {any_of(rank == last, False)}")
assert torch.equal(on_main(WHAT, lambda: torch.arange(3)), torch.arange(3))
collectives.leave()
