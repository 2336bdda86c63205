"""A file system whose operations fail, or do not answer, as a test says: FUSE, over a real folder.

    with faulty_disk(tmp_path / "disk") as disk:
        run = disk.folder / "run"                                # everything below works as usual
        disk.fail("open", "run/*/manifest.json", errno.EIO)      # from now on, until heal()
        disk.fail("write", "*", errno.ENOSPC, times=1)           # once
        disk.fail("read", "*", errno.EINVAL, direct=True, unaligned=True)
        disk.hang("getattr", "run/.keepstep/*")                  # no answer, until heal()
        disk.heal()
        assert disk.fired                                        # [(operation, path), ...]

Operations are named as FUSE does: getattr, open, create, read, write, flush, fsync, fsyncdir,
truncate, rename, unlink, mkdir, rmdir, symlink, readlink, link, readdir, statfs, chmod, fallocate;
`*` is any of them. Paths are relative to the mount, with wildcards (`fnmatch`; `*` crosses `/`).
With `like_nfs=True` a file that is open when it is unlinked is renamed in its folder instead.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import errno
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepstep.run_folder.storage import Storage
from tests.helpers.waiting import PATIENCE

SECTOR = 512
LONGEST_HANG_SECONDS = 2 * PATIENCE  # a test that forgets to heal must not hang for ever


class FaultyDisk:
    """The test's side: `folder` is the mount, `backing` the real folder behind it."""

    def __init__(self, folder: Path, backing: Path, rules: Path) -> None:
        self.folder, self.backing, self._rules = folder, backing, rules
        self._known: list[dict[str, Any]] = []
        self.heal()

    def fail(
        self,
        operation: str,
        path: str,
        number: int,
        *,
        times: int | None = None,
        direct: bool = False,
        unaligned: bool = False,
    ) -> None:
        """Have an operation answer `number` (an errno), `times` times or until `heal()`.

        `direct`: only of files opened with O_DIRECT; `unaligned`: only of reads and writes that do
        not begin and end at a sector's border.
        """
        facts = {"times": times, "direct": direct, "unaligned": unaligned}
        self._add(operation, path, errno=number, **facts)

    def hang(self, operation: str, path: str) -> None:
        """Have an operation not answer before `heal()`."""
        self._add(operation, path, errno=None)

    def heal(self) -> None:
        """From now on everything works."""
        self._known = []
        self._write()

    def empty(self) -> None:
        """For the next test: everything works, and nothing is there."""
        self.heal()
        for left in self.backing.iterdir():
            Storage().remove(left)

    @property
    def fired(self) -> list[tuple[str, str]]:
        """The operations that failed or hung so far, with their paths."""
        told = self._rules.with_suffix(".fired")
        lines = told.read_text().splitlines() if told.exists() else []
        return [(operation, path) for operation, _, path in (s.partition(" ") for s in lines)]

    def _add(self, operation: str, path: str, **facts: Any) -> None:
        name = f"{len(self._known)}-{time.monotonic_ns()}"
        self._known.append({"name": name, "operation": operation, "path": path, **facts})
        self._write()

    def _write(self) -> None:
        temporary = self._rules.with_suffix(".new")
        temporary.write_text(json.dumps(self._known))
        os.replace(temporary, self._rules)


@contextlib.contextmanager
def faulty_disk(place: Path, like_nfs: bool = False) -> Iterator[FaultyDisk]:
    """Mounted at `place`, over a folder beside it; skipped where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("not root: no filesystem can be mounted")
    if not os.path.exists("/dev/fuse") or ctypes.util.find_library("fuse3") is None:
        pytest.skip("no FUSE: /dev/fuse or libfuse3 is missing")
    pytest.importorskip("mfusepy", reason="no FUSE: mfusepy is not installed")
    backing, rules = place.with_name(f"{place.name}-backing"), place.with_name(f"{place.name}.json")
    place.mkdir()
    backing.mkdir()
    disk = FaultyDisk(place, backing, rules)
    words = [sys.executable, "-m", "tests.helpers.faulty_disk", *map(str, (backing, place, rules))]
    words.append("hide" if like_nfs else "remove")
    server = subprocess.Popen(
        words, cwd=Path(__file__).parents[2], start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not os.path.ismount(place):
            assert server.poll() is None, "the FUSE server has ended"
            assert time.monotonic() < deadline, "the FUSE server does not mount"
            time.sleep(0.02)
        yield disk
    finally:
        disk.heal()
        if os.path.ismount(place) and subprocess.run(["umount", place], check=False).returncode:
            subprocess.run(["umount", "--lazy", place], check=True)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class Rules:
    """The server's side: which operation fails now."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, ""
        self._known: list[dict[str, Any]] = []
        self._counts: dict[str, int] = {}

    def known(self) -> list[dict[str, Any]]:
        text = self._path.read_text()  # not its time: a clock's tick may be two versions'
        if text != self._seen:
            self._known, self._seen = json.loads(text), text
        return self._known

    def apply(self, operation: str, path: str, direct: bool = False, border: bool = True) -> None:
        path = path.lstrip("/")
        for rule in self.known():
            if rule["operation"] not in ("*", operation):
                continue
            if not fnmatch.fnmatchcase(path, rule["path"]):
                continue
            if (rule.get("direct") and not direct) or (rule.get("unaligned") and border):
                continue
            count = self._counts[rule["name"]] = self._counts.get(rule["name"], 0) + 1
            if rule.get("times") is not None and count > rule["times"]:
                continue
            with open(self._path.with_suffix(".fired"), "a") as told:
                told.write(f"{operation} {path}\n")
            if rule["errno"] is not None:
                raise OSError(rule["errno"], os.strerror(rule["errno"]))
            self._hang(rule["name"])

    def _hang(self, name: str) -> None:
        deadline = time.monotonic() + LONGEST_HANG_SECONDS
        while any(rule["name"] == name for rule in self.known()) and time.monotonic() < deadline:
            time.sleep(0.02)


def serve(backing: str, place: str, rules_path: str, unlinked: str) -> None:
    """Mount, and answer until it is unmounted; `unlinked`: `hide` or `remove` open files."""
    import mfusepy

    rules = Rules(Path(rules_path))
    # Open files → their name, and whether past the page cache. (Unlinked, they have no path.)
    handles: dict[int, tuple[str, bool]] = {}

    def handled(operation: str, fh: int, border: bool = True) -> None:
        path, direct = handles[fh]
        rules.apply(operation, path, direct, border)

    class PassThrough(mfusepy.Operations):
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            if fh is None:
                rules.apply("getattr", path)
            return self.attributes(path, fh)

        def attributes(self, path: str, fh: int | None = None) -> dict[str, Any]:
            stat = os.lstat(backing + path) if fh is None else os.fstat(fh)
            names = ("mode", "nlink", "uid", "gid", "size", "ino", "blocks")
            times = {f"st_{t}": getattr(stat, f"st_{t}_ns") for t in ("atime", "mtime", "ctime")}
            return {f"st_{name}": getattr(stat, f"st_{name}") for name in names} | times

        def readdir(self, path: str, fh: int) -> Any:
            rules.apply("readdir", path)
            names = [".", "..", *os.listdir(backing + path)]
            return [(name, self.attributes(f"{path}/{name}"), 0) for name in names]

        def open(self, path: str, flags: int) -> int:
            rules.apply("open", path, direct=bool(flags & os.O_DIRECT))
            descriptor = os.open(backing + path, flags & ~os.O_DIRECT)
            handles[descriptor] = path, bool(flags & os.O_DIRECT)
            return descriptor

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            rules.apply("create", path)
            descriptor = os.open(backing + path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
            handles[descriptor] = path, False
            return descriptor

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            end = min(offset + size, os.fstat(fh).st_size)
            border = offset % SECTOR == 0 and end % SECTOR == 0
            handled("read", fh, border)
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            border = offset % SECTOR == 0 and len(data) % SECTOR == 0
            handled("write", fh, border)
            return os.pwrite(fh, data, offset)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            if fh is None:
                rules.apply("truncate", path)
                os.truncate(backing + path, length)
            else:
                handled("truncate", fh)
                os.ftruncate(fh, length)
            return 0

        def flush(self, path: str, fh: int) -> int:
            handled("flush", fh)
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            handled("fsync", fh)
            os.fsync(fh)
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            rules.apply("fsyncdir", path)
            return 0

        def release(self, path: str, fh: int) -> int:
            handles.pop(fh)
            os.close(fh)
            return 0

        def mkdir(self, path: str, mode: int) -> int:
            rules.apply("mkdir", path)
            os.mkdir(backing + path, mode)
            return 0

        def rmdir(self, path: str) -> int:
            rules.apply("rmdir", path)
            os.rmdir(backing + path)
            return 0

        def unlink(self, path: str) -> int:
            rules.apply("unlink", path)
            os.unlink(backing + path)
            return 0

        def rename(self, old: str, new: str) -> int:
            rules.apply("rename", old)
            os.rename(backing + old, backing + new)
            return 0

        def symlink(self, target: str, source: str) -> int:
            rules.apply("symlink", target)
            os.symlink(source, backing + target)
            return 0

        def readlink(self, path: str) -> str:
            rules.apply("readlink", path)
            return os.readlink(backing + path)

        def link(self, target: str, source: str) -> int:
            rules.apply("link", target)
            os.link(backing + source, backing + target)
            return 0

        def chmod(self, path: str, mode: int) -> int:
            rules.apply("chmod", path)
            os.chmod(backing + path, mode)
            return 0

        def utimens(self, path: str, times: Any = None) -> int:
            os.utime(backing + path, ns=times)
            return 0

        def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
            handled("fallocate", fh)
            if mode:
                raise OSError(errno.EOPNOTSUPP, "not supported")
            os.posix_fallocate(fh, offset, size)
            return 0

        def statfs(self, path: str) -> dict[str, int]:
            rules.apply("statfs", path)
            stat = os.statvfs(backing + path)
            names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail")
            return {f"f_{name}": getattr(stat, f"f_{name}") for name in (*names, "flag", "namemax")}

    options = dict.fromkeys(("attr_timeout", "entry_timeout", "negative_timeout"), 0)
    options |= {"allow_other": True, "use_ino": True, "hard_remove": unlinked == "remove"}
    mfusepy.FUSE(PassThrough(), place, foreground=True, **options)


if __name__ == "__main__":
    serve(*sys.argv[1:])
