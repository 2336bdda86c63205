"""The only module that changes the disk.

Small operations, each durable when it returns (but for `note`): a file is synced before it is
closed, a rename is followed by a sync of the folders it touched. `Storage.before` is called ahead
of every operation: there attempts see whether the run is still theirs; tests count and crash.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash

CHUNK = 16 * 2**20
BLOCK = 4096  # what O_DIRECT asks of offsets, sizes and addresses, on any device
DIRECT_FROM = 2**20
# Answers to O_DIRECT: not on this file system, or not from this memory.
NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
Before = Callable[[str, Path], None]  # called with the name of the operation and its path


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
        self._output = _Output(path, os.O_TRUNC)
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


class _Output:
    """An open file, written at any offset; whole blocks past the page cache where that can be."""

    def __init__(self, path: Path, flags: int) -> None:
        self._path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o666)
        self._direct: int | None = None

    def write(self, content: memoryview, offset: int) -> None:
        head = min(-offset % BLOCK, content.nbytes)
        body = (content.nbytes - head) // BLOCK * BLOCK
        done = 0
        if body >= DIRECT_FROM:
            _write_all(self.descriptor, content[:head], offset)
            done = head + self._write_direct(content[head : head + body], offset + head)
        _write_all(self.descriptor, content[done:], offset + done)

    def close(self) -> None:
        try:
            os.close(self.descriptor)
        finally:
            if self._direct is not None:
                os.close(self._direct)

    def _write_direct(self, blocks: memoryview, offset: int) -> int:
        """How much of these whole blocks could be written past the page cache."""
        try:
            if self._direct is None:
                self._direct = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
            return os.pwrite(self._direct, blocks, offset)
        except OSError as error:
            if error.errno not in NOT_DIRECT:
                raise
            return 0


class Storage:
    """Durable disk operations. Raises OSError as the system does."""

    def __init__(self, before: Before = lambda operation, path: None) -> None:
        self.before = before

    def guard(self, check: Callable[[], None]) -> None:
        """From now on `check` comes ahead of every operation, and raises where nothing may be
        changed."""
        before = self.before

        def guarded(operation: str, path: Path) -> None:
            check()
            before(operation, path)

        self.before = guarded

    def make_folder(self, path: Path) -> None:
        """Create `path` and its parents; an existing folder is kept."""
        if not path.is_dir():
            self.before("make_folder", path)
            path.mkdir(parents=True, exist_ok=True)
            self.sync_folder(path.parent)

    def create(self, path: Path, sync: bool = True) -> DigestingFile:
        """Open a new file for writing; use it in a `with` block, which syncs it.

        Several files are faster written without `sync`, and synced one after the other at the end:
        the first has the file system's journal written for all of them.
        """
        return DigestingFile(path, self.before, sync)

    def write(self, path: Path, content: bytes) -> DigestingFile:
        """Write a whole new file; the returned (closed) file knows its size and digest."""
        with self.create(path) as file:
            file.write(content)
        return file

    def copy(self, source: Path, path: Path) -> DigestingFile:
        """Copy a whole file; the returned (closed) file knows its size and digest."""
        with self.create(path) as file:
            for block in read_blocks(source):
                file.write(block)
        return file

    def link(self, source: Path, path: Path, or_copy: bool = False) -> None:
        """A second name for a file; `or_copy`: a copy, on a file system that has no such."""
        self.before("link", path)
        try:
            os.link(source, path)
        except OSError as error:
            if not or_copy or isinstance(error, FileNotFoundError):
                raise
            self.copy(source, path)

    def write_at(self, path: Path, size: int, extents: Iterable[tuple[int, memoryview]]) -> str:
        """Write this process's extents (offset, content) of a file that several processes share.

        Returns: the xxh3-128 of these contents, one after the other.
        """
        self.before("create", path)
        digest = xxhash.xxh3_128()
        output = _Output(path, 0)
        try:
            os.ftruncate(output.descriptor, size)  # to the same size by all: nothing is cut off
            for offset, content in extents:
                digest.update(content)
                output.write(content, offset)
            self.before("sync", path)
            os.fsync(output.descriptor)
        finally:
            output.close()
        return digest.hexdigest()

    def replace(self, path: Path, content: bytes) -> None:
        """Write a file so that a reader sees the old content or the new one, never a part."""
        temporary = path.with_name(f".{path.name}.new")
        self.write(temporary, content)
        self.rename(temporary, path)

    def free(self, path: Path) -> int:
        """Bytes that can still be written to the disk of `path`."""
        return shutil.disk_usage(path).free

    def note(self, path: Path, text: str) -> None:
        """Write a few words that may be lost: not synced, and a reader may see a part."""
        self.before("note", path)
        path.write_text(text)

    def append_line(self, path: Path, line: str) -> None:
        """Add one line to a log; a torn last line of a killed writer is closed first."""
        self.before("append_line", path)
        with open(path, "a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                line = "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def sync(self, path: Path) -> None:
        """Flush a file that somebody else wrote to the device."""
        self.before("sync", path)
        _fsync(path, os.O_RDONLY)

    def sync_folder(self, path: Path) -> None:
        """Flush a folder's entries: without it, a new name may be gone after a power loss."""
        self.before("sync_folder", path)
        try:
            _fsync(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:  # some network filesystems cannot sync folders
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name, in one step."""
        self.before("rename", source)
        os.rename(source, target)
        self.sync_folder(target.parent)
        if source.parent != target.parent:
            self.sync_folder(source.parent)

    def point(self, link: Path, target: str) -> None:
        """Make `link` a relative symbolic link to `target`, replaced in one step."""
        if os.path.islink(link) and os.readlink(link) == target:
            return
        self.before("point", link)
        temporary = link.with_name(f".{link.name}.new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.rename(temporary, link)

    def remove(self, path: Path) -> None:
        """Delete a file, a link or a whole folder; what is already gone is no error."""
        if path.is_dir() and not path.is_symlink():
            for child in sorted(path.iterdir()):
                self.remove(child)
            self.before("remove_folder", path)
            path.rmdir()
        else:
            self.before("remove", path)
            path.unlink(missing_ok=True)


def read_blocks(path: Path) -> Iterator[memoryview]:
    """A file's content from front to back, past the page cache where that can be.

    Each part is valid until the next one is asked for.
    """
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    descriptor = _open_for_reading(path)
    try:
        position = 0
        while count := os.preadv(descriptor, [buffer], position):
            yield buffer[:count]
            position += count
    finally:
        os.close(descriptor)


def _open_for_reading(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno not in NOT_DIRECT:
            raise
        return os.open(path, os.O_RDONLY)


def digest_of(path: Path) -> str:
    """xxh3-128 of a file's content, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sizes_under(folder: Path) -> dict[str, int]:
    """Every regular file below `folder`: path relative to it (with `/`) → bytes."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def sizes_of(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """These files below `folder`, as far as they exist: name → bytes."""
    sizes: dict[str, int] = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            sizes[name] = os.stat(os.path.join(folder, name)).st_size
    return sizes


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content.nbytes:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
