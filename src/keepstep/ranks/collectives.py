"""Decisions taken once and heard by every rank; errors of one rank made everybody's error.

Everything here goes over the control group, from host to host: no rank waits for its device. What
is told where nobody has anything to say is a flag, whatever the number of ranks. Everything works
without a process group too: then there is one rank.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from keepstep.ranks import control_group
from keepstep.ranks.carried_error import CarriedError

T = TypeVar("T")
NOTE = "keepstep/note/"  # how the names begin of what ranks write down in the process group's store


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

    Ranks: all (collective). `value` is pickled: keep it small. Every rank gets as many bytes as
    all of them have: for what few ranks have to tell there is `gather_some`.
    """
    if not is_grouped():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=control_group.group())
    return values


def gather_some(value: T | None) -> dict[int, T]:
    """What the ranks that have something to tell (not None) tell, by rank, on every rank.

    Ranks: all (collective). As long as nobody has, it is one flag.
    """
    (some,) = any_of(value is not None)
    told = gather(value) if some else []
    return {number: one for number, one in enumerate(told) if one is not None}


def on_main(what: str, fn: Callable[[], T]) -> T:
    """Run `fn` on the main process; every rank gets its value, or raises its error.

    Ranks: all (collective). The others wait here until it has come to an end, however it does:
    a KeyboardInterrupt or SystemExit of the main process is theirs, too.

    Args:
        what: is being done: a note of the error says it.
        fn: runs on the main process alone. Its value is pickled: keep it small.

    Returns:
        What `fn` returned.

    Raises:
        BaseException: on every rank, what `fn` raised: the same type with the same message.
        RankError: on every rank, in the place of an error that cannot be carried to the others.
    """
    return on_one(0, what, fn)


def on_one(number: int, what: str, fn: Callable[[], T]) -> T:
    """The same on another rank: `number`. Ranks: all (collective)."""
    if not is_grouped():
        return fn()
    value: Any = None
    own: BaseException | None = None
    sent: list[Any] = [None]
    if rank() == number:
        try:
            value = fn()
            sent[0] = pickle.dumps(value)
        except BaseException as error:  # else the others would wait for ever
            own = error
            sent[0] = CarriedError.of(error, rank())
    dist.broadcast_object_list(sent, src=number, group=control_group.group())
    if isinstance(sent[0], CarriedError):
        raise sent[0].error(what, rank(), own, named=False)
    told: T = value if rank() == number else pickle.loads(sent[0])
    return told


def on_all(what: str, fn: Callable[[], T]) -> T:
    """Run `fn` on every rank; the error of one is everybody's.

    Ranks: all (collective).

    Args:
        what: is being done: a note of the error says it.
        fn: runs on every rank. It enters a collective only where no rank can fail before that.

    Returns:
        This rank's own value.

    Raises:
        BaseException: on every rank, what the first that failed raised: the same type, the
            message with that rank's number (unless every rank met the same).
        RankError: on every rank, in the place of an error that cannot be carried to the others.
    """
    if not is_grouped():
        return fn()
    value: Any = None
    own: BaseException | None = None
    try:
        value = fn()
    except BaseException as error:  # else the others would wait for ever
        own = error
    failures = gather_some(None if own is None else CarriedError.of(own, rank()))
    if failures:
        texts = {carried.text for carried in failures.values()}
        alike = len(failures) == world_size() and len(texts) == 1
        raise failures[rank() if alike else min(failures)].error(what, rank(), own, named=not alike)
    result: T = value
    return result


def any_of(*flags: bool) -> list[bool]:
    """For each flag, whether it is true on one rank. Ranks: all (collective), a few bytes."""
    return ask(*flags)()


def total(value: float) -> float:
    """The sum over all ranks, in double precision. Ranks: all (collective)."""
    if not is_grouped():
        return value
    told = np.array([value], dtype=np.float64)
    dist.all_reduce(torch.from_numpy(told), group=control_group.group())
    return float(told[0])


def ask(*flags: bool, totals: Sequence[float] = ()) -> Callable[[], list[Any]]:
    """As `any_of`, but without waiting: the answer is fetched by calling what is returned.

    Ranks: all (collective); and all fetch it before they enter another collective of keepstep's
    that it decides on.

    Args:
        flags: as those of `any_of`.
        totals: finite numbers that are added up over all ranks, in double precision.

    Returns:
        What fetches the flags, and after them the sums: the same bits on every rank.
    """
    if not is_grouped():
        return lambda: [*flags, *totals]
    # Not a tensor's own methods: no reader has to ask whether one of them waits for the device.
    told = np.array([*flags, *totals], dtype=np.float64)
    work = dist.all_reduce(torch.from_numpy(told), group=control_group.group(), async_op=True)

    def answer() -> list[Any]:
        work.wait()
        count = len(flags)
        return [*(bool(flag > 0) for flag in told[:count]), *(float(n) for n in told[count:])]

    return answer


def leave_note(name: str, text: str) -> None:
    """Write something down that the main process may look for. Ranks: any; nobody waits for it."""
    if is_grouped():
        store: Any = dist.distributed_c10d._get_default_store()
        with contextlib.suppress(
            RuntimeError, OSError
        ):  # it ends with the main process: who looks?
            store.set(f"{NOTE}{name}", text)


def note(name: str) -> str | None:
    """What a rank has written down under this name; None: nothing yet. Ranks: the main
    process, with which the store ends."""
    if not is_grouped():
        return None
    store: Any = dist.distributed_c10d._get_default_store()
    return str(store.get(f"{NOTE}{name}").decode()) if store.check([f"{NOTE}{name}"]) else None


def count_entered() -> int:
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
        control_group.forget()
        dist.destroy_process_group()
