"""`launch/train.sh --retries N`: launch again what has failed, as a batch job does on a cluster.

`python -m keepstep.cli.again N TRAIN.SH RECIPE …`, as launch/train.sh becomes it. What is next
after an attempt is decided where Slurm's jobs have it decided (policy/next_step.py); here is what
differs: one machine, signals that people send, GPUs that no longer answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from keepstep.cli.gone import comes_back, is_there, say
from keepstep.cli.gpus import fewer, gpus_in_use, narrowed
from keepstep.cli.scratch import scratch_folder
from keepstep.policy.next_step import (
    FAILED,
    FINISHED,
    GIVEN_UP,
    PREEMPTED,
    RECIPE,
    STOPPED,
    Ended,
    Next,
    Situation,
    advice,
    after_attempt,
    fruitless_after,
    how_it_ended,
)
from keepstep.run_folder.reader import RunFolder

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WAITING = "retry-waits"  # in the run's private folder: the process that waits before an attempt
TOKEN = "this"  # the attempt's name, where a cluster's job has one of its own


def value_of(arguments: list[str], field: str) -> str | None:
    """What the recipe, or a flag behind it, says of a field; None: nothing."""
    named: object = None
    try:
        with open(arguments[0], encoding="utf-8") as file:
            fields = yaml.safe_load(file)
        named = fields.get(field) if isinstance(fields, dict) else None
    except (OSError, ValueError, yaml.YAMLError):
        pass  # the attempt tells what is wrong with it
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == field:
            named = value if equals else "".join(arguments[position + 1 : position + 2])
    return None if named is None else str(named)


def run_of(arguments: list[str]) -> RunFolder | None:
    """The run folder that the recipe, or a flag behind it, names."""
    named = value_of(arguments, "output_dir")
    return RunFolder(named) if named else None


def commits_of(run: RunFolder | None, known: int) -> int:
    """How many checkpoints were ever committed; as many as were known, if it cannot be read."""
    try:
        return len(run.commits()) if run and is_there(run) else known
    except OSError:
        return known


def from_where(run: RunFolder | None) -> str:
    """Where the next attempt begins, for people."""
    try:
        newest = run.latest() if run else None
    except OSError:
        newest = None
    return f"from checkpoint-{newest.step}" if newest else "from the beginning"


def waits(run: RunFolder) -> bool:
    """Whether a command with --retries waits here before its next attempt: it hears a stop."""
    try:
        pid = int((run.private / WAITING).read_text(encoding="ascii"))
        return b"keepstep.cli.again" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False  # nobody, or one that was killed meanwhile


class Supervisor:
    """Launches a run, and launches it again.

    Args:
        retries: so often in a row without a new checkpoint.
        command: launch/train.sh and its arguments.
    """

    retry_seconds = 10

    def __init__(self, retries: int, command: list[str]) -> None:
        self.retries, self.command = retries, command
        self.run = run_of(command[1:])
        self.asked = False  # for a stop
        self._was_there = self.run is not None and is_there(self.run)
        self._gpus: list[str] = []
        self._is_narrowed = False
        self._has_trained = False  # the last attempt; else what was saved meanwhile is another's
        self._child: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, "KEEPSTEP_RETRIES": str(retries)}
        self._libc = ctypes.CDLL(None)
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # or nobody would know of ranks without parents
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup: go on without a terminal
                signal.signal(number, self._pass_on)

    def supervise(self) -> int:
        """Until the run has ended as it is to, or nothing comes of it. Returns: the exit status."""
        fruitless, commits = 0, commits_of(self.run, 0)
        self._gpus = gpus_in_use(self._environment)
        while True:
            ended, code = self._attempt()
            if code == 0 or self.asked:
                return code
            self._see_out_what_is_left()
            self._was_there = self._was_there or (self.run is not None and is_there(self.run))
            now = commits_of(self.run, commits)
            fruitless = fruitless_after(fruitless, commits, now if self._has_trained else commits)
            commits = now
            if ended.outcome == RECIPE and self._one_less():
                continue
            following = self._what_next(ended, fruitless)
            if following.action != "launch":
                # What a batch job would be queued again for: the time is over. Here it is over.
                status = STOPPED if following.action == "requeue" else following.exit
                words = following.words
                if ended.outcome == FINISHED:  # and not with 0
                    words = f"{ended.reason}; {advice(FINISHED, status)}"
                elif following.action == "give-up":
                    words = f"{words}: {ended.reason}"
                say(f"not launched again: {words}")
                self._take_up_stop()
                return status
            count = f"retry {fruitless} of {self.retries}, no new checkpoint" if fruitless else ""
            say(
                f"launching again {from_where(self.run)}"
                + (f", in {following.pause} s ({count})" if count else "")
                + f": {ended.reason}"
            )
            if not self._pause(following.pause):
                return STOPPED
            if self._was_there and self.run and not comes_back(self.run, lambda: self.asked):
                return STOPPED if self.asked else 70
            if self._gpus and not self._narrow():
                return code

    def _narrow(self) -> bool:
        """Go on with the GPUs that answer. False: none does."""
        self._gpus, told = narrowed(self._gpus, self._environment)
        if told:
            self._is_narrowed = True
            say(told)
        return bool(self._gpus)

    def _one_less(self) -> bool:
        """What was refused with the GPUs that are left may be their number: it does not divide the
        rows of a step, or the parts of a sequence. What may is the run's own to know."""
        if not self._is_narrowed or len(self._gpus) < 2 or self._stop_requested():
            return False
        self._gpus = fewer(self._gpus, self._gpus[:-1], self._environment)
        say(f"refused on so many GPUs, of which some were lost: trying {len(self._gpus)}")
        return True

    def _what_next(self, ended: Ended, fruitless: int) -> Next:
        seen = Situation(
            stop_requested=self._stop_requested(),
            fruitless=fruitless,
            max_attempts=self.retries + 1,
            preempted="no",
            nodes_answer="yes",
            retry_seconds=self.retry_seconds,
        )
        following = after_attempt(ended, seen)
        return following._replace(exit=GIVEN_UP) if following.action == "give-up" else following

    def _stop_requested(self) -> bool:
        """`keepstep stop`, while no attempt was at work."""
        return self.run is not None and (self.run.private / "stop").is_file()

    def _attempt(self) -> tuple[Ended, int]:
        """Launch it once: how it ended, and with which exit status."""
        try:
            with scratch_folder(self.run.private if self.run else None) as scratch:
                code = self._launch({**self._environment, "KEEPSTEP_SCRATCH": str(scratch)})
                said, is_asked = _said(scratch / "status.json"), (scratch / "asked").exists()
                culprit = _line(scratch / "culprit")
        except OSError as error:  # processes may be too many, too
            self._has_trained = False
            return Ended(FAILED, f"it could not be launched: {error}", 70, False), 70
        self._has_trained = not said.get("outcome") or said.get("global_step") is not None
        if self.asked and not said and code not in (0, 2):
            say("stopped before the run began; run the same command again to go on")
            return Ended(PREEMPTED, "stopped before the run began", STOPPED, False), STOPPED
        if said and said.get("outcome") and code < 128:
            ended = how_it_ended({**said, "owner": TOKEN}, TOKEN, code)
        elif code in (2, STOPPED):
            ended = how_it_ended({}, TOKEN, code)
        else:
            ended = Ended(FAILED, culprit or f"exit status {code}", code, bool(said))
        return self._wished(ended, is_asked), 70 if code >= 128 else code

    def _wished(self, ended: Ended, is_asked: bool) -> Ended:
        if ended.outcome == PREEMPTED and "SIGTERM" in ended.reason and not is_asked:
            # So the ranks hear of a launcher that was killed: nobody has asked this script.
            return Ended(FAILED, f"{ended.reason}, and nobody has asked for a stop", 70, True)
        return ended

    def _launch(self, environment: dict[str, str]) -> int:
        libc, parent = self._libc, os.getpid()

        def go_with_parent() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(STOPPED)

        # A session of its own: Ctrl-C reaches this process alone, and is passed on once.
        self._child = subprocess.Popen(
            self.command, env=environment, start_new_session=True, preexec_fn=go_with_parent
        )
        if self.asked:
            self._child.send_signal(signal.SIGTERM)
        code = self._wait_for(self._child)
        self._child = None
        return 128 - code if code < 0 else code

    def _wait_for(self, child: subprocess.Popen[bytes]) -> int:
        return child.wait()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._child is not None:
            self._child.send_signal(number)

    def _pause(self, seconds: float) -> bool:
        """False: somebody has asked for a stop meanwhile."""
        end = time.monotonic() + seconds
        with self._known_to_wait():
            while not (self.asked or self._stop_requested()) and time.monotonic() < end:
                time.sleep(0.1)
            if not (self.asked or self._stop_requested()):
                return True
        say("stopped between two attempts; run the same command again to go on")
        self._take_up_stop()
        return False

    @contextlib.contextmanager
    def _known_to_wait(self) -> Iterator[None]:
        """`keepstep stop` refuses a run that nobody is at work on."""
        mark = self.run.private / WAITING if self.run and self.run.private.is_dir() else None
        try:
            if mark:
                mark.write_text(str(os.getpid()), encoding="ascii")
        except OSError as error:  # a full disk: the next attempt tells of it
            say(f"warning: keepstep stop will not be heard during the pause: {error}")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True) if mark else None

    def _take_up_stop(self) -> None:
        if self.run is not None and self._stop_requested():
            (self.run.private / "stop").unlink(missing_ok=True)

    def _see_out_what_is_left(self) -> None:
        """Ranks whose script and launcher were killed save, and end; by force, if they do not."""
        end = time.monotonic() + float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 300))
        is_told = False
        while not self.asked:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid:
                continue
            if time.monotonic() > end:
                for child in Path("/proc/self/task").glob("*/children"):
                    for left in child.read_text().split():
                        os.kill(int(left), signal.SIGKILL)
            elif not is_told:
                is_told = True
                say("waiting for what the attempt has left to end")
            time.sleep(0.1)


def _said(file: Path) -> dict[str, Any]:
    """What an attempt has told of its end; empty: nothing that can be read."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _line(file: Path) -> str:
    """What train.sh has written about a rank that was killed; empty: nothing."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def warn_without_setpriv() -> None:
    """It is what ends ranks whose launcher was killed."""
    if shutil.which("setpriv") is None:
        say("warning: without setpriv (util-linux) ranks may outlive a launcher that is killed")


def main() -> None:
    """The module as a program."""
    retries, *command = sys.argv[1:]
    warn_without_setpriv()
    sys.exit(Supervisor(int(retries), command).supervise())


if __name__ == "__main__":
    main()
