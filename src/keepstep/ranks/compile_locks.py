"""Locks that a killed process has left where PyTorch compiles DeepSpeed's extensions.

`torch.utils.file_baton` waits for such a file until it is gone, without a word: killed in the
second in which a start holds it, a run's every later start would wait for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from keepstep.output.printable import quoted
from keepstep.policy.mounts import HERE, mount_of

OTHERS_SECONDS = 180.0  # longer than any of them is compiled; a process we cannot see may hold it
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs", "bcachefs"}
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # the kernel's PROC_PID_INIT_INO: all processes are seen


def remove_stale_locks(tell: Callable[[str], None]) -> None:
    """Remove those that nobody holds any more. Before DeepSpeed is first asked for anything.

    Ranks: any; the first of each machine does so, and the others wait for the same file.

    Args:
        tell: a line to whoever watches.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for lock in sorted({*_folder().glob("*/lock"), *_folder().glob("*/*/lock")}):
        _remove_if_stale(lock, tell)


def _remove_if_stale(lock: Path, tell: Callable[[str], None]) -> None:
    began, told = time.monotonic(), False
    while (found := _found(lock)) is not None and not _is_held(lock):
        if _kind_of(lock) not in LOCAL:  # seen by other machines, maybe
            tell(
                f"{lock} is another machine's, which compiles DeepSpeed's extensions, or was left "
                f"by a killed run; if no run begins anywhere: rm {quoted(lock)}"
            )
            return
        age = max(time.time() - found.st_mtime, time.monotonic() - began)
        if age >= OTHERS_SECONDS or _sees_all_of(found.st_uid):
            _remove(lock, found)
            return
        if not told:
            tell(
                f"waiting up to {OTHERS_SECONDS - age:.0f} s for {lock}: another container may "
                "compile DeepSpeed's extensions, or a killed run has left it"
            )
            told = True
        time.sleep(1.0)


def _folder() -> Path:
    """Where torch has its extensions."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.path.realpath(named or os.path.join(cache, "torch_extensions")))


def _found(lock: Path) -> os.stat_result | None:
    try:
        return lock.lstat()
    except FileNotFoundError:
        return None


def _remove(lock: Path, found: os.stat_result) -> None:
    now = _found(lock)
    if now is not None and (now.st_ino, now.st_mtime_ns) == (found.st_ino, found.st_mtime_ns):
        lock.unlink(missing_ok=True)


def _is_held(lock: Path) -> bool:
    """Whether a process that can be seen has it open, as whoever holds it does."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(one.path) == str(lock) for one in os.scandir(folder)):
                return True
        except OSError:  # it has ended, or closed it, or is somebody else's
            continue
    return False


def _sees_all_of(user: int) -> bool:
    """Whether no process of that user is hidden from this one."""
    return user == os.geteuid() and os.readlink("/proc/self/ns/pid") == FIRST_PID_NAMESPACE


def _kind_of(path: Path) -> str:
    """Of the file system that has it."""
    return mount_of(Path(HERE).read_text(errors="surrogateescape"), str(path))[1]
