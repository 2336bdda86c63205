"""A rank that is dead, frozen or stuck is named, and the others end: nobody waits for it for ever.

Every rank has a thread that says in the process group's store that it is alive, and how often its
main thread has made progress. The main process listens to all, and pronounces; the others listen to
the main process. What is old is measured on the listener's own clock.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from . import distributed

PERIOD_SECONDS = 2.0
LAST_WORDS_SECONDS = 20.0  # to write down what has happened, before the process ends
KEY = "keepstep/"
# Before the first step a single call may keep a process from everything else for longer.
PATIENCE_AT_FIRST = 4


class Watchdog:
    """Watches the other ranks from `start` to `stop`."""

    def __init__(
        self, dead_after: float, stuck_after: float, give_up: Callable[[str], None]
    ) -> None:
        """
        Args:
            dead_after: seconds without a sign of life from a rank; longer before the first step.
            stuck_after: seconds without progress on any rank.
            give_up: is told what has happened, in the watchdog's thread; then the process ends.
        """
        self._limits = dead_after, stuck_after
        self._give_up = give_up
        self._progress = 0
        self._over = threading.Event()
        self._missed = False
        self._threads: list[threading.Thread] = []
        self._store: Any = None
        self._hosts: list[str] = []
        self._answered = 0.0
        self._verdict: str | None = None

    def start(self) -> None:
        """Begin to watch. Ranks: all (collective)."""
        if not distributed.is_grouped() or distributed.world_size() == 1:
            return
        # A connection of its own: the main thread may be waiting on the other one.
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._say("0 0")
        self._hosts = distributed.gather(socket.gethostname())  # and everybody has said something
        self._answered = time.monotonic()
        for work in (self._talk, self._watch):
            thread = threading.Thread(target=work, daemon=True, name="keepstep-watchdog")
            thread.start()
            self._threads.append(thread)

    def progress(self) -> None:
        """The main thread has got on. Ranks: any."""
        self._progress += 1

    def stop(self, missed: bool = False) -> None:
        """This rank leaves, after its last collective; or it has failed, and is `missed`.

        Ranks: any. Waits for the threads: Python aborts at its end while one is inside the store.
        """
        self._missed = missed
        self._over.set()
        for thread in self._threads:
            thread.join(LAST_WORDS_SECONDS)

    def _say(self, text: str) -> None:
        self._store.set(f"{KEY}rank/{distributed.rank()}", text)

    def _talk(self) -> None:
        """Say that this rank lives, and listen to the others, until it leaves."""
        watched = range(distributed.world_size()) if distributed.is_main() else [0]
        listener, beats = Listener(list(watched), self._limits), 0
        with contextlib.suppress(Exception):  # no answer any more: `_watch` sees to that
            while not self._over.wait(PERIOD_SECONDS):
                beats += 1
                self._say(f"{beats} {self._progress}")
                self._verdict = self._hear(listener)
                self._answered = time.monotonic()
            if not self._missed:
                self._say("left")

    def _watch(self) -> None:
        """Act on what was heard. Apart from `_talk`, which a frozen store never lets go."""
        while not self._over.wait(PERIOD_SECONDS):
            silence = time.monotonic() - self._answered
            verdict, limit = self._verdict, patience(self._limits[0], self._progress > 0)
            if verdict is None and silence > limit:
                verdict = f"rank 0 on {self._hosts[0]} gave no sign of life for {silence:.0f} s: "
                verdict += "dead or frozen, and the store with it"
            if verdict is not None:
                last_words = threading.Thread(target=self._give_up, args=(verdict,), daemon=True)
                last_words.start()
                last_words.join(LAST_WORDS_SECONDS)
                os._exit(70)

    def _hear(self, listener: Listener) -> str | None:
        """What the main process says, or this rank has to say of it."""
        if not distributed.is_main() and self._store.check([f"{KEY}verdict"]):
            return str(self._store.get(f"{KEY}verdict").decode())
        said = self._store.multi_get([f"{KEY}rank/{rank}" for rank in listener.ranks])
        found = listener.hear([text.decode() for text in said], time.monotonic())
        if found is None:
            return None
        ranks, what = found
        names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in ranks)
        verdict = f"{names} {what}"
        if distributed.is_main():
            self._store.set(f"{KEY}verdict", verdict)
        return verdict


class Listener:
    """What was heard of some ranks, and since when nothing new. No clock, no store."""

    def __init__(self, ranks: list[int], limits: tuple[float, float]) -> None:
        self.ranks = ranks
        self._dead_after, self._stuck_after = limits
        self._heard: dict[int, tuple[str, float]] = {}
        self._moved: tuple[list[int], float] = [], 0.0

    def hear(self, said: list[str], now: float) -> tuple[list[int], str] | None:
        """Ranks that something is wrong with, and what; None when all is well."""
        for rank, text in zip(self.ranks, said, strict=True):
            if rank not in self._heard or self._heard[rank][0] != text:
                self._heard[rank] = text, now
        present = {r: text for r, (text, _) in self._heard.items() if text != "left"}
        counts = [int(text.split()[1]) for text in present.values()]
        begun = max(counts, default=0) > 0
        limit = patience(self._dead_after, begun)
        silent = [r for r in present if now - self._heard[r][1] > limit]
        if silent:
            return silent, f"gave no sign of life for {limit:g} s: dead or frozen"
        if counts != self._moved[0]:
            self._moved = counts, now
        if begun and now - self._moved[1] > self._stuck_after:
            behind = [r for r, text in present.items() if int(text.split()[1]) == min(counts)]
            return behind, f"made no progress for {self._stuck_after:g} s: stuck"
        return None


def patience(dead_after: float, begun: bool) -> float:
    """Seconds of silence after which a rank is dead."""
    return dead_after if begun else PATIENCE_AT_FIRST * dead_after
