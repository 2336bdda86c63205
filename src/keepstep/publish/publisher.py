"""Publishes the best checkpoint while a run goes on, and at its end. The main process's alone.

At most one push is under way; while it is, or too soon after one, the newest best waits its turn.
Nothing here is waited for before the run has ended.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from keepstep.output.progress import Phase
from keepstep.policy.retention import Policy
from keepstep.policy.strict import with_check
from keepstep.publish.bundle import freeze
from keepstep.publish.process import Push, push_of
from keepstep.publish.remote import Target
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import Storage

logger = logging.getLogger(__name__)

Record = Callable[..., None]


class Publisher:
    """
    Attributes:
        run: whose best checkpoint is published.
        target: where to.
        news: what came of the last push, until somebody takes it.
    """

    def __init__(
        self,
        run: RunFolder,
        policy: Policy,
        target: Target,
        record: Record,
        storage: Storage,
        *,
        pause: float,
        timeout: float,
    ) -> None:
        """
        Args:
            record: writes an event down.
            storage: changes the disk, while the run is this attempt's.
            pause: seconds from the beginning of a push to the next one's, at least.
            timeout: seconds that a push may take.
        """
        self.run, self.target, self.policy = run, target, policy
        self.news: dict[str, Any] | None = None
        self._record, self._pause, self._timeout = record, pause, timeout
        self._storage = storage
        self._push: Push | None = None
        self._began = float("-inf")
        self._done: dict[int, dict[str, Any]] = {}  # step → what came of its push
        self._safely(self._prepare)

    def offer(self, best: Checkpoint | None) -> None:
        """The best checkpoint now; it is pushed if that has not been done, in its time."""
        self._safely(self._hear)
        waited = time.monotonic() - self._began >= self._pause
        if best is not None and waited and self._push is None and self._failed(best):
            self._safely(lambda: self._start(best, self._timeout))

    def owes(self, best: Checkpoint) -> bool:
        """Whether that checkpoint is on its way, or still to be pushed."""
        self._safely(self._hear)
        return self._failed(best)

    def finish(
        self,
        best: Checkpoint | None,
        stop: Callable[[], str | None] = lambda: None,
        tell: Callable[[Phase], None] = lambda phase: None,
    ) -> dict[str, Any]:
        """Push the best checkpoint if it has not been pushed, and wait: until it is there, the
        time of a push is over, or `stop` says why not to; `tell` is told how far it is. Returns
        what came of it."""
        self.abandon(unless=best.step if best else None)
        if best is None:
            return {"error": "the run has no best checkpoint"}
        end = time.monotonic() + self._timeout
        for _ in range(2):  # one that was under way may have failed of what is over by now
            if self._push is None and self._failed(best):
                self._safely(lambda: self._start(best, end - time.monotonic(), waited_for=True))
            if self._push is not None:
                self._push.wait(stop, tell)
                self._safely(self._hear)
            told = self._done.get(best.step, {})
            # In a moment that is left another one would only hide why this one failed.
            short = end - time.monotonic() < self._timeout / 2
            if "error" not in told or told.get("fatal") or stop() or short:
                break
        return self._done.get(best.step, {"error": "it could not be begun: see the log"})

    def abandon(self, unless: int | None = None) -> None:
        """End the push under way, unless it is of that step."""
        self._safely(self._hear)
        if self._push is not None and self._push.step != unless:
            self._push.stop()
            self._push = None
            self._safely(self._sweep)

    def _safely(self, action: Callable[[], None]) -> None:
        """Publishing ends no training: a full disk, a process that cannot be started."""
        try:
            action()
        except Exception as error:
            logger.warning("publishing: %s: %s", type(error).__name__, error)

    def _prepare(self) -> None:
        self._storage.make_folder(self.run.publishing)
        self._sweep()
        text = with_check(json.dumps(asdict(self.target)))
        self._storage.replace(self.run.target, text.encode() + b"\n")

    def _failed(self, best: Checkpoint) -> bool:
        """Whether nothing has come of pushing it so far."""
        return "error" in self._done.get(best.step, {"error": "not tried"})

    def _start(self, best: Checkpoint, timeout: float, waited_for: bool = False) -> None:
        frozen = self.run.publishing / best.path.name
        self._began = time.monotonic()
        try:
            freeze(best, frozen, self._storage, copy=waited_for)
        except FileNotFoundError:
            return  # it was pruned this very moment: a better one has come
        log = self.run.publishing / "push.log"
        told: Any = {"waited_for": waited_for}
        self._push = push_of(frozen, best.step, self.policy, self.target, timeout, log, **told)

    def _hear(self) -> None:
        """Take in what came of the push, if it has ended."""
        answer = self._push.poll() if self._push else None
        if answer is None or self._push is None or self._push.step is None:
            return
        seconds = round(time.monotonic() - self._began, 1)
        self.news = {"step": self._push.step, **answer, "seconds": seconds}
        self._done[self._push.step] = answer
        self._push = None
        self._record("publish", **{**self.news, "repo_id": self.target.repo_id})
        self._sweep()

    def _sweep(self) -> None:
        """Frozen files of pushes that are over would keep pruned bytes on the disk."""
        for folder in self.run.publishing.iterdir():
            if folder.is_dir():
                self._storage.remove(folder)
