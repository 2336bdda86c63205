"""Files' content to and from the disk: past the page cache where that can be, errors with names."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import xxhash

CHUNK = 16 * 2**20
BLOCK = 4096  # what O_DIRECT asks of offsets, sizes and addresses, on any device
DIRECT_FROM = 2**20
MANY, AT_A_TIME = 64, 8  # files from which on that many threads are worth while to delete them
# Answers to O_DIRECT: not on this file system, not from this memory, or not at this place.
NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
Before = Callable[[str, Path], None]  # called with the name of the operation and its path


@contextlib.contextmanager
def naming(operation: str, path: Path) -> Iterator[None]:
    """Have an error of the system name file and operation: `pwrite` and `fsync` name none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and not str(error.strerror).endswith(")"):
            error.filename = error.filename or str(path)
            error.strerror = f"{error.strerror} ({operation})"
        raise


class DigestingFile:
    """A file being written from front to back: counted and digested (xxh3-128) on the way, and
    synced when closed (or, without `sync`, later: see `Storage.sync`).

    Large writes go past the page cache (O_DIRECT) where memory, offset and file system allow it:
    twice as fast as through it, and it leaves the training's memory alone.
    """

    def __init__(self, path: Path, before: Before, sync: bool) -> None:
        before("create", path)
        self._sync = sync
        self._path = path
        self._before = before
        self._output = Output(path, os.O_TRUNC)
        self._digest = xxhash.xxh3_128()
        self.bytes = 0
        self.digest_seconds = 0.0
        self._failure: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, view.nbytes, CHUNK):
                self._append(view[start : start + CHUNK])
        except OSError as error:
            self._failure = error
            raise
        return view.nbytes

    def flush(self) -> None:
        """Nothing is held back."""

    @property
    def xxh3_128(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> DigestingFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._sync:
                self._before("sync", self._path)
                with naming("fsync", self._path):
                    os.fsync(self._output.descriptor)
        except OSError as caught:
            self._failure = self._failure or caught
        try:
            self._output.close()
        except OSError as caught:
            self._failure = self._failure or caught
        if self._failure is not None:  # torch.save reports it as "unexpected pos 704 vs 598"
            raise self._failure from error

    def _append(self, chunk: memoryview) -> None:
        started = time.perf_counter()
        self._digest.update(chunk)
        self.digest_seconds += time.perf_counter() - started
        self._output.write(chunk, self.bytes)
        self.bytes += chunk.nbytes


class Output:
    """An open file, written at any offset; whole blocks past the page cache where that can be."""

    def __init__(self, path: Path, flags: int) -> None:
        self._path = path
        self.descriptor = no_link(path, os.O_WRONLY | os.O_CREAT | flags)
        self._direct: int | None = None
        self._refused = False

    def write(self, content: memoryview, offset: int) -> None:
        head = min(-offset % BLOCK, content.nbytes)
        body = (content.nbytes - head) // BLOCK * BLOCK
        done = 0
        with naming("write", self._path):
            if body >= DIRECT_FROM and not self._refused:
                write_all(self.descriptor, content[:head], offset)
                done = head + self._write_direct(content[head : head + body], offset + head)
            write_all(self.descriptor, content[done:], offset + done)

    def close(self) -> None:
        with naming("close", self._path):
            try:
                os.close(self.descriptor)
            finally:
                if self._direct is not None:
                    os.close(self._direct)

    def _write_direct(self, blocks: memoryview, offset: int) -> int:
        """How much of these whole blocks could be written past the page cache.

        A file system may refuse it at any place, as at an end that is none of its larger blocks:
        from there on all goes through the cache.
        """
        try:
            if self._direct is None:
                self._direct = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
            return os.pwrite(self._direct, blocks, offset)
        except OSError as error:
            if error.errno not in NOT_DIRECT:
                raise
            self._refused = True
            return 0


def read_blocks(path: Path) -> Iterator[memoryview]:
    """A file's content from front to back, past the page cache where that can be.

    Each part is valid until the next one is asked for.
    """
    buffer, position = memoryview(mmap.mmap(-1, CHUNK)), 0
    for flag in (os.O_DIRECT, 0):  # from where the first is refused, as at an odd end, the second
        try:
            with naming("read", path), opened(path, os.O_RDONLY | flag) as descriptor:
                while count := os.preadv(descriptor, [buffer], position):
                    yield buffer[:count]
                    position += count
            return
        except OSError as error:
            if not flag or error.errno not in NOT_DIRECT:
                raise


def no_link(path: str | Path, flags: int) -> int:
    """Open a file, not what a link leads to: whoever has planted one has another file in mind."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise OSError(errno.ELOOP, "it is a link, which is not followed", str(path)) from error
        raise


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def unlink(path: Path) -> None:
    """Delete a file; what is already gone is no error."""
    with naming("unlink", path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def unlink_all(paths: Sequence[Path]) -> list[OSError]:
    """Delete files, of many several at a time: each waits for the disk, or for a server.

    Returns:
        What could not be done, in the order of the files.
    """

    def attempt(path: Path) -> OSError | None:
        try:
            unlink(path)
        except OSError as error:
            return error
        return None

    failures = None
    if len(paths) >= MANY:
        from concurrent.futures import ThreadPoolExecutor  # few have as many, and all would wait

        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(AT_A_TIME) as threads:
            failures = list(threads.map(attempt, paths))
    if failures is None:  # or no thread can be started; what is gone already is no error
        failures = list(map(attempt, paths))
    return [failure for failure in failures if failure is not None]


def write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content.nbytes:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def write_all_of(descriptor: int, content: bytes) -> None:
    """At its end, of a file that is opened to be added to."""
    left = memoryview(content)
    while left.nbytes:
        left = left[os.write(descriptor, left) :]
