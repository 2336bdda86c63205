"""The only module that changes the disk.

Small operations, each durable when it returns (but for `note`): a file is synced before it is
closed, a rename is followed by a sync of the folders it touched. `Storage.before` is called ahead
of every operation: there attempts see whether the run is still theirs; tests count and crash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from keepstep.errors import KeepstepError
from keepstep.run_folder.files import (
    Before,
    DigestingFile,
    Output,
    naming,
    no_link,
    opened,
    read_blocks,
    unlink,
    unlink_all,
    write_all_of,
)

# Answers to `link`: to another file system, not allowed there, none there, or too many of the file.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
FULL = (errno.ENOSPC, errno.EDQUOT)
EMPTIED_AT_ONCE = 256  # files of a folder that is removed, between two looks at the owner
TEMPORARY = ".*.new"  # what `replace` and `show` leave behind when they are killed


class NotOwnerError(KeepstepError, PermissionError):
    """This attempt must not change the run folder: another one owns it, or is still at work.

    Whoever catches an OSError around a disk operation lets this one through.

    Attributes:
        path: the run folder.
    """


class Storage:
    """Durable disk operations: what a method has done is on the device when it returns (but for
    `note`), and `before` was called ahead of it.

    Every method raises OSError as the system does, with the file's name, and what `before` raises.

    Args:
        before: is called ahead of every operation with its name and path, and stops it by raising.

    Ranks: any, any thread; what several processes may write at the same moment says so.
    """

    def __init__(self, before: Before = lambda operation, path: None) -> None:
        self.before = self._unguarded = before

    def guard(self, check: Callable[[], None]) -> None:
        """Have `check` come ahead of every operation from now on (but see `remove`).

        Args:
            check: raises where nothing may be changed.
        """
        before = self._unguarded = self.before

        def guarded(operation: str, path: Path) -> None:
            check()
            before(operation, path)

        self.before = guarded

    def make_folder(self, path: Path) -> None:
        """Create `path` and its parents; an existing folder is kept.

        Raises:
            OSError: of the disk; or a link is in its place, which would lead out of the run.
        """
        if path.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link in a folder's place", str(path))
        if not path.is_dir():
            self.before("make_folder", path)
            with naming("mkdir", path):
                path.mkdir(parents=True, exist_ok=True)
            self.sync_folder(path.parent)

    def create(self, path: Path, sync: bool = True) -> DigestingFile:
        """Open a new file for writing, in a `with` block, which closes it.

        Args:
            path: of the file; its folder exists.
            sync: whether it is synced at the end of the block. Several files are faster written
                without, and synced one after the other: the first has the file system's journal
                written for all of them.

        Returns:
            The file; once closed it knows its size in bytes and its xxh3-128.
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
        """Give a file a second name.

        Args:
            source: the file; a link is not followed.
            path: the second name.
            or_copy: copy it on a file system that has no second names.

        Raises:
            OSError: of the disk; FileExistsError: `path` exists, which is never written over.
        """
        self.before("link", path)
        try:
            os.link(source, path, follow_symlinks=False)
        except OSError as error:
            if not or_copy or error.errno not in NO_LINK:
                raise
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
            self.copy(source, path)

    def write_at(self, path: Path, size: int, extents: Iterable[tuple[int, memoryview]]) -> str:
        """Write this process's extents of a file that several processes write together.

        Args:
            path: of the file, the same for all of them.
            size: of the whole file, in bytes, the same for all of them.
            extents: (offset in bytes, content in host memory) of each.

        Returns:
            The xxh3-128 of these contents, one after the other, in hex.

        Ranks: any; not collective.
        """
        self.before("create", path)
        digest = xxhash.xxh3_128()
        output = Output(path, 0)
        try:
            with naming("ftruncate", path):
                os.ftruncate(output.descriptor, size)  # by all, the same: nothing is cut off
            for offset, content in extents:
                digest.update(content)
                output.write(content, offset)
            self.before("sync", path)
            with naming("fsync", path):
                os.fsync(output.descriptor)
        finally:
            output.close()
        return digest.hexdigest()

    def replace(self, path: Path, content: bytes) -> None:
        """Write a file so that a reader sees the old content or the new one, never a part."""
        with _new_beside(path) as temporary:
            self.write(temporary, content)
            self.rename(temporary, path)

    def free(self, path: Path) -> int:
        """Bytes that can still be written to the disk of `path`."""
        return shutil.disk_usage(path).free

    def show(self, path: Path, text: str) -> None:
        """Write a few words that may be lost (not synced): a reader sees all of them, or what was
        there before."""
        self.before("show", path)
        with _new_beside(path) as temporary:
            with open(temporary, "w", opener=no_link) as file:
                file.write(text)
            os.replace(temporary, path)

    def append(self, path: Path, content: bytes) -> int:
        """Add to a log that may be lost: not synced. A kill of the process costs nothing of it.

        Returns:
            The size of the file, in bytes.
        """
        self.before("append", path)
        with naming("append", path), open(path, "ab", 0, opener=no_link) as file:
            write_all_of(file.fileno(), content)
            return file.tell()

    def claim(self, path: Path) -> bool:
        """Make an empty file, and say whether it was not there: of several only one hears so."""
        self.before("claim", path)
        try:
            os.close(no_link(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def append_line(self, path: Path, line: str) -> None:
        """Add one line to a log; a torn last line of a killed writer is closed first."""
        self.before("append_line", path)
        with naming("append", path), open(path, "a+b", opener=no_link) as file:
            if file.tell() and not _ends_with_newline(file):
                line = "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def sync(self, path: Path) -> None:
        """Flush a file that somebody else wrote to the device, and give it the mode that files have
        in its folder: safetensors makes its own readable by the owner alone."""
        self.before("sync", path)
        with naming("chmod", path):
            mode = path.parent.stat().st_mode & 0o666
            if path.stat().st_mode & 0o777 != mode:  # a disk without modes refuses to set any
                path.chmod(mode)
        _fsync(path, os.O_RDONLY)

    def sync_folder(self, path: Path) -> None:
        """Flush a folder's entries: without it, a new name may be gone after a power loss."""
        self.before("sync_folder", path)
        try:
            _fsync(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:  # some network filesystems cannot sync folders
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name, in one step, and sync both folders."""
        self.before("rename", source)
        with naming("rename", source):
            os.rename(source, target)
        self.sync_folder(target.parent)
        if source.parent != target.parent:
            self.sync_folder(source.parent)

    def move(self, source: Path, target: Path, order: Callable[[Path], Any]) -> None:
        """Rename a folder; where only files can be renamed, one after the other.

        (A folder that is in the lower layer of an overlay, as in a container's image.)

        Args:
            source: the folder.
            target: its new name.
            order: a key by which the files, and the folders in it, go one after the other.
        """
        try:
            self.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV or not source.is_dir():
                raise
            self.move_content(source, target, order)

    def move_content(self, source: Path, target: Path, order: Callable[[Path], Any]) -> None:
        """Rename what is in a folder, file by file in this order, into another one."""
        self.make_folder(target)
        for child in sorted(sorted(source.iterdir()), key=order):
            if child.is_dir() and not child.is_symlink():
                self.move_content(child, target / child.name, order)
            else:
                self.rename(child, target / child.name)
        self._remove_folder(source)

    def point(self, link: Path, target: str) -> None:
        """Make `link` a relative symbolic link to `target`, replaced in one step."""
        if os.path.islink(link) and os.readlink(link) == target:
            return
        self.before("point", link)
        temporary = link.with_name(f".{link.name}.new")
        with naming("symlink", link):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            os.rename(temporary, link)

    def remove(self, path: Path, aside: bool = False) -> None:
        """Delete a file, a link or a whole folder; what is already gone is no error.

        Of a folder all that can be deleted is, before the first error is raised.

        Args:
            path: of what is deleted.
            aside: it lies where only this attempt has put it, under a name that nobody uses again.
                Then the guard comes ahead of every `EMPTIED_AT_ONCE` files alone: thousands of
                looks take longer than what they precede.
        """
        if not path.is_dir() or path.is_symlink():
            self.before("remove", path)
            unlink(path)
            return
        failures: list[OSError] = []
        with contextlib.suppress(FileNotFoundError):  # somebody else was faster
            with os.scandir(path) as entries:
                kinds = sorted((e.is_dir(follow_symlinks=False), e.name) for e in entries)
            for name in [name for is_folder, name in kinds if is_folder]:
                try:
                    self.remove(path / name, aside)
                except NotOwnerError:
                    raise
                except OSError as error:
                    failures.append(error)
            files = [path / name for is_folder, name in kinds if not is_folder]
            at_once = EMPTIED_AT_ONCE if aside else 1
            for first in range(0, len(files), at_once):
                failures += self._remove_files(files[first : first + at_once])
        if failures:
            raise failures[0]
        self._remove_folder(path)

    def _remove_files(self, paths: Sequence[Path]) -> list[OSError]:
        """Delete files behind one look of the guard; what could not be done."""
        failures: list[OSError] = []
        allowed: list[Path] = []
        for path in paths:
            try:
                (self._unguarded if allowed or failures else self.before)("remove", path)
                allowed.append(path)
            except NotOwnerError:
                raise
            except OSError as error:
                failures.append(error)
        return failures + unlink_all(allowed)

    def _remove_folder(self, path: Path) -> None:
        self.before("remove_folder", path)
        with naming("rmdir", path), contextlib.suppress(FileNotFoundError):
            path.rmdir()

    @contextlib.contextmanager
    def locked(self, path: Path, patience: float) -> Iterator[bool]:
        """Keep other processes out of what is done in the block, as long as they ask the same.

        Args:
            path: the file that is locked; it is made.
            patience: seconds to wait for whoever has the lock.

        Yields:
            Whether it was had. It is not on a file system without locks, or where whoever holds it
            does not let go for so long.
        """
        self.before("lock", path)
        try:
            descriptor = no_link(path, os.O_RDWR | os.O_CREAT)
        except OSError:
            yield False
            return
        try:
            yield _lock(descriptor, time.monotonic() + patience)
        finally:
            os.close(descriptor)

    def overwrite(self, path: Path, content: bytes) -> None:
        """Write a few bytes where a file has its block already: a full disk has no other."""
        self.before("overwrite", path)
        with naming("write", path), open(path, "r+b", 0, opener=no_link) as file:
            file.write(content)
            file.truncate()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _new_beside(path: Path) -> Iterator[Path]:
    """A name of its own for what takes a file's place: two processes may replace the same one at
    the same moment. What a failure leaves there goes, unless somebody else has the run now."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        yield temporary
    except NotOwnerError:
        raise
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _lock(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK or time.monotonic() > deadline:
                return False
        time.sleep(0.02)


def _fsync(path: Path, flags: int) -> None:
    with naming("fsync", path), opened(path, flags) as descriptor:
        os.fsync(descriptor)


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
