"""Decisions taken once and heard by every rank; errors of one rank made everybody's error.

Everything here works without a process group too: then there is one rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class RankError(RuntimeError):
    """An error that another rank met, by the name of what it was doing."""


def is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_gloo() -> bool:
    """Whether ranks talk over gloo: processes on CPU."""
    return is_grouped() and dist.get_backend() == "gloo"


def rank() -> int:
    """This process's number; before the group exists, what the launcher said."""
    return dist.get_rank() if is_grouped() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if is_grouped() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank.

    Ranks: all (collective). `value` is pickled: keep it small.
    """
    if not is_grouped():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main_process(what: str, action: Callable[[], T]) -> T:
    """Run `action` on the main process; every rank gets its value, or its error.

    Ranks: all (collective). The other ranks wait here: without the broadcast an error on the main
    process would leave them waiting at the next collective until the backend's time-out.

    Raises:
        Exception: on the main process, what `action` raised; RankError elsewhere, naming `what`.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if is_main():
        try:
            outcome[0] = action()
        except Exception as caught:
            error = caught
            outcome[1] = f"{what} failed on the main process: {type(caught).__name__}: {caught}"
    if is_grouped():
        dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RankError(outcome[1])
    value: T = outcome[0]
    return value


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on one rank. Ranks: all (collective), a few bytes."""
    if not is_grouped():
        return list(flags)
    device = "cpu" if is_gloo() else torch.accelerator.current_accelerator()
    total = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in total.tolist()]


def collectives() -> int:
    """How many collectives this rank has entered, in all its groups; 0 where it is not counted.

    Ranks: any, any thread. (torch 2.13: gloo and NCCL count them; nothing public tells.)
    """
    count, groups = 0, list[Any](dist.distributed_c10d._world.pg_map) if is_grouped() else []
    for group in groups:
        with contextlib.suppress(AttributeError, RuntimeError):  # another backend, another torch
            count += group._get_sequence_number_for_group()
    return count


def leave() -> None:
    """Destroy the process group; an exit with a live group sometimes ends in SIGABRT."""
    if is_grouped():
        dist.destroy_process_group()
