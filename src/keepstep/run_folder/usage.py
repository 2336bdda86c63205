"""What a run folder takes on the disk. Nothing is changed.

Blocks count, not lengths, and a file with several names counts once. What file systems share behind
that (reflinks, snapshots, compression) cannot be seen from here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from keepstep.run_folder.contents import names_under
from keepstep.run_folder.ownership import ODD
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import TEMPORARY
from keepstep.run_folder.trash import PRUNED, SWEPT

BLOCK = 512  # bytes of one of `st_blocks`, whatever the file system's own are


@dataclass(frozen=True)
class Portion:
    """A part of a run folder.

    Attributes:
        names: what it consists of, in the run folder.
        bytes: what it takes on the disk.
    """

    names: tuple[str, ...]
    bytes: int


def bytes_under(paths: Iterable[Path]) -> int:
    """What they take on the disk, together."""
    return sum({key: size for key, size, _ in _files(paths)}.values())


def bytes_freed(paths: Iterable[Path]) -> int:
    """What the disk has back when they go: not what has another name elsewhere."""
    seen: dict[tuple[int, int], list[int]] = {}
    for key, size, links in _files(paths):
        known = seen.setdefault(key, [size, links, 0])
        known[2] += 1
    return sum(size for size, links, found in seen.values() if found >= links)


def quarantine_of(run: RunFolder) -> Portion:
    """Damaged checkpoints: set aside, and those that lie where they were committed."""
    aside = _children(run.quarantine)
    torn = [run.path / name for name in sorted(run.damaged() | run.lost_manifests())]
    return _portion(run, [*aside, *torn])


def leftovers_of(run: RunFolder, at_work: bool = False) -> Portion:
    """What attempts that were killed left: staged, thrown away, temporary.

    Args:
        at_work: the owner's own part is in use.
    """
    owner = run.owner() if at_work else None
    parts = [p for place in (run.staging, run.trash) for p in _children(place) if p.name != owner]
    found = [part for part in parts if names_under(part)]
    found += sorted(run.private.glob(f"{SWEPT}*"))
    found += sorted(run.private.glob(f"{ODD}*"))
    if not at_work:
        found += sorted(run.private.glob(TEMPORARY))
    found += [run.path / n for n in run.folders() if os.path.lexists(run.path / n / PRUNED)]
    return _portion(run, found)


def _portion(run: RunFolder, paths: list[Path]) -> Portion:
    names = tuple(path.relative_to(run.path).as_posix() for path in paths)
    return Portion(names, bytes_under(paths))


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _files(paths: Iterable[str | Path]) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Device and inode, bytes on the disk, and number of names; folders have one, of themselves."""
    for path in paths:
        try:
            status = os.lstat(path)
            is_folder = stat.S_ISDIR(status.st_mode)
            below = os.listdir(path) if is_folder else []
        except OSError:  # gone in this moment, or not ours to see
            continue
        yield (
            (status.st_dev, status.st_ino),
            status.st_blocks * BLOCK,
            1 if is_folder else status.st_nlink,
        )
        yield from _files(os.path.join(path, name) for name in below)
