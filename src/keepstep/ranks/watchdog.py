"""A rank that is dead, frozen or stuck is named, and the others end: nobody waits for it for ever.

Every rank has a thread that says in the process group's store that it is alive, and how far its
main thread has got, and what it is at. The main process listens to all, and pronounces; the others
listen to the main process, and pronounce only that it is silent. What is old is measured on the
listener's own clock, and by a listener that was not itself late: all ranks may have been stopped,
and gone on. A process of the listener's own machine that is gone is dead at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from keepstep.policy.standstill import Bound, Phase, Standstills
from keepstep.ranks import collectives
from keepstep.ranks.carried_error import rank_of
from keepstep.ranks.listener import (
    GONE,
    HEARD,
    LATE_SECONDS,
    PERIOD_SECONDS,
    SEEKS,
    SILENT_SECONDS,
    Listener,
    has_ended,
    named,
    patience,
)
from keepstep.ranks.processes import Process, is_gone, this_process

EXPLAIN_SECONDS = 6 * PERIOD_SECONDS
LAST_WORDS_SECONDS = 20.0  # to write down what has happened, before the process ends
LONGEST_WORDS = 500  # characters of an error that the others are told
KEY = "keepstep/"


class Watchdog:
    """Watches the other ranks from `start` to `stop`.

    Attributes:
        standstills: what this rank is at, and how long it has stood still. The main process judges
            by its own: what any rank waits for in a step, it waits for too, at the step's end at
            the latest.
    """

    def __init__(
        self, dead_after: float, standstills: Standstills, give_up: Callable[[str], None]
    ) -> None:
        """
        Args:
            dead_after: seconds without a sign of life from a rank; longer before the first step.
            standstills: without progress on any rank for its bound, a rank is stuck.
            give_up: is told what has happened, in the watchdog's thread; then the process ends.
        """
        self._dead_after, self.standstills = dead_after, standstills
        self._listener = Listener([], dead_after, standstills)
        self._give_up = give_up
        self._progress = 0
        self._over, self._hurry = threading.Event(), threading.Event()
        self._told = threading.Event()  # all that was to be told is, or cannot be
        self._failure: str | None = None
        self._missed = self._seeks = False
        self._threads: list[threading.Thread] = []
        self._store: Any = None
        self._hosts: list[str] = []
        self._processes: list[Process | None] = []
        self._answered = self._round = 0.0
        self._paused, self._blamed_until = 0.0, float("-inf")
        self._verdict: str | None = None

    def start(self) -> None:
        """Begin to watch. Ranks: all (collective)."""
        if not collectives.is_grouped() or collectives.world_size() == 1:
            return
        # A connection of its own: the main thread may be waiting on the other one.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._say("0 0 0")
        places = collectives.gather((socket.gethostname(), this_process()))
        # Everybody has said something by now.
        self._hosts, self._processes = map(list, zip(*places, strict=True))
        self._listener.ranks = (
            list(range(collectives.world_size())) if collectives.is_main() else [0]
        )
        self._answered = self._round = time.monotonic()
        self.standstills.got_on(self._round)
        for work in (self._talk, self._watch):
            thread = threading.Thread(target=work, daemon=True, name="keepstep-watchdog")
            thread.start()
            self._threads.append(thread)

    def progress(self, at: Phase | None = None, step: int = 0) -> None:
        """The main thread has got on. Ranks: any.

        Args:
            at: what it is at from here on; None: as before.
            step: optimizer steps completed.
        """
        now = time.monotonic()
        if now - self._round > LATE_SECONDS:  # this process was stopped: it has not stood still
            self.standstills.forget()
        self.standstills.got_on(now, at)
        self.standstills.step = step
        self._progress += 1

    @property
    def hang(self) -> Bound | None:
        """The bound by which this process has pronounced a rank stuck; None: it has not."""
        return self._listener.hang

    def explain(self, error: Exception) -> str:
        """What this rank fails of, for the others too. Ranks: any, not collective.

        A connection that broke tells that a rank is gone, not which: then the others are listened
        to for a moment. Once it is known which, this process ends with that reason, and not here.
        """
        failure = f"{type(error).__name__}: {error}"
        pause = self._pause()
        if pause is not None:
            failure = f"{pause} ({failure})"
        elif self._threads and any(map(_is_of_the_connection, _causes(error))):
            self._seeks = True
            self._hurry.set()
            self._over.wait(EXPLAIN_SECONDS)
            if self._verdict is not None:
                self._over.wait(LAST_WORDS_SECONDS * 2)
        self._failure = failure
        return failure

    def stop(self, missed: bool = False) -> None:
        """This rank leaves, after its last collective; or it has failed, as `explain` was told; or
        it is `missed` by those that wait for it.

        Ranks: any. Waits for the threads: Python aborts at its end while one is inside the store.
        """
        self._missed = missed
        self._over.set()
        self._hurry.set()
        for thread in self._threads:
            thread.join(LAST_WORDS_SECONDS)

    def _let_hear(self) -> None:
        """The store may end with the main process: the others have to hear its last words first."""
        deadline = time.monotonic() + 2 * PERIOD_SECONDS
        while collectives.is_main() and time.monotonic() < deadline and not self._all_heard():
            time.sleep(PERIOD_SECONDS / 20)

    def _all_heard(self) -> bool:
        """Whether every other rank has ended, or knows why it is to."""
        others = [rank for rank in range(len(self._hosts)) if rank != collectives.rank()]
        gone = {rank for rank in others if is_gone(self._processes[rank])}
        said = self._store.multi_get([f"{KEY}rank/{rank}" for rank in others])
        return all(r in gone or has_ended(t.decode()) for r, t in zip(others, said, strict=True))

    def _pause(self) -> str | None:
        """Whether it was this process that the others have missed, a moment ago."""
        now = time.monotonic()
        self._note_pause(now)
        if not self._threads or now > self._blamed_until:
            return None
        rank = collectives.rank()
        return f"rank {rank} on {self._hosts[rank]} stood still for {self._paused:.0f} s"

    def _note_pause(self, now: float) -> bool:
        """Whether this process has stood still since the last round."""
        late = now - self._round
        if late > self._dead_after:
            self._paused, self._blamed_until = late, now + self._dead_after
        self._round = now
        return late > LATE_SECONDS

    def _say(self, text: str) -> None:
        self._store.set(f"{KEY}rank/{collectives.rank()}", text)

    def _rounds(self) -> Iterator[None]:
        while not (self._hurry.wait(PERIOD_SECONDS) and self._over.wait(PERIOD_SECONDS / 8)):
            yield

    def _limit(self) -> float:
        """Seconds of silence after which a rank is dead."""
        limit = patience(self._dead_after, self._progress > 0)
        return min(limit, SILENT_SECONDS) if self._seeks else limit

    def _talk(self) -> None:
        """Say that this rank lives, and listen to the others, until it leaves."""
        with contextlib.suppress(RuntimeError, OSError):  # the store is gone: `_watch` sees to that
            for beats, _ in enumerate(self._rounds(), start=1):
                counts = f"{self._progress} {collectives.count_entered()}"
                said = f"{beats} {counts} {self.standstills.phase}"
                self._say(f"{said} {SEEKS}" if self._seeks else said)
                self._verdict = self._verdict or self._hear()
                self._answered = time.monotonic()
                if self._verdict is not None:
                    self._hurry.set()  # `_watch` acts on it
                    break
            words = self._last_words()
            if words is not None:
                self._say(words)  # and it is there before this process can be seen to be gone:
                self._store.get(f"{KEY}rank/{collectives.rank()}")
            if words not in (None, "left"):
                self._let_hear()
        self._told.set()

    def _last_words(self) -> str | None:
        """What this rank says at its end; None: it is missed."""
        if self._verdict is not None and self._store.check([f"{KEY}verdict"]):
            return HEARD
        failure = self._verdict or self._failure
        if failure is not None:
            return f"failed {failure[:LONGEST_WORDS]}"
        return None if self._missed else "left"

    def _watch(self) -> None:
        """Act on what was heard. Apart from `_talk`, which a frozen store never lets go."""
        for _ in self._rounds():
            now = time.monotonic()
            if self._note_pause(now):
                self._answered = now
            silence, verdict = now - self._answered, self._verdict
            if verdict is None and silence > self._limit():
                verdict = f"rank 0 on {self._hosts[0]} gave no sign of life for {silence:.0f} s: "
                verdict += "dead or frozen, and the store with it"
            lost = self._seeks and self._told.is_set()  # the connection and the store
            if verdict is None and lost and is_gone(self._processes[0]):
                verdict = f"rank 0 on {self._hosts[0]} {GONE}, and the store with it"
            if verdict is not None:
                self._verdict = verdict
                last_words = threading.Thread(target=self._give_up, args=(verdict,), daemon=True)
                last_words.start()
                last_words.join(LAST_WORDS_SECONDS)
                self._told.wait(2 * PERIOD_SECONDS)
                os._exit(70)

    def _hear(self) -> str | None:
        """What the main process says, or this rank has to say of it."""
        if not collectives.is_main() and self._store.check([f"{KEY}verdict"]):
            return str(self._store.get(f"{KEY}verdict").decode())
        # Before their words are asked for: the last ones are there when a process is gone.
        gone = {rank for rank in self._listener.ranks if is_gone(self._processes[rank])}
        said = self._store.multi_get([f"{KEY}rank/{rank}" for rank in self._listener.ranks])
        found = self._listener.hear([text.decode() for text in said], time.monotonic(), gone)
        if found is None:
            return None
        ranks, what = found
        verdict = f"{named(ranks, self._hosts)} {what}"
        if collectives.is_main():
            self._store.set(f"{KEY}verdict", verdict)
        return verdict


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of; none of one that the ranks have told each other, which
    came over their connection, not of it."""
    while error is not None and rank_of(error) is None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_the_connection(error: BaseException) -> bool:
    """Whether it may come of another rank's end. Of gloo it is a RuntimeError like others."""
    return type(error) is RuntimeError or isinstance(error, dist.DistError)
