"""Objects read one after the other, some of them ahead: whatever they are, memory holds a few."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from xxhash import xxh3_128_hexdigest

from keepstep.mirror.interruptible import Interruptible
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.stores import open_store
from keepstep.policy.mirror import Part

AT_ONCE = 4  # objects under way or waiting to be taken; each is held in memory


def open_existing(url: str) -> Interruptible:
    """A store to look into: what is not there is not made.

    Raises:
        StoreError: the address is none, or there is nothing.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc:
        folder = Path(unquote(parts.path))
        if not folder.is_dir():
            raise StoreError(f"there is no folder {folder}", fatal=True)
    return Interruptible(open_store(url, person_waits=True))


def in_order(store: Store, names: Sequence[str]) -> Iterator[bytes | FileNotFoundError]:
    """The content of each object, in this order; or that it is not there.

    Whoever asks for no more of them waits for none that is under way: a store may hang.

    Raises:
        StoreError: of the store.
    """
    answers: list[queue.Queue[bytes | BaseException]] = [queue.Queue() for _ in names]
    room, numbers, ended = threading.Semaphore(AT_ONCE), iter(range(len(names))), threading.Event()
    next_one = threading.Lock()

    def read() -> None:
        while room.acquire() and not ended.is_set():
            with next_one:
                number = next(numbers, None)
            if number is None:
                return
            try:
                answers[number].put(store.get(names[number]))
            except BaseException as error:
                answers[number].put(error)

    for _ in range(min(AT_ONCE, len(names))):
        threading.Thread(target=read, daemon=True).start()
    try:
        for answer in answers:
            content = answer.get()
            if isinstance(content, BaseException) and not isinstance(content, FileNotFoundError):
                raise content
            yield content
            del content
            room.release()
    finally:
        ended.set()
        for _ in range(AT_ONCE):
            room.release()


def checked(part: Part, content: bytes | FileNotFoundError, where: str = "") -> bytes:
    """A part's content, as it was written.

    Args:
        where: what an error begins with.

    Raises:
        StoreError: it is not there, or is something else.
    """
    if isinstance(content, FileNotFoundError):
        raise StoreError(f"{where}{part.name} is not there", fatal=False) from content
    if len(content) != part.bytes or xxh3_128_hexdigest(content) != part.xxh3_128:
        raise StoreError(f"{where}{part.name} is not what was written", fatal=False)
    return content
