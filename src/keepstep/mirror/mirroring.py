"""Copies checkpoints to a mirror while a run goes on, and at its end. The main process's alone.

One copy is under way at a time; while it is, or too soon after one, the newest waits its turn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from keepstep.mirror.owners import Owner
from keepstep.policy.retention import Policy
from keepstep.run_folder.background import BackgroundJob
from keepstep.run_folder.freezing import freeze
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import NO_LINK, Storage

logger = logging.getLogger(__name__)


class Mirroring:
    """
    Attributes:
        news: what came of copies, until somebody takes it.
        deposed: another machine has the run: what is said of that; empty: none has.
    """

    def __init__(
        self,
        run: RunFolder,
        url: str,
        owner: Owner | None,
        policy: Policy,
        storage: Storage,
        *,
        pause: float,
        timeout: float,
        rate: float,
        node: int = 0,
        nodes: int = 1,
    ) -> None:
        """
        Args:
            owner: who this attempt is there; None: the first copy finds out.
            policy: what is kept there.
            storage: changes the disk, while the run is this attempt's.
            pause: seconds from the beginning of a copy to the next one's, at least.
            timeout: seconds that a copy may take.
            rate: bytes a second at most; 0: as fast as it goes.
            node: this machine's number, where each uploads its part of a checkpoint.
            nodes: how many machines do.
        """
        self.run, self.url, self.owner = run, url, owner
        self.news: list[dict[str, Any]] = []
        self.deposed = ""
        self._policy, self._storage = policy, storage
        self._pause, self._timeout, self._rate = pause, timeout, rate
        self._node, self._nodes = node, nodes
        self._job: BackgroundJob | None = None
        self._step = -1  # that is under way
        self._began = float("-inf")
        self._done: dict[int, dict[str, Any]] = {}  # step → what came of it
        self._safely(self._sweep)

    def offer(self, newest: Checkpoint | None, best: Checkpoint | None) -> None:
        """The newest and the best checkpoint now; each is copied in its time."""
        self.hear()
        wanted = self.wanted(newest, best)
        if wanted is not None:
            self.begin(wanted)

    def hear(self) -> None:
        """Take in what came of the copy under way, if it has ended."""
        self._safely(self._hear)

    def wanted(self, newest: Checkpoint | None, best: Checkpoint | None) -> Checkpoint | None:
        """What should be copied next; None: nothing, or not yet."""
        if self._job is not None or self.deposed or time.monotonic() - self._began < self._pause:
            return None
        return next((c for c in (newest, best) if c is not None and self._owes(c)), None)

    def begin(self, checkpoint: Checkpoint) -> None:
        """Begin to copy it."""
        self._safely(lambda: self._start(checkpoint, self._timeout))

    def begin_step(self, step: int) -> None:
        """The same of this machine's part of a step, which the main process has chosen."""
        here = {checkpoint.step: checkpoint for checkpoint in self.run.checkpoints()}
        self._step = step
        if step in here:
            self.begin(here[step])
        if self._job is None:
            self._done.setdefault(step, {"error": "this machine has no part of it"})

    @property
    def is_busy(self) -> bool:
        """Whether a copy is under way."""
        return self._job is not None

    @property
    def has_failed(self) -> bool:
        """Whether the last copy that began has come to nothing."""
        return self._job is None and "error" in self._done.get(self._step, {})

    def finish(
        self,
        newest: Checkpoint | None,
        best: Checkpoint | None,
        seconds: float,
        stop: Callable[[], str | None],
    ) -> list[str]:
        """Copy the newest and the best, and wait for both, for so long, or until `stop` says why
        not to. Returns why one is not there."""
        end, faults = time.monotonic() + seconds, []
        if self._step not in [c.step for c in (newest, best) if c is not None]:
            self.abandon()
        for wanted in (newest, best):
            self._wait(end, stop)
            if wanted is None or not self._owes(wanted) or self.deposed:
                continue
            left = end - time.monotonic()
            if left > 0 and not stop():
                self._safely(lambda c=wanted, left=left: self._start(c, left))  # type: ignore[misc]
                self._wait(end, stop)
            if self._owes(wanted):
                told = self._done.get(wanted.step, {}).get("error", "there was no time for it")
                faults.append(f"{wanted.path.name} is not on the mirror: {told}")
        return faults

    def owes(self, checkpoint: Checkpoint | None) -> bool:
        """Whether it is on its way, or still to be copied."""
        self._safely(self._hear)
        return checkpoint is not None and self._owes(checkpoint)

    def abandon(self) -> None:
        """End the copy under way: another attempt finds what is there of it."""
        if self._job is not None:
            self._job.stop()
            self._job = None
            self._safely(self._sweep)

    def _owes(self, checkpoint: Checkpoint) -> bool:
        return "error" in self._done.get(checkpoint.step, {"error": "not tried"})

    def _wait(self, end: float, stop: Callable[[], str | None]) -> None:
        if self._job is not None:
            over = lambda: "its time was over" if time.monotonic() > end else stop()  # noqa: E731
            self._job.wait(over)
            self._safely(self._hear)

    def _safely(self, action: Callable[[], None]) -> None:
        """A mirror ends no training: a full disk, a process that cannot be started."""
        try:
            action()
        except Exception as error:
            logger.warning("mirror: %s: %s", type(error).__name__, error)

    def _start(self, checkpoint: Checkpoint, timeout: float) -> None:
        frozen = self.run.mirroring / checkpoint.path.name
        self._began = time.monotonic()
        try:
            # Its manifest as it was committed: what is measured later is an object of its own.
            as_committed = replace(checkpoint, evaluated={})
            freeze(as_committed, frozen, self._storage, list(checkpoint.manifest.files))
        except FileNotFoundError:
            return  # it was pruned this very moment: a newer one has come
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            # No second names on this file system, and a copy would keep training waiting: if it is
            # pruned meanwhile, the upload fails, and a newer one is sent.
            frozen = checkpoint.path
        job = {
            "url": self.url,
            "owner": asdict(self.owner) if self.owner else None,
            "token": self.run.owner(),
            "run": str(self.run.path),
            "frozen": str(frozen),
            "policy": asdict(self._policy),
            "pinned": sorted(self.run.pinned()),
            "rate": self._rate,
            "node": self._node,
            "nodes": self._nodes,
        }
        self._step = checkpoint.step
        told: Any = {"who": "the mirror", "what": "the copy", "log": self.run.mirroring / "log"}
        self._job = BackgroundJob("keepstep.mirror.job", job, timeout, **told)

    def _hear(self) -> None:
        """Take in what came of the copy, if it has ended."""
        answer = self._job.poll() if self._job else None
        if answer is None:
            return
        self._job = None
        self._done[self._step] = answer
        if "owner" in answer:
            self.owner = Owner(**answer.pop("owner"))
        self.deposed = answer["error"] if answer.get("deposed") else self.deposed
        seconds = round(time.monotonic() - self._began, 1)
        self.news.append({"step": self._step, **answer, "seconds": seconds})
        self._sweep()

    def _sweep(self) -> None:
        """Frozen files of copies that are over would keep pruned bytes on the disk."""
        self._storage.make_folder(self.run.mirroring)
        for folder in self.run.mirroring.iterdir():
            if folder.is_dir():
                self._storage.remove(folder)
