"""Who may change a run folder: its owner, the newest attempt, and nobody else.

An attempt may live on where nobody expects it: on a node that is cut off the network, in a frozen
container, in a forgotten terminal. The owner's name stands in a file of the run folder. Every disk
operation of an attempt is preceded by a look at it (`Storage.guard`), and what an attempt stages or
throws away lies in folders of its own, which its successor sweeps in one rename: even a process
that was frozen between the look and a rename finds nothing to commit.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepstep.output.printable import quoted
from keepstep.policy.selection import SelectionError
from keepstep.ranks.processes import boot_id, stat_of
from keepstep.run_folder.paths import REQUESTS
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, is_file, read_text
from keepstep.run_folder.storage import FULL, Storage
from keepstep.run_folder.storage import NotOwnerError as NotOwnerError

logger = logging.getLogger(__name__)

# A job that makes several attempts names the owner itself: slurm/job.py.
VARIABLE = "KEEPSTEP_OWNER"
# Until an attempt that was killed a moment ago is gone, or a stopped one has saved.
WAIT_SECONDS = 20.0
LOCK = "owner.lock"
ODD = "odd-"  # so begins what had the name of one of the run's files and was none
LOCK_SECONDS = 10.0  # a look takes three; who holds it longer is frozen, and may lose the run
OURS = "machines-"  # so begin the names of attempts that several machines have agreed on
BEAT_SECONDS = 1.0  # between signs of life: the run folder may lie on a network filesystem


@dataclass(frozen=True)
class Owner:
    """An attempt's claim to a run folder.

    Attributes:
        run: the folder.
        token: the attempt's name; a word.
    """

    run: RunFolder
    token: str

    def check(self) -> None:
        """
        Raises:
            NotOwnerError: the run folder names somebody else by now.
            OSError: it cannot be read.
        """
        owner = self.run.owner()
        if owner is None:
            raise NotOwnerError(
                f"no attempt owns {self.run.path} now: was it moved, removed or unmounted?",
                path=self.run.path,
            )
        if owner != self.token:
            raise NotOwnerError(
                f"the run belongs to a newer attempt ({owner}), not to this one", path=self.run.path
            )


def job_facts(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Of the batch job that an attempt is a part of: `job`, `nodes` (of this attempt), `restarts`;
    empty outside of one."""
    if "SLURM_JOB_ID" not in environment:
        return {}
    return {
        "job": environment["SLURM_JOB_ID"],
        "nodes": environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST")),
        "restarts": int(environment.get("SLURM_RESTART_COUNT") or 0),
    }


def claim(
    run: RunFolder,
    storage: Storage,
    patience: float = WAIT_SECONDS,
    waits: Callable[[str], bool] = lambda who: True,
) -> Owner:
    """Make this attempt the owner. One process: the main one.

    An attempt on another machine loses the run to this one. One that can be seen to be at work, on
    this machine or as a batch job, does not: somebody has launched the same run twice.

    Args:
        waits: called again and again with who is at work; whether it is still to be waited for.

    Raises:
        NotOwnerError: it is at work, even after `patience` seconds; or the job that names the owner
            has named another one.
        SelectionError: the run's private folder is none.
    """
    token = os.environ.get(VARIABLE)
    clear_the_way(run, storage)
    if token and _words(run):
        owner = Owner(run, token)
        owner.check()
        return owner
    storage.make_folder(run.private)
    deadline = time.monotonic() + patience
    while True:
        # Of two launches at the same moment one looks after the other has written its name.
        with storage.locked(run.private / LOCK, LOCK_SECONDS):
            who = None if token else at_work(run)
            if who is None:
                token = token or secrets.token_hex(6)
                _take(run, storage, f"{token} {_process(os.getpid())}\n".encode())
                return Owner(run, token)
        if not waits(who) or time.monotonic() > deadline:
            raise NotOwnerError(
                f"{run.path} is being trained by {who}\n"
                f"    Hint: `keepstep stop {quoted(run.path)}` ends it with a save.",
                path=run.path,
            )


def take_over(run: RunFolder, storage: Storage, token: str) -> None:
    """Make an attempt the owner of a folder on another machine than that on which it has claimed
    the run. One process of that machine.

    Raises:
        SelectionError: the run's private folder is none.
    """
    clear_the_way(run, storage)
    storage.make_folder(run.private)
    _take(run, storage, f"{token} {_process(os.getpid())}\n".encode())


def name_owner(run: RunFolder, storage: Storage, token: str) -> None:
    """Make an attempt the owner that is about to be launched, on several machines: as Slurm's jobs
    do. Under the lock.

    Raises:
        SelectionError: the run's private folder is none.
    """
    clear_the_way(run, storage)
    _take(run, storage, f"{token}\n".encode())


def clear_the_way(run: RunFolder, storage: Storage) -> None:
    """Rename what has the name of one of the run's own files or folders, and is none: a folder in a
    file's place would be in the way for ever, and a link leads out of the run.

    Raises:
        SelectionError: the run's private folder is none itself.
    """
    folders = (run.staging, run.trash, run.quarantine, run.pins, run.pinned_aside, run.publishing)
    files = (run.owner_file, run.identity, run.status, run.events, run.heartbeat)
    requests = map(run.request, REQUESTS)
    if not _is_a(stat.S_IFDIR, run.private):
        raise SelectionError(
            f"{run.private} is no folder, but a file or a link\n"
            "    Hint: move it away; what is written there must lie beside the checkpoints.",
            path=run.private,
        )
    for path in (*folders, *files, *requests, run.private / LOCK):
        if _is_a(stat.S_IFDIR if path in folders else stat.S_IFREG, path):
            continue
        aside = path.with_name(f"{ODD}{path.name}-{secrets.token_hex(3)}")
        logger.warning("%s is not what keepstep makes: it is renamed to %s", path, aside.name)
        with contextlib.suppress(FileNotFoundError):  # a launch at the same moment was faster
            storage.rename(path, aside)


def _is_a(kind: int, path: Path) -> bool:
    """Whether what is at `path`, if anything, is of that kind, as far as can be seen; a link is of
    none of these."""
    try:
        return stat.S_IFMT(os.lstat(path).st_mode) == kind
    except OSError:  # nothing, or nobody knows: whoever wants to read it meets the same
        return True


def _take(run: RunFolder, storage: Storage, name: bytes) -> None:
    try:
        storage.replace(run.owner_file, name)
    except OSError as error:
        if error.errno not in FULL or not run.owner_file.exists():
            raise
        storage.overwrite(run.owner_file, name)  # the sweep is to make room, and has to own it


def process_lives(words: Sequence[str]) -> bool | None:
    """Whether the process that an owner's words name is there; None: it is not one of this machine,
    as far as they tell."""
    if not _names_a_process(words) or words[1] != socket.gethostname():
        return None
    return _process(int(words[2])) == " ".join(words[1:])


def this_process_words() -> str | None:
    """This process, as an owner's words name it."""
    return _process(os.getpid())


def _names_a_process(words: Sequence[str]) -> bool:
    return len(words) == 4 and words[2].isdecimal() and len(words[2]) <= 10


def at_work(run: RunFolder) -> str | None:
    """Who works for the run, as far as that can be seen from here; a second or more."""
    words = _words(run)
    if _names_a_process(words):
        pid = int(words[2])
        if pid == os.getpid() or _process(pid) != " ".join(words[1:]):
            return None
        time.sleep(0.2)
        return f"process {pid} of this machine"
    before = _heart(run)
    if len(words) == 1 and before is not None and not is_file(run.status):
        time.sleep(BEAT_SECONDS * 2)
        if _heart(run) != before:
            name = words[0].split(".")[0]
            return "several machines (--nnodes)" if name.startswith(OURS) else f"job {name}"
    return None


def _words(run: RunFolder) -> list[str]:
    """The owner's; none where the file holds something else: nobody has written that."""
    try:
        return run.owner_words()
    except OSError as error:
        if error.errno != errno.EUCLEAN:
            raise
        return []


def _heart(run: RunFolder) -> str | None:
    try:
        return read_text(run.heartbeat)
    except (*ABSENT, OddFileError):
        return None


def _process(pid: int) -> str | None:
    """Host, process id, and when it began, in ticks since the boot; None of one that is gone.

    Ids are given out again, and the clock may be set.
    """
    try:
        (state, began), boot = stat_of(pid), boot_id()
    except OSError:
        return None
    return None if state == "Z" else f"{socket.gethostname()} {pid} {boot}.{began}"
