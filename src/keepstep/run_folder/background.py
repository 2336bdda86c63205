"""A process beside training that sends what a run has saved: given a job, ended at its deadline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keepstep.output.progress import Phase
from keepstep.output.terminal import complain
from keepstep.ranks import signals
from keepstep.run_folder.files import no_link
from keepstep.run_folder.how_far import HowFar

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # they are for the training


class BackgroundJob:
    """One such process. It reads a job on stdin, and says on its last line what came of it.

    Attributes:
        deadline: on the monotonic clock.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        timeout: float,
        *,
        who: str,
        what: str,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            module: that is run.
            job: JSON; with `timeout`, `until` on the clock that all processes share, and `how_far`:
                where its process tells that (`HowFar.of`). Where it is `waited_for` from its
                beginning, it gives way to nobody.
            timeout: seconds that it may take.
            who: answers it (`the Hub`), as people are told.
            what: it is, likewise (`the push`).
            log: where its stderr goes.
            environment: beside this process's own.
        """
        self.deadline = time.monotonic() + timeout
        self._timeout, self._who, self._what = timeout, who, what
        self._answer: dict[str, Any] | None = None
        self._how_far = HowFar.made()
        with contextlib.ExitStack() as unless_begun:
            unless_begun.callback(self._how_far.close)
            self._process = self._begun(module, environment or {}, log)
            unless_begun.pop_all()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            bounds = {"timeout": timeout, "until": self.deadline, "parent": os.getpid()}
            far = {"how_far": self._how_far.descriptor}
            stdin.write(json.dumps({**job, **bounds, **far}).encode())

    def _begun(
        self, module: str, environment: Mapping[str, str], log: Path | None
    ) -> subprocess.Popen[bytes]:
        with open(log or os.devnull, "ab", opener=no_link) as errors:
            return subprocess.Popen(
                [sys.executable, "-m", module],
                env={**os.environ, **NO_GPU, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # Ctrl-C is for the training. No session of its own: where the kernel shares out the
                # processor by sessions (autogroups), it would get as much as the training has.
                process_group=0,
                pass_fds=self._how_far.handed_on,
            )

    def poll(self) -> dict[str, Any] | None:
        """What came of it; None while it is at work. `error`: why there is nothing."""
        if self._answer is None:
            late = time.monotonic() > self.deadline
            if self._process.poll() is None and not late:
                return None
            self._answer = self._collect(late)
        return self._answer

    def wait(
        self,
        stop: Callable[[], str | None] = lambda: None,
        tell: Callable[[Phase], None] = lambda phase: None,
    ) -> dict[str, Any]:
        """The same, once it has ended, its time is over, or `stop` says why not to wait. Meanwhile
        `tell` is told how far it is; and it does not give way: who waits has nothing to do that
        would come first."""
        while (answer := self.poll()) is None:
            self._hasten()
            tell(self._how_far.read())
            if (reason := stop()) is not None:
                self.stop()
                self._answer = answer = {"error": reason}
                return answer
            time.sleep(0.1)
        return answer

    def stop(self) -> None:
        """End it, at any moment: what it sends is there whole, or not at all."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._how_far.close()

    def _hasten(self) -> None:
        """(Who is not root may not: what has given way then goes on doing so.)"""
        with contextlib.suppress(OSError):  # or one of them has just ended
            for thread in _threads_of(self._process.pid):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))

    def _collect(self, late: bool) -> dict[str, Any]:
        self.stop()
        assert self._process.stdout is not None
        lines = self._process.stdout.read().decode(errors="replace").splitlines()
        with contextlib.suppress(ValueError, IndexError):
            answer: dict[str, Any] = json.loads(lines[-1])
            return answer
        if late:
            told = f"{self._who} did not answer to the end within {self._timeout:.0f} s"
            return {"error": told, "fatal": False}
        return {"error": f"{self._what} ended with exit status {self._process.returncode}"}


def serve(do: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The process itself: a job from stdin, done, what came of it to stdout; its exit status.

    Args:
        do: the job. An error of it is what came of it: `error` and whether it would be so again
            (`fatal`: the error's own word, else: not one of the disk). What nobody has foreseen
            goes into the log, too.
    """
    for number in signals.SIGNALS:  # to all processes of a job: our parent decides
        signal.signal(number, signal.SIG_IGN)
    job = json.load(sys.stdin)
    if not job.get("waited_for"):
        _give_way()
    # Our parent ends us at the deadline; if it is gone, we end ourselves, with or after it.
    signal.alarm(int(job["timeout"]) + 5)
    signals.die_with_parent(signal.SIGKILL, job.get("parent"))
    try:
        answer = do(job)
    except Exception as error:
        fatal, of_disk = getattr(error, "fatal", None), isinstance(error, OSError)
        if fatal is None and not of_disk:
            complain(traceback.format_exc())
        told = f"{type(error).__name__}: {error}" if fatal is None else str(error)
        answer = {"error": told, "fatal": not of_disk if fatal is None else fatal}
    print(json.dumps(answer), flush=True)
    return 1 if "error" in answer else 0


def _threads_of(pid: int) -> Iterator[int]:
    """Those of a process, and of all that it has started."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        yield int(thread.name)
        for child in (thread / "children").read_text().split():
            yield from _threads_of(int(child))


def _give_way() -> None:
    """Training comes first: this process has the processor when nobody else wants it."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:  # a container may forbid it
        os.nice(19)
