"""What a person removes from a run that nobody works for. One process.

Checkpoints go in a rename each, as an attempt prunes; all renames happen under the lock that a
launch takes, and each is preceded by a look whether one has begun. What is put aside is removed
afterwards; killed in between, the next launch, or the next command, removes it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from keepstep.errors import KeepstepError
from keepstep.policy.manifest import folder_name
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.ownership import LOCK, LOCK_SECONDS, ODD, at_work, process_lives
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, is_file, read_object
from keepstep.run_folder.storage import NotOwnerError, Storage
from keepstep.run_folder.trash import SWEPT
from keepstep.run_folder.usage import leftovers_of, quarantine_of

SILENT_SECONDS = 120.0  # a heartbeat on a network filesystem may be seen as late as that
SCARCE = 2**20  # bytes free, below which a line of the log may find no place before the removal


class AtWorkError(KeepstepError):
    """An attempt works for the run, or may: nothing is removed by hand."""


def who_works(run: RunFolder) -> str | None:
    """Who works for the run, as far as that can be seen from here; a few seconds, where its owner
    is no process of this machine.

    Raises:
        OSError: the owner cannot be read now.
    """
    words = run.owner_words()
    if not words or _has_ended(run, words[0]):
        return None
    found = at_work(run)
    if found is not None or process_lives(words) is not None:
        return found
    try:
        silent = time.time() - os.lstat(run.heartbeat).st_mtime
    except OSError:
        return None
    if silent > SILENT_SECONDS:
        return None
    where = f"on {words[1]}" if len(words) == 4 else "of a job"
    return f"an attempt {where}, heard of {max(0.0, silent):.0f} s ago"


def may_be_at_work(run: RunFolder) -> bool:
    """Whether that cannot be ruled out by a short look."""
    try:
        words = run.owner_words()
    except OSError:
        return True
    return bool(words) and not _has_ended(run, words[0]) and process_lives(words) is not False


def stop_if_at_work(run: RunFolder) -> None:
    """
    Raises:
        AtWorkError: somebody works for the run.
    """
    who = who_works(run)
    if who is not None:
        raise AtWorkError(f"{run.path} is being trained by {who}", path=run.path)


def _has_ended(run: RunFolder, owner: str) -> bool:
    """Whether this owner has told of its end: its process may live on, as a notebook's does."""
    try:
        return is_file(run.status) and read_object(run.status).get("owner") == owner
    except (*ABSENT, OddFileError):
        return False


@contextlib.contextmanager
def alone(run: RunFolder, storage: Storage) -> Iterator[Storage]:
    """Keep launches out of the block, which is short.

    Yields:
        A storage that changes nothing any more once a launch has begun all the same.

    Raises:
        AtWorkError: somebody works for the run.
    """
    with storage.locked(run.private / LOCK, LOCK_SECONDS):
        stop_if_at_work(run)
        before = _seen(run)

        def check() -> None:
            if _seen(run) != before:
                raise NotOwnerError(f"{run.path} has been launched in this moment", path=run.path)

        guarded = Storage(storage.before)
        guarded.guard(check)
        yield guarded


def _seen(run: RunFolder) -> tuple[list[str], bool]:
    return run.owner_words(), is_file(run.status)


class ByHand:
    """Removes what a person has named, and writes down who did.

    Attributes:
        keeper: by which it is done.
        by: the command, and whose it is.
    """

    def __init__(self, run: RunFolder, command: str, storage: Storage | None = None) -> None:
        self.run, self.storage = run, storage or Storage()
        self.keeper = Keeper(run, run.policy(), self.storage)
        self.by = f"{command}, {_person()}"

    def remove(self, reasons: Mapping[int, str], first: Sequence[int] | None = None) -> list[int]:
        """Remove checkpoints of this run: step → why; returns the steps that went.

        Args:
            first: the order in which they go; None: the oldest first.

        Raises:
            AtWorkError: nothing is removed; NotOwnerError: a launch has begun, some may be gone.
        """
        aside: dict[int, Path] = {}
        full = self.storage.free(self.run.path) < SCARCE  # then a line has to wait for the removal
        try:
            with alone(self.run, self.storage) as guarded:
                keeper = Keeper(self.run, self.keeper.policy, guarded, self.keeper.owner)
                for step in first or sorted(reasons):
                    with self.keeper.setbacks.allowed(f"{folder_name(step)} is not removed"):
                        aside[step] = keeper.trash.take(self.run.path / folder_name(step))
                        if not full:
                            self._write_down(step, reasons[step])
                keeper.point()
        finally:
            for place in aside.values():
                self.keeper.trash.empty(place)
            for step in aside if full else ():
                self._write_down(step, reasons[step])
        return sorted(aside)

    def _write_down(self, step: int, reason: str) -> None:
        self.keeper.record("prune", step=step, reason=reason, by=self.by)

    def discard_quarantine(self) -> tuple[str, ...]:
        """Remove the damaged checkpoints; returns their names.

        Raises:
            AtWorkError: nothing is removed.
        """
        portion = quarantine_of(self.run)
        aside: list[Path] = []
        with alone(self.run, self.storage) as guarded:
            for name in portion.names:
                target = self.run.private / f"{SWEPT}damaged-{secrets.token_hex(4)}"
                with self.keeper.setbacks.allowed(f"{name} is not removed"):
                    guarded.rename(self.run.path / name, target)
                    aside.append(target)
        self._discarded("quarantine", portion.names, portion.bytes)
        for place in aside:
            with self.keeper.setbacks.allowed(f"{place.name} is not removed"):
                self.storage.remove(place)
        return portion.names

    def discard_leftovers(self) -> tuple[str, ...]:
        """Remove what killed attempts left, as the next launch would; returns the names.

        Raises:
            AtWorkError: nothing is removed.
        """
        portion = leftovers_of(self.run)
        with alone(self.run, self.storage) as guarded:
            keeper = Keeper(self.run, self.keeper.policy, guarded, self.keeper.owner)
            keeper.trash.sweep()
            for name in portion.names:
                if Path(name).name.startswith(ODD):
                    with self.keeper.setbacks.allowed(f"{name} is not removed"):
                        guarded.remove(self.run.path / name)
        self._discarded("leftovers", portion.names, portion.bytes)
        return portion.names

    def _discarded(self, what: str, names: Sequence[str], size: int) -> None:
        if names:
            self.keeper.record("discard", what=what, names=list(names), bytes=size, by=self.by)


def published_by(run: RunFolder) -> dict[int, str]:
    """The step that was published last, and where; nothing, if a mirror has a copy of it."""
    found: dict[int, str] = {}
    for event in run.events_read()[0]:
        told = event["event"] == "publish" and "error" not in event
        if told and event.get("outcome") != "refused" and isinstance(event.get("step"), int):
            found = {event["step"]: str(event.get("repo_id"))}
    mirrored = run.mirrored()
    return {step: where for step, where in found.items() if step not in mirrored}


def runs_beside(run: RunFolder) -> dict[int, str]:
    """Steps of this run at which other runs began that lie beside it: step → the run's name."""
    own = run.run_id()
    found: dict[int, str] = {}
    for other in sorted(run.path.resolve().parent.iterdir()):
        if other == run.path.resolve() or not (other / run.private.name).is_dir():
            continue
        for attempt in RunFolder(other).attempts():
            name, _, step = (attempt.request or "").partition(" ")[0].rpartition("@")
            if name == own and step.isdecimal():
                found.setdefault(int(step), other.name)
    return found


def _person() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in a container
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"
