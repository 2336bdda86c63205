"""A save between its snapshot and its commit: one thread per rank, no collective.

Every rank's thread writes its part and reports in a file of the staging area. The main process's
thread waits for all reports, then commits. Training goes on meanwhile; what came of it is collected
by the main threads, together (`Saver.settle`). Where a save stands, and what can happen to it
there, is a table: policy/save_states.py.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from keepstep.policy.manifest import LONGEST_MANIFEST
from keepstep.policy.save_states import FIRST, SaveEvent, SaveState, transition
from keepstep.policy.strict import TextError, parse
from keepstep.run_folder.safe_read import OddFileError, read_text
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import Saved
from keepstep.save.failure import Cause
from keepstep.save.rank_part import Part, Report

POLL_SECONDS = (0.01, 0.5)  # at first, and at most: thousands of ranks must not storm the disk
STUCK = "its writer is stuck"
Commit = Callable[[list[Report]], Saved]


class Flight:
    """One rank's share of a save that is on its way to the disk.

    Attributes:
        step: of the checkpoint.
        part: this rank's.
        deadline: `time.monotonic()` by which it must have ended.
        state: where it stands: on the main process as its threads have brought it there, elsewhere
            this rank's part, and then what the main process has told.
        written: set once this rank's part is written and reported, or has failed.
        failure: what kept this rank from reporting, None when nothing did.
        saved: the commit, on the main process.
        causes: on the main process, why there is no commit; empty as long as there may be one.
        heard: all ranks' reports, where they are not told by the disk.
    """

    def __init__(
        self, step: int, part: Part, reports: Path | None, storage: Storage, timeout: float
    ) -> None:
        """
        Args:
            reports: where the ranks report; None: in `heard`, which is filled in before `finish`.
        """
        self.step = step
        self.part = part
        self.deadline = time.monotonic() + timeout
        self.state = FIRST
        self.written = threading.Event()
        self.failure: Cause | None = None
        self.saved: Saved | None = None
        self.causes: list[Cause] = []
        self.heard: list[Report] = []
        self._reports = reports
        self._storage = storage
        self._commit: Commit | None = None
        self._world_size = 1
        self._changed = threading.Condition()  # around the state: to commit, or to give up
        self._thread = threading.Thread(target=self._run, daemon=True, name="keepstep-writer")

    def begin(self, world_size: int, commit: Commit | None, background: bool) -> None:
        """Write and report; on the main process, which has `commit`, commit. In the foreground the
        commit is left to `finish()`, once all ranks have been heard of."""
        self._world_size, self._commit = world_size, commit
        if not background:
            self._write()
            return
        try:
            self._thread.start()
        except RuntimeError as error:  # can't start new thread
            self.failure = self._cause(str(error))
            self.part.copy()
            self.written.set()

    def finish(self) -> None:
        """Main process: commit when every rank has reported that its part is written."""
        if self._commit is None or self.state is not SaveState.REPORTED:
            return
        try:
            reports = self.heard if self._reports is None else self._gather(self._reports)
            failures = [report.error for report in reports if report.error]
            if failures:
                self.give_up(failures)
            elif self._goes_on(SaveEvent.ALL_WRITTEN):
                self.saved = self._commit(reports)
                self._goes_on(SaveEvent.RENAMED)
        except BaseException as error:  # nobody else would hear of it
            self.give_up([Cause.of(error, self.part.rank)])

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether there is something to tell: the commit, an error, or that it takes too long."""
        committed = self._commit is not None and not self.running
        return committed or self.failure is not None or time.monotonic() > self.deadline

    def wait_written(self, at_most: float = float("inf")) -> None:
        """Wait for this rank's part; it has failed when it takes too long."""
        left = max(0.0, self.deadline - time.monotonic())
        if not self.written.wait(min(at_most, left)):
            self.failure = self.failure or self._cause(STUCK)
        elif self.failure == self._cause(STUCK):
            self.failure = self._cause("its writer was stuck, and has come back")

    def wait(self, at_most: float = float("inf")) -> None:
        """Wait for the end of this rank's thread, until the deadline."""
        if self.running:
            self._thread.join(min(at_most, max(0.0, self.deadline - time.monotonic())))

    def give_up(self, causes: Sequence[Cause]) -> None:
        """Main process: there will be no commit, unless it has been made."""
        with self._changed:
            if not (self.state.is_given_up or self.state.is_terminal):
                self.state = transition(self.state, SaveEvent.ERROR)
                self.causes = list(causes)
                self._changed.notify_all()

    def cancel(self, causes: Sequence[Cause]) -> None:
        """Main process: the same, unless the commit has begun."""
        with self._changed:
            if self.state not in (SaveState.COMMITTING, SaveState.OVERDUE):
                self.give_up(causes)

    def close(self) -> None:
        """Main process: the deadline has come. A commit that is under way may still arrive."""
        with self._changed:
            if self.running and self.state is SaveState.COMMITTING:
                self.state = transition(self.state, SaveEvent.SLOW)
            elif self.running:
                self.cancel([self._cause(STUCK)])

    def told(self, at_work: bool) -> None:
        """Main process: the ranks are about to hear that there will be none. `at_work`: whether a
        writer still is, so that nothing can be removed."""
        with self._changed:
            if not at_work:
                self.state = transition(self.state, SaveEvent.STOPPED)
            elif self.state is SaveState.FAILING:
                self.state = transition(self.state, SaveEvent.STUCK)

    def hear(self, state: SaveState) -> None:
        """The other ranks: where it stands, as the main process has told."""
        with self._changed:
            self.state = state

    def _run(self) -> None:
        self._write()
        if self._reports is not None:
            self.finish()

    def _goes_on(self, event: SaveEvent) -> bool:
        """The thread has got on; returns whether the save goes on, or has been given up."""
        with self._changed:
            if self.state.is_given_up:
                return False
            self.state = transition(self.state, event)
            return True

    def _write(self) -> None:
        try:
            self.part.copy()
            self._goes_on(SaveEvent.COPIED)
            self.part.finish()
            self._tell()
            self._goes_on(SaveEvent.WRITTEN)
        except BaseException as error:  # nobody else would hear of it
            self.failure = Cause.of(error, self.part.rank)
        finally:
            self.written.set()

    def _cause(self, text: str) -> Cause:
        return Cause(self.part.rank, text)

    def _tell(self) -> None:
        if self._reports is None:
            return
        content = json.dumps(self.part.report.as_json()).encode()
        self._storage.replace(self._reports / f"{self.part.rank}.json", content)

    def _gather(self, folder: Path) -> list[Report]:
        """Every rank's report, in rank order; an error in the place of one that does not come."""
        reports: dict[int, Report] = {}
        pause, longest = POLL_SECONDS
        while True:
            for name in sorted(os.listdir(folder)):
                number = name.removesuffix(".json")
                if number.isdecimal() and int(number) not in reports:
                    reports[int(number)] = _read(folder / name, int(number))
            late = time.monotonic() > self.deadline or self.state.is_given_up
            if len(reports) == self._world_size or late:
                break
            with self._changed:
                self._changed.wait_for(lambda: self.state.is_given_up, pause)
            pause = min(longest, 1.5 * pause)
        for rank in set(range(self._world_size)) - reports.keys():
            reports[rank] = Report(rank, error=Cause(rank, "no report came of its part"))
        return [reports[rank] for rank in sorted(reports)]


def _read(path: Path, rank: int) -> Report:
    """A rank's report; one of an error where the file does not hold what the rank wrote."""
    try:
        report = Report.from_json(parse(read_text(path, LONGEST_MANIFEST)))
        if report.rank != rank:
            raise TextError(f"it is rank {report.rank}'s")
        return report
    except (OddFileError, TextError) as error:
        return Report(rank, error=Cause(rank, f"its report cannot be read: {error}"))
