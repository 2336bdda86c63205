"""Copies checkpoints to a mirror while a run goes on, and at its end. Of each machine one process.

One copy is under way at a time; while it is, or too soon after one, the newest waits its turn. A
store that fails for hours costs a few lines, and is caught up with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic as now
from typing import Any

from keepstep.mirror.owners import Owner
from keepstep.output.printable import quoted
from keepstep.output.progress import Phase
from keepstep.output.units import human_bytes, human_duration
from keepstep.policy.manifest import Manifest
from keepstep.policy.mirror_pace import Pace, is_due
from keepstep.policy.retention import Policy
from keepstep.run_folder.background import BackgroundJob
from keepstep.run_folder.freezing import freeze
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.storage import NO_LINK, Storage

logger = logging.getLogger(__name__)
Take = Callable[[dict[str, Any]], None]
NOT_TRIED = {"error": "not tried"}


@dataclass(frozen=True)
class Share:
    """What one of several machines sends.

    Attributes:
        node: the machine's number; the first one writes manifests.
        nodes: how many machines send.
        apart: whether the run folder is each machine's own.
        files: of a checkpoint, by its manifest here.
    """

    node: int = 0
    nodes: int = 1
    apart: bool = False
    files: Callable[[Manifest], Sequence[str]] = lambda manifest: list(manifest.files)

    @property
    def freezes(self) -> bool:
        """Whether this machine sets checkpoints aside to be sent; else the first one does."""
        return self.apart or self.node == 0


class Mirroring:
    """
    Attributes:
        news: what came of copies, until somebody takes it.
        lines: the same for people, who do not hear of every failure.
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
        share: Share | None = None,
        every: int = 1,
    ) -> None:
        """
        Args:
            owner: who this attempt is there; None: the first copy finds out.
            policy: what is kept there.
            storage: changes the disk, while the run is this attempt's.
            pause: seconds from the beginning of a copy to the next one's, at least.
            timeout: seconds that a copy may take.
            rate: bytes a second at most; 0: as fast as it goes.
            share: this machine's part of each checkpoint; None: all of it.
            every: of so many saves one is copied; the best and the last always.
        """
        self.run, self.url, self.owner = run, url, owner
        self.news: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.deposed = ""
        self._policy, self._storage = policy, storage
        self._pace, self._every = Pace(pause), every
        self._timeout, self._rate = timeout, rate
        self._share = share or Share()
        self._job: BackgroundJob | None = None
        self._take_answer: Take = self._take  # what is done with what comes of it
        self._step = -1  # that is under way
        self._began = float("-inf")
        self._done: dict[int, dict[str, Any]] = {}  # step → what came of it
        self._saved: list[int] = []  # steps, as they came
        self._objects: dict[int, int] = {}  # step → how many objects were there at the last look
        name = f"log-{self._share.node}" if self._share.node and not self._share.apart else "log"
        self._log = run.mirroring / name
        self._ending = False  # who waits is told why not; nothing is tried again
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
        if newest is not None and newest.step not in self._saved[-1:]:
            self._saved.append(newest.step)
        if self._job is not None or self.deposed or now() < self._pace.not_before:
            return None
        copied = [step for step in self._saved if "error" not in self._done.get(step, NOT_TRIED)]
        due = newest if is_due(self._saved, copied, self._every) else None
        return next((c for c in (due, best) if c is not None and self._owes(c)), None)

    def begin(self, checkpoint: Checkpoint) -> None:
        """Begin to copy it."""
        self._start(checkpoint, self._timeout)

    def begin_step(self, step: int) -> None:
        """The same of this machine's part of a step, which the main process has begun to copy."""
        self._step = step

        def begin() -> None:
            here = {checkpoint.step: checkpoint for checkpoint in self.run.checkpoints()}
            if step in here:
                self.begin(here[step])

        self._safely(begin)
        if self._job is None:
            self._done.setdefault(step, {"error": "this machine has no part of it"})

    def claim(self) -> None:
        """Become the run's owner there, in a process of its own: the store may be away."""
        job = {"url": self.url, "token": self.run.owner()}
        self._safely(lambda: self._run(job, self._timeout, self._take_owner))

    @property
    def is_busy(self) -> bool:
        """Whether a copy is under way."""
        return self._job is not None

    @property
    def step(self) -> int:
        """Of the last copy that began."""
        return self._step

    @property
    def failure(self) -> dict[str, Any] | None:
        """What came of the last copy that began, if that has failed; else None."""
        answer = self.came_of(self._step)
        return answer if self._job is None and "error" in answer else None

    def came_of(self, step: int) -> dict[str, Any]:
        """What came of a checkpoint's last copy; empty: it was not tried."""
        return self._done.get(step, {})

    def fail(self, answer: dict[str, Any]) -> None:
        """End the copy under way: another machine's part has failed so, and would be waited for in
        vain."""
        if self._job is not None:
            self.abandon()
            self._take({**answer})

    def finish(
        self,
        newest: Checkpoint | None,
        best: Checkpoint | None,
        seconds: float,
        stop: Callable[[], str | None],
        tell: Callable[[Phase], None] = lambda phase: None,
    ) -> list[str]:
        """Copy the newest and the best, and wait for both, for so long, or until `stop` says why
        not to; `tell` is told how far it is: phase 1, while bytes are sent. Returns why one is not
        there."""
        end, faults, self._ending = now() + seconds, [], True
        last = {c.step: c for c in (newest, best) if c is not None}  # they may be one
        if self._step not in last:
            self.abandon()
        for wanted in last.values():
            self._wait(end, stop, tell)
            if not self._owes(wanted) or self.deposed:
                continue
            left = end - now()
            if left > 0 and not stop():
                self._start(wanted, left)
                self._wait(end, stop, tell)
            if self._owes(wanted):
                told = self._done.get(wanted.step, {}).get("error", "there was no time for it")
                faults.append(f"{wanted.path.name} is not on the mirror: {told}")
        return faults

    def owes(self, checkpoint: Checkpoint | None) -> bool:
        """Whether it is on its way, or still to be copied."""
        self._safely(self._hear)
        return checkpoint is not None and self._owes(checkpoint)

    @property
    def failed(self) -> list[int]:
        """Steps whose copy has come to nothing, or is whole there no more."""
        return [step for step, answer in self._done.items() if "error" in answer]

    def owe(self, steps: Sequence[int]) -> None:
        """These have failed, as the main process knows, which alone looks at what is whole there:
        this machine owes its part again."""
        for step in steps:
            self._done.pop(step, None)

    def wait(self) -> None:
        """Until the copy under way is over."""
        self._wait(float("inf"), lambda: None)

    def lacks(self) -> str:
        """For people: which checkpoints of the run folder are not there, as far as is known."""
        there = [s for s, (_, url) in self.run.mirrored().items() if url == self.url]
        names = [c.path.name for c in self.run.checkpoints() if c.step not in there]
        newest = f"the newest is checkpoint-{max(there)}" if there else "nothing is"
        return (
            f"{self.url} lacks {len(names)} of the checkpoints here ({', '.join(names)}); there "
            f"{newest}\n    Hint: {self._sender} sends what is to be there"
        )

    @property
    def _sender(self) -> str:
        """For people: what sends a checkpoint when no copy of this attempt does."""
        if self._share.apart:  # no machine has all of it
            return "the run, launched again,"
        return f"`keepstep sync {quoted(self.run.path)}`"

    def abandon(self) -> None:
        """End the copy under way: another attempt finds what is there of it."""
        if self._job is not None:
            self._job.stop()
            self._job = None
            self._safely(self._sweep)

    def _owes(self, checkpoint: Checkpoint) -> bool:
        return "error" in self._done.get(checkpoint.step, NOT_TRIED)

    def _wait(
        self,
        end: float,
        stop: Callable[[], str | None],
        tell: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        if self._job is not None:
            over = lambda: "its time was over" if now() > end else stop()  # noqa: E731
            self._job.wait(over, tell)
            self._safely(self._hear)

    def _safely(self, action: Callable[[], None]) -> None:
        """A mirror ends no training: a full disk, a process that cannot be started."""
        try:
            action()
        except Exception as error:
            logger.warning("mirror: %s: %s", type(error).__name__, error)

    def _start(self, checkpoint: Checkpoint, timeout: float) -> None:
        self._step, self._began = checkpoint.step, now()
        self._pace = self._pace.begun(self._began)
        try:
            self._send(checkpoint, timeout)
        except Exception as error:  # a full disk, a process that cannot be started
            logger.debug("mirror", exc_info=True)
            self._take({"error": f"{type(error).__name__}: {error}", "fatal": False})

    def _send(self, checkpoint: Checkpoint, timeout: float) -> None:
        share = self._share
        files = list(share.files(checkpoint.manifest))
        frozen: Path | None = self.run.mirroring / checkpoint.path.name
        if share.freezes:
            frozen = self._freeze(checkpoint, files if share.apart else None)
        if frozen is None:
            return  # it was pruned this very moment: a newer one has come
        job = {
            "url": self.url,
            "owner": asdict(self.owner) if self.owner else None,
            "token": self.run.owner(),
            "run": str(self.run.path),
            "frozen": str(frozen),
            "files": None if share.apart or share.nodes == 1 else files,
            "policy": asdict(self._policy),
            "pinned": sorted(self.run.pinned()),
            "rate": self._rate,
            "node": share.node,
            "nodes": share.nodes,
            "waited_for": self._ending,
        }
        self._run(job, timeout, self._take)

    def _freeze(self, checkpoint: Checkpoint, files: Sequence[str] | None) -> Path | None:
        """Set these files (None: all) of a checkpoint aside. Where they lie; None: it is gone."""
        frozen = self.run.mirroring / checkpoint.path.name
        try:
            # Its manifest as it was committed: what is measured later is an object of its own.
            as_committed = replace(checkpoint, evaluated={})
            wanted = list(checkpoint.manifest.files) if files is None else files
            freeze(as_committed, frozen, self._storage, wanted)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            # No second names on this file system, and a copy would keep training waiting: if it is
            # pruned meanwhile, the upload fails, and a newer one is sent.
            return checkpoint.path
        return frozen

    def _run(self, job: dict[str, Any], timeout: float, take: Take) -> None:
        told: Any = {"who": "the mirror", "what": "the copy", "log": self._log}
        self._job = BackgroundJob("keepstep.mirror.job", job, timeout, **told)
        self._take_answer = take

    def _hear(self) -> None:
        """Take in what came of the copy, if it has ended."""
        answer = self._job.poll() if self._job else None
        if answer is None:
            return
        self._job = None
        self._take_answer(answer)
        self._sweep()

    def _take_owner(self, answer: dict[str, Any]) -> None:
        if "owner" in answer:
            self.owner, self._pace = Owner(**answer["owner"]), self._pace.done()
            return
        self._pace = self._pace.failed(now())
        if self._pace.is_told:
            self.lines.append(f"Not mirrored: {answer['error']}")

    def _take(self, answer: dict[str, Any]) -> None:
        self._done[self._step] = answer
        if "owner" in answer:
            self.owner = Owner(**answer.pop("owner"))
        if "objects" in answer:
            answer |= self._look_for_lost(answer.pop("objects"), answer["pruned"])
        self.deposed = answer["error"] if answer.get("deposed") else self.deposed
        moment, before = now(), self._pace
        self._pace = before.failed(moment) if "error" in answer else before.done()
        answer = {"step": self._step, **answer, "seconds": round(moment - self._began, 1)}
        failures = max(before.failures, self._pace.failures)
        self.news.append(answer | ({"failures": failures} if failures else {}))
        if "error" not in answer:
            after = moment - before.since if before.failures else None
            self.lines.append(copied_line(answer, before.failures, after))
        elif self._pace.is_told and not self.deposed and not self._ending:
            again = self._pace.not_before - moment
            self.lines.append(failed_line(answer, self._pace.failures, again))

    def _look_for_lost(self, objects: dict[str, int], pruned: Sequence[int]) -> dict[str, Any]:
        """What had been copied, and is whole there no more: the best is owed again.

        Args:
            objects: of each checkpoint there, how many it has; JSON's keys are texts.
        """
        now_there = {int(step): count for step, count in objects.items()}
        before = {s: n for s, n in self._objects.items() if s not in pruned}
        lost = sorted(step for step, count in before.items() if now_there.get(step, 0) < count)
        self._objects = now_there
        told_no_more = self._ending and self._share.nodes > 1  # the others are not asked again
        for step in lost:
            if not told_no_more:
                self._done[step] = {"error": "objects of it are gone there"}
            self.lines.append(
                f"{self.url}: objects of checkpoint-{step} are gone there, by a rule of the bucket "
                "or by somebody's hand\n    Hint: while it is the best, they are sent again now; "
                f"else {self._sender} sends them"
            )
        return {"lost": lost} if lost else {}

    def _sweep(self) -> None:
        """Frozen files of copies that are over would keep pruned bytes on the disk."""
        if not self._share.freezes:
            return
        self._storage.make_folder(self.run.mirroring)
        for folder in self.run.mirroring.iterdir():
            if folder.is_dir():
                self._storage.remove(folder)


def copied_line(news: dict[str, Any], failures: int, after: float | None) -> str:
    """For people: a checkpoint is there; after so many failures, and seconds since the first."""
    there = news["copied"] + news["found"]
    known = f", {human_bytes(there)} were there" if there else ""
    gone = f"; pruned there {', '.join(map(str, news['pruned']))}" if news["pruned"] else ""
    sent = f"{human_bytes(news['bytes'])} in {news['seconds']:g} s"
    late = "" if after is None else f"; after {failures} failed, in {human_duration(after)}"
    return f"mirrored checkpoint-{news['step']}: {sent}{known}{gone}{late}"


def failed_line(news: dict[str, Any], failures: int, again: float) -> str:
    """For people: why a checkpoint is not there, and when the next copy begins."""
    row = f" ({failures} times in a row)" if failures > 1 else ""
    told = f"Not mirrored{row}: checkpoint-{news['step']}: {news['error']}"
    return f"{told}\n    Tried again in {human_duration(again)}; training goes on."
