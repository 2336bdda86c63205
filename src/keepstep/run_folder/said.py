"""What an attempt said: beside `launched/N.json`, bounded, without secrets.

    launched/3.log                what it said first (1 MiB)
    launched/3.log.2, 3.log.1     what it said last, the older part first (1 MiB each)
    launched/3.node-1.log         of another machine's ranks

A thread of the process writes. Whoever has said a line waits for it a few milliseconds, so that a
kill in the next moment does not cost the line, but not for a disk that is slow. What cannot be
written is lost, and that is told once. The ranks of one machine share a file; the main process's
goes on to its end, the others stop after a while.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from _thread import LockType
from pathlib import Path
from queue import Empty, SimpleQueue

from keepstep.output.environment import hidden, secrets_in
from keepstep.run_folder.paths import RunPaths
from keepstep.run_folder.safe_read import ABSENT, OddFileError, is_file, read_bytes
from keepstep.run_folder.storage import Storage

logger = logging.getLogger(__name__)

PART = 2**20  # bytes of what was said first, and of each of the two parts of what was said last
OF_OTHERS = 2**17  # bytes that another rank than the main one may say
PROMPT_SECONDS = 0.05  # that a line is waited for
WAITING = 10_000  # lines that may wait for a slow disk
AT_ONCE = 1000  # lines
KEPT = 20  # attempts whose words are kept
ENDS = ("", ".2", ".1")  # of the names of the parts, in the order in which they were said
NAME = re.compile(r"(\d{1,10})(?:\.node-(\d{1,6}))?\.log(?:\.[12])?")
SLOW = b"[keepstep: the disk was slow, lines are lacking here]"
ENOUGH = b"[keepstep: what this rank says from here on is not kept]"


def log_of(run: RunPaths, attempt: int, node: int = 0) -> Path:
    """The first part of what the ranks of a machine said; 0: the main process's."""
    return run.launched / (f"{attempt}.node-{node}.log" if node else f"{attempt}.log")


class Said:
    """Keeps what this process says.

    Attributes:
        path: the first part.
    """

    def __init__(self, run: RunPaths, attempt: int, node: int, rank: int) -> None:
        self._attempt, self._is_main = attempt, rank == 0
        self.path = log_of(run, attempt, node)
        self._storage = Storage()  # not the attempt's: who has lost the run says so, too
        self._mark = b"" if rank == 0 else f"[rank {rank}] ".encode()
        self._lines: SimpleQueue[tuple[bytes | None, LockType]] = SimpleQueue()
        self._said = 0
        self._seen, self._known = (0, 0), list[str]()
        self._lacking = self._torn = self._is_told = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._write, name="said", daemon=True)
        self._thread.start()

    def keep(self, line: bytes) -> None:
        """A line, from any thread, and from a child of this process. It raises nothing."""
        if os.getpid() != self._process:  # the thread is the parent's
            self._is_main, self._is_told = False, True
            self._append([line])
        elif self._lines.qsize() > WAITING:
            self._lacking = True
        else:
            behind = self._lines.qsize()
            done = self._put(line)
            if not behind and threading.current_thread() is not self._thread:
                done.acquire(timeout=PROMPT_SECONDS)

    def drain(self, seconds: float) -> None:
        """Wait until all is written, at most so long."""
        if os.getpid() == self._process:
            self._put(None).acquire(timeout=seconds)

    def _put(self, line: bytes | None) -> LockType:
        """A lock of its own for each, which is let go when it is written: a signal's handler may
        print in the middle of this."""
        done = threading.Lock()
        done.acquire()
        self._lines.put((line, done))
        return done

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            self._forget_old()
        while True:
            items = [self._lines.get()]
            with contextlib.suppress(Empty):
                while len(items) < AT_ONCE:
                    items.append(self._lines.get_nowait())
            said = [line for line, _ in items if line is not None]
            if self._lacking:
                said, self._lacking = [*said, SLOW], False
            self._append(said)
            for _, done in items:
                done.release()

    def _append(self, lines: list[bytes]) -> None:
        lines = self._bounded(lines)
        if not lines:
            return
        text = b"".join(self._mark + line + b"\n" for line in lines).decode(errors="replace")
        content = hidden(text, secrets=self._secrets()).encode()
        try:
            self._storage.make_folder(self.path.parent)
            self._add(b"\n" + content if self._torn else content)
            self._torn = False
        except OSError as error:
            self._torn = True
            if not self._is_told:
                self._is_told = True
                logger.warning("what this attempt says is not all kept: %s", error)

    def _secrets(self) -> list[str]:
        """Of the environment, which may change."""
        seen = len(os.environ), int(time.monotonic())
        if seen != self._seen:
            self._seen, self._known = seen, secrets_in(os.environ)
        return self._known

    def _bounded(self, lines: list[bytes]) -> list[bytes]:
        """Another rank's as far as it may say more."""
        if self._is_main:
            return lines
        kept = []
        for line in lines:
            if self._said > OF_OTHERS:
                break
            self._said += len(line) + 1
            kept.append(line if self._said <= OF_OTHERS else ENOUGH)
        return kept

    def _add(self, content: bytes) -> None:
        """To what was said first; when that is full, to the newest part of what was said last."""
        last = self.path.with_name(f"{self.path.name}.1")
        if not self._is_main or _size(self.path) < PART:
            self._storage.append(self.path, content)
        elif self._storage.append(last, content) > PART:
            self._storage.rename(last, self.path.with_name(f"{self.path.name}.2"))

    def _forget_old(self) -> None:
        """The words of attempts long ago."""
        if not self._is_main:
            return
        for name in os.listdir(self.path.parent):
            match = NAME.fullmatch(name)
            if match and int(match[1]) <= self._attempt - KEPT:
                self._storage.remove(self.path.parent / name)


def said_by(run: RunPaths, attempt: int) -> list[Path]:
    """The files of what an attempt said, in their order; the main process's machine first."""
    try:
        names = os.listdir(run.launched) if not run.launched.is_symlink() else []
    except ABSENT:
        return []
    found = [match for match in map(NAME.fullmatch, names) if match and int(match[1]) == attempt]
    nodes = sorted({int(match[2] or 0) for match in found})
    of_it = [log_of(run, attempt, node) for node in nodes]
    paths = [path.with_name(path.name + end) for path in of_it for end in ENDS]
    return [path for path in paths if path.name in names and is_file(path)]


def lines_said(path: Path, at_most: int | None = None) -> list[str]:
    """The lines of one of these files; the last ones.

    Raises:
        OddFileError, OSError: it cannot be read.
    """
    size = _size(path)
    begin = 0 if at_most is None else max(0, size - 2**16)
    text = read_bytes(path, 8 * PART, begin).decode(errors="replace")
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    return lines if at_most is None else lines[-at_most:]


def last_words(run: RunPaths, attempt: int, at_most: int) -> list[str]:
    """What the main process's machine said last; nothing, where that cannot be read."""
    own = [path for path in said_by(run, attempt) if ".node-" not in path.name]
    try:
        return lines_said(own[-1], at_most) if own else []
    except (OSError, OddFileError):
        return []


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except ABSENT:
        return 0
