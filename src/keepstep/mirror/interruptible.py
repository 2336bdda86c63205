"""A store for commands: Ctrl-C ends every wait for it, whatever the store does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from keepstep.mirror.store import Entry, Store, StoreError

T = TypeVar("T")
LOOK_SECONDS = 0.2  # between two looks whether the wait has been given up


class Interruptible(Store):
    """Each operation goes on in a thread of its own, that a process does not wait for at its end:
    obstore returns to Python when the store has answered, which may take minutes."""

    def __init__(self, store: Store) -> None:
        self.url, self.conditional = store.url, store.conditional
        self._store, self._given_up = store, threading.Event()

    def give_up(self) -> None:
        """End the waits of all threads."""
        self._given_up.set()

    def names(self, below: str = "") -> dict[str, Entry]:
        return self._apart(lambda: self._store.names(below))

    def get(self, name: str) -> bytes:
        return self._apart(lambda: self._store.get(name))

    def put(self, name: str, content: bytes) -> None:
        self._apart(lambda: self._store.put(name, content))

    def create(self, name: str, content: bytes) -> bool:
        return self._apart(lambda: self._store.create(name, content))

    def copy(self, source: str, target: str) -> None:
        self._apart(lambda: self._store.copy(source, target))

    def delete(self, names: Iterable[str]) -> None:
        self._apart(lambda: self._store.delete(names))

    def holds(self, entry: Entry | None, content: bytes) -> bool:
        return self._store.holds(entry, content)

    def _apart(self, operation: Callable[[], T]) -> T:
        answers: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

        def work() -> None:
            try:
                answers.put((operation(), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=work, daemon=True).start()
        while not self._given_up.is_set():
            try:
                answer, error = answers.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return answer  # type: ignore[no-any-return]
        raise StoreError(f"{self.url}: nobody waits for it any more", fatal=True)
