"""A DataLoader's worker processes: signals are not for them, nobody waits for ever for them, and
they are not there longer than their rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, context
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar

from keepstep.ranks import signals

PATIENCE_SECONDS = 2.0  # for all workers of a loader together, once they have been told to end


class WithoutSignals:
    """A DataLoader's `worker_init_fn` that leaves signals to the worker's parent: a signal to all
    processes of a job asks for a stop, and the last batches are still needed."""

    def __init__(self, first: Callable[[int], None] | None) -> None:
        self._first = first

    def __call__(self, worker: int) -> None:
        for number in signals.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self._first is not None:
            self._first(worker)


class Worker(BaseProcess):
    """A worker that may hang in a read, even where no signal reaches it (a dead NFS server).

    torch 2.13 waits five seconds for each worker, sends it SIGTERM, which it ignores here, and
    waits five more; at its exit Python waits for ever. An ending rank has no time for either: its
    state is saved, and the batches are not needed any more. And a rank that ends without a word
    (out of memory, after a hang) tells its workers nothing: each of them notices by itself.
    """

    _late_until: ClassVar[float] = 0.0

    def run(self) -> None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()

    def terminate(self) -> None:
        self.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait, but not for long; without a `timeout`, as Python does at its exit, it is killed."""
        if timeout is None:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls it an error
            self.kill()
        # The others were told to end at the same moment as one that did not.
        patience = 0.0 if time.monotonic() < Worker._late_until else PATIENCE_SECONDS
        super().join(patience if timeout is None else min(timeout, patience))
        if self.is_alive():
            Worker._late_until = time.monotonic() + PATIENCE_SECONDS


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()  # with a fork server, the one that asked for this one
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


# By the name of the start method: what is spawned is pickled, and must have a name in a module.
class ForkWorker(Worker, context.ForkProcess): ...


class SpawnWorker(Worker, context.SpawnProcess): ...


class ForkServerWorker(Worker, context.ForkServerProcess): ...


class ForkWorkers(context.ForkContext):
    Process = ForkWorker


class SpawnWorkers(context.SpawnContext):
    Process = SpawnWorker


class ForkServerWorkers(context.ForkServerContext):
    Process = ForkServerWorker


KINDS: dict[str, context.BaseContext] = {
    "fork": ForkWorkers(),
    "spawn": SpawnWorkers(),
    "forkserver": ForkServerWorkers(),
}


def workers_of(loader: Any) -> context.BaseContext:
    """The `multiprocessing_context` that gives a DataLoader such workers, started as its own."""
    own = loader.multiprocessing_context
    return KINDS[own.get_start_method() if own else multiprocessing.get_start_method()]
