"""The only module that changes the disk.

Small operations, each durable when it returns: a file is synced before it is closed, a rename is
followed by a sync of the folders it touched. `Storage.before` is called ahead of every operation;
tests count and crash there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash

CHUNK = 8 * 2**20
Before = Callable[[str, Path], None]  # called with the name of the operation and its path


class DigestingFile:
    """A file being written: counts and digests (xxh3-128) on the way, synced when closed."""

    def __init__(self, path: Path, before: Before) -> None:
        before("create", path)
        self._path = path
        self._before = before
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115  # closed by __exit__
        self._digest = xxhash.xxh3_128()
        self.bytes = 0
        self._failure: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self._failure = error
            raise
        self._digest.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

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
            if error is None:
                self._file.flush()
                self._before("sync", self._path)
                os.fsync(self._file.fileno())
        except OSError as caught:
            self._failure = self._failure or caught
        try:
            self._file.close()
        except OSError as caught:
            self._failure = self._failure or caught
        if self._failure is not None:  # torch.save reports it as "unexpected pos 704 vs 598"
            raise self._failure from error


class Storage:
    """Durable disk operations. Raises OSError as the system does; nothing is caught here."""

    def __init__(self, before: Before = lambda operation, path: None) -> None:
        self.before = before

    def make_folder(self, path: Path) -> None:
        """Create `path` and its parents; an existing folder is kept."""
        if not path.is_dir():
            self.before("make_folder", path)
            path.mkdir(parents=True, exist_ok=True)
            self.sync_folder(path.parent)

    def create(self, path: Path) -> DigestingFile:
        """Open a new file for writing; use it in a `with` block, which syncs it."""
        return DigestingFile(path, self.before)

    def write(self, path: Path, content: bytes) -> DigestingFile:
        """Write a whole new file; the returned (closed) file knows its size and digest."""
        with self.create(path) as file:
            file.write(content)
        return file

    def replace(self, path: Path, content: bytes) -> None:
        """Write a file so that a reader sees the old content or the new one, never a part."""
        temporary = path.with_name(f".{path.name}.new")
        self.write(temporary, content)
        self.rename(temporary, path)

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


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
