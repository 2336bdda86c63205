"""Where everything lies in a run folder, and what its smallest files say: owner, requests, pins."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from keepstep.run_folder.safe_read import ABSENT, SMALL, OddFileError, is_file, read_text

PRIVATE = ".keepstep"
REQUESTS = ("stop", "save-now")  # files of these names: what somebody asks of a running attempt


class RunPaths:
    """The names of a run folder's own files and folders.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.private = self.path / PRIVATE
        self.samples_file = self.path / "samples.jsonl"  # for people, too
        self.staging = self.private / "staging"
        self.trash = self.private / "trash"
        self.quarantine = self.private / "quarantine"
        self.pins = self.private / "pins"
        self.pinned_aside = self.private / "pinned"  # pinned, and their steps saved again
        self.publishing = self.private / "publish"
        self.mirroring = self.private / "mirror"
        self.target = self.publishing / "target.json"
        self.events = self.private / "events.jsonl"
        self.identity = self.private / "run.json"
        self.status = self.private / "status.json"
        self.owner_file = self.private / "owner"
        self.metrics = self.private / "metrics.prom"
        self.heartbeat = self.private / "heartbeat"
        self.trackers = self.private / "trackers.json"  # what trackers have been given
        self.launched = self.private / "launched"  # what each attempt was launched as
        self.place = self.private / "place.json"  # whose disk it is, where that is a machine's own
        self.job = self.private / "job"  # what slurm/submit.sh has put there

    def history(self) -> dict[str, Path]:
        """What another machine needs of the run beside its checkpoints. run.json is the last: with
        it a folder is the run's."""
        files = (self.samples_file, self.trackers, self.events, self.identity)
        return {path.name: path for path in files}

    def request(self, name: str) -> Path:
        """The file that asks for one of `REQUESTS`."""
        return self.private / name

    def requests(self) -> tuple[str, ...]:
        """What somebody has asked for."""
        return tuple(name for name in REQUESTS if is_file(self.request(name)))

    def owner(self) -> str | None:
        """The name of the attempt that may change the folder (see ownership.py), None of none."""
        return next(iter(self.owner_words()), None)

    def owner_words(self) -> list[str]:
        """The owner's name, and its process where that is known: host, id, beginning.

        Raises:
            OSError: it cannot be read, or is not what an owner writes.
        """
        try:
            return read_text(self.owner_file, SMALL).split()
        except ABSENT:
            return []
        except OddFileError as error:
            raise OSError(errno.EUCLEAN, str(error), str(self.owner_file)) from error

    def pinned(self) -> set[int]:
        """Steps that somebody asked to keep (`keepstep pin`). A link is not followed.

        Raises:
            OSError: they cannot be read now.
        """
        try:
            if not stat.S_ISDIR(os.lstat(self.pins).st_mode):
                return set()
            return {int(name) for name in os.listdir(self.pins) if name.isdecimal()}
        except ABSENT:
            return set()
