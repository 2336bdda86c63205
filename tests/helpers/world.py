"""Thousands of ranks in one process: a stand-in for the wire, and for nothing else.

Every rank is a thread that runs the real code, one at a time: from one collective to the next, rank
by rank. So what a rank takes (seconds, requests to the disk) is its own. What goes over the wire is
pickled as it would be, and counted. Ranks that are not `watched` are handed what another one has
unpickled: the same objects, made once instead of four thousand times.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist

from keepstep.ranks import collectives

T = TypeVar("T")
STACK_BYTES = 2**20


class World:
    """Ranks that run programs together.

    Attributes:
        size: how many there are.
        watched: those that unpickle for themselves.
        received: rank → bytes that the wire has brought it.
        seconds: rank → what its own code has taken, others' turns left out.
    """

    def __init__(self, size: int, watched: Sequence[int] = (0, 1)) -> None:
        self.size, self.watched = size, {rank for rank in watched if rank < size}
        self.received: Counter[int] = Counter()
        self.seconds: defaultdict[int, float] = defaultdict(float)
        self._here = threading.local()
        self._turns = [threading.Lock() for _ in range(size)]
        self._back = threading.Lock()
        for lock in (*self._turns, self._back):
            lock.acquire()  # free while it is somebody's turn
        self._began = 0.0
        self._entered: Counter[int] = Counter()
        self._brought: dict[int, list[Any]] = {}  # number of a collective → what ranks brought
        self._made: dict[object, Any] = {}
        self._errors: dict[int, BaseException] = {}

    def run(self, program: Callable[[int], T]) -> list[T]:
        """What the program returns on each rank, in rank order.

        Raises:
            BaseException: what the first rank that failed has raised.
        """
        results: dict[int, T] = {}
        over: set[int] = set()

        def work(rank: int) -> None:
            self._here.rank = rank
            try:
                self._await_turn()
                results[rank] = program(rank)
            except Abandoned:
                pass
            except BaseException as error:
                self._errors[rank] = error
            over.add(rank)
            self._end_turn()

        for state in (self._errors, self._entered, self._brought):
            state.clear()
        before = threading.stack_size(STACK_BYTES)
        threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in range(self.size)]
        try:
            with self._as_process_group():
                for thread in threads:
                    thread.start()
                while len(over) < self.size:  # one collective after the other
                    for rank in [rank for rank in range(self.size) if rank not in over]:
                        self._turns[rank].release()
                        self._back.acquire()
                    self._made.clear()
        finally:
            threading.stack_size(before)
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[min(self._errors)]
        return [results[rank] for rank in range(self.size)]

    @property
    def rank(self) -> int | None:
        """Whose code this thread runs; None: no rank's."""
        return getattr(self._here, "rank", None)

    def _await_turn(self) -> None:
        self._turns[self._here.rank].acquire()
        if self._errors:
            raise Abandoned("a rank has failed, and does not come to this collective")
        self._began = time.perf_counter()

    def _end_turn(self) -> None:
        self.seconds[self._here.rank] += time.perf_counter() - self._began
        self._back.release()

    def _exchange(self, given: Any) -> list[Any]:
        """A collective: what each rank has brought, in rank order."""
        rank = self._here.rank
        number, self._entered[rank] = self._entered[rank], self._entered[rank] + 1
        brought = self._brought.setdefault(number, [None] * self.size)
        brought[rank] = given
        self._end_turn()
        self._await_turn()
        if rank == self.size - 1:  # the last to look at it
            del self._brought[number]
        return brought

    def _number(self) -> int:
        """Of the collective that this rank came to last: the same on all that are in it."""
        return self._entered[self._here.rank]

    def _unpickled(self, key: object, make: Callable[[], Any]) -> Any:
        """What comes of something that every rank has received alike."""
        if self.rank in self.watched:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _all_gather_object(self, values: list[Any], value: Any, group: Any = None) -> None:
        brought = self._exchange(pickle.dumps(value))
        # (torch pads what each rank brings to the longest, and tells the lengths first.)
        self.received[self._here.rank] += self.size * (8 + max(map(len, brought)))
        values[:] = self._unpickled(self._number(), lambda: [pickle.loads(one) for one in brought])

    def _broadcast_object_list(
        self, values: list[Any], src: int = 0, group: Any = None, device: Any = None
    ) -> None:
        main = self._here.rank == src
        text = self._exchange(pickle.dumps(values) if main else None)[src]
        self.received[self._here.rank] += 0 if main else len(text)
        if not main:
            values[:] = self._loads(text)

    def _all_reduce(
        self,
        tensor: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        reduce: Any = {dist.ReduceOp.SUM: torch.sum, dist.ReduceOp.MAX: torch.amax}[op]
        brought = self._exchange(tensor.clone())
        self.received[self._here.rank] += tensor.nbytes
        tensor.copy_(self._unpickled(self._number(), lambda: reduce(torch.stack(brought), 0)))
        return SimpleNamespace(wait=lambda: None) if async_op else None

    def _loads(self, text: bytes) -> Any:
        return self._unpickled(text, lambda: pickle.loads(text))

    @contextmanager
    def _as_process_group(self) -> Iterator[None]:
        wire = {
            "is_initialized": lambda: self.rank is not None,
            "get_rank": lambda group=None: self._here.rank,
            "get_world_size": lambda group=None: self.size,
            "get_backend": lambda group=None: "gloo",
            "all_gather_object": self._all_gather_object,
            "broadcast_object_list": self._broadcast_object_list,
            "all_reduce": self._all_reduce,
            "new_group": lambda *args, **options: object(),
        }
        options = SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(minutes=10)))
        world = SimpleNamespace(_device_types=["cpu"], _get_backend=lambda device: options)
        shared = SimpleNamespace(dumps=pickle.dumps, loads=self._loads)
        with ExitStack() as patches:
            for name, function in wire.items():
                patches.enter_context(mock.patch.object(dist, name, function))
            patches.callback(setattr, dist.GroupMember, "WORLD", dist.GroupMember.WORLD)
            dist.GroupMember.WORLD = world  # type: ignore[assignment]  # (a property of its class)
            patches.enter_context(mock.patch.object(collectives, "pickle", shared))
            yield


class Abandoned(Exception):
    """This rank waits in a collective that another one does not come to."""
