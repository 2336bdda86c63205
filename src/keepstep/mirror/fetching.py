"""Files of a checkpoint from a mirror to this disk, by hand: all, or what an export reads."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from keepstep.errors import KeepstepError
from keepstep.mirror.reading import checked, in_order
from keepstep.mirror.store import StoreError
from keepstep.mirror.view import MirroredRun
from keepstep.output.units import human_bytes
from keepstep.policy.manifest import MANIFEST_NAME, FileEntry
from keepstep.policy.mirror import what_is_missing
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.evaluations import EVALUATIONS_NAME
from keepstep.run_folder.storage import FULL, Storage


class NoRoomError(KeepstepError, OSError):
    """The disk has no room for what is to be written there."""


def fetch_files(
    run: MirroredRun,
    step: int,
    wanted: Mapping[str, FileEntry],
    folder: Path,
    storage: Storage,
) -> Checkpoint:
    """These files of a checkpoint into a folder, durable there, each compared with its digest.

    Args:
        wanted: of its manifest.
    Returns:
        The checkpoint with these files alone.

    Raises:
        StoreError, TextError: they are not what was written there.
        OSError: of the disk.
    """
    found = run.checkpoint_at(step)
    subset = replace(found.manifest, files=dict(wanted))
    parts = [part for part in run.parts(step) if part.file in wanted]
    missing = what_is_missing(subset, parts)
    if missing:
        raise StoreError(f"{folder.name}: {missing[0]} is missing", fatal=False)
    names = [f"{run.there[step].folder}/{part.name}" for part in parts]
    contents = in_order(run.store, names)
    for name, own in groupby(parts, key=lambda part: part.file):
        storage.make_folder((folder / name).parent)
        with storage.create(folder / name, sync=False) as file:
            for part in own:
                file.write(checked(part, next(contents)))
                run.progress(part.bytes)
        if file.xxh3_128 != subset.files[name].xxh3_128:
            raise StoreError(f"{folder.name}: {name} is not what was written", fatal=False)
    for name in subset.files:
        storage.sync(folder / name)
    return Checkpoint(folder, subset, found.evaluated)


def fetch_whole(run: MirroredRun, step: int, folder: Path, storage: Storage) -> Checkpoint:
    """All of a checkpoint, its manifest the last. Raises as `fetch_files`."""
    listed = run.checkpoint_at(step)
    found = fetch_files(run, step, listed.manifest.files, folder, storage)
    for name in (EVALUATIONS_NAME, MANIFEST_NAME):
        if (listed.path / name).exists():
            storage.copy(listed.path / name, folder / name)
    return found


@contextmanager
def scratch_folder(folder: Path, storage: Storage) -> Iterator[Path]:
    """A new folder for what is fetched, gone at the end, however that comes."""
    if folder.exists():  # of one that was killed
        storage.remove(folder)
    storage.make_folder(folder)
    try:
        yield folder
    finally:
        storage.remove(folder)


@contextmanager
def room_for(needed: int, folder: Path) -> Iterator[None]:
    """Whether the disk has the room, before it is taken; and what was needed, if it has not in the
    end.

    Args:
        needed: bytes.
        folder: that is going to be made.

    Raises:
        NoRoomError: it has not.
    """
    place = folder.absolute().parent
    while not place.exists():
        place = place.parent

    def told() -> str:
        free = human_bytes(shutil.disk_usage(place).free)
        return (
            f"the disk of {place} is too small: {human_bytes(needed)} are needed, {free} are free"
        )

    if shutil.disk_usage(place).free < needed:
        raise NoRoomError(told(), path=folder, errno=errno.ENOSPC)
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or isinstance(error, NoRoomError):
            raise
        raise NoRoomError(told(), path=folder, errno=error.errno) from error
