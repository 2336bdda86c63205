"""Reads what lies in a run folder: regular files of bounded size, and nothing behind a link.

Anything may lie where a file is looked for. What is none is told from what cannot be read now: a
disk that answers with an error is asked again before it is believed.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from keepstep.errors import KeepstepError
from keepstep.policy.strict import TextError, checked
from keepstep.run_folder.contents import ABSENT as ABSENT
from keepstep.run_folder.events import read_lines
from keepstep.run_folder.files import naming

T = TypeVar("T")
SMALL = 2**20  # bytes of a file that holds a few words, or one object
LONGEST_LOG = 2**28
PAUSES = (0.2, 0.8)  # seconds between the tries to read
NOTHING: tuple[tuple[int, int, int], int, list[dict[str, Any]], int] = ((0, 0, 0), 0, [], 0)
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}


class OddFileError(KeepstepError, ValueError):
    """What is there is not what was written there: no regular file, too large, no text."""


def read_bytes(path: Path, limit: int, begin: int = 0) -> bytes:
    """The content of a regular file from `begin`. A link is not followed, a pipe not opened.

    Raises:
        OddFileError: it is none, or has more than `limit` bytes.
        OSError: there is nothing, or it cannot be read now; the error names the file.
    """
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OddFileError(f"it is {KINDS.get(stat.S_IFMT(mode), 'a pipe or a device')}, no file")
    with naming("read", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise OddFileError(f"it has more than {limit} bytes")
            file.seek(begin)
            return file.read(max(0, size - begin))  # Python sets aside all that is asked for


def read_text(path: Path, limit: int = SMALL) -> str:
    """The same as text.

    Raises:
        OddFileError, OSError: as `read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise OddFileError(f"it is no text: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which may carry a check of itself.

    Raises:
        OddFileError, OSError: as `read_text`; or it is none, or not what was written.
    """
    try:
        return checked(read_text(path).strip())[0]
    except TextError as error:
        raise OddFileError(str(error)) from error


def is_file(path: Path) -> bool:
    """Whether a regular file lies there, not a link to one. Raises OSError as `lstat` does."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except ABSENT:
        return False


def patiently(look: Callable[[], T]) -> T:
    """What `look`, which only reads, returns; it is tried again a few times on an error.

    Raises:
        OSError: the last.
    """
    for pause in PAUSES:
        try:
            return look()
        except ABSENT:
            raise
        except OSError:
            time.sleep(pause)
    return look()


class Journal:
    """A log of events that grows while it is read: only what is new is read again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # File, time and size when it was read; where its whole lines end; those; damaged ones.
        self._known: tuple[tuple[int, int, int], int, list[dict[str, Any]], int] = NOTHING
        self._read: tuple[list[dict[str, Any]], int] = ([], 0)

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """Its events, and how many lines are not what was written.

        Raises:
            OddFileError, OSError: as `read_bytes`; nothing: there are none.
        """
        try:
            status = os.lstat(self._path)
        except ABSENT:
            return [], 0
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        before, end, events, damaged = self._known
        if seen == before:
            return self._read
        if seen[0] != before[0] or seen[2] <= before[2]:
            _, end, events, damaged = NOTHING
        whole, newline, rest = read_bytes(self._path, LONGEST_LOG, end).rpartition(b"\n")
        more, lost = read_lines(whole.decode(errors="replace"))
        last, torn = read_lines(rest.decode(errors="replace"))
        end += len(whole) + len(newline)
        self._read = events + more + last, damaged + lost + torn
        self._known = seen, end, events + more, damaged + lost
        return self._read
