"""One attempt of a job: a step of Slurm's that trains. For Python 3.6 and newer: see job.py."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from cluster import EVERYWHERE, start
from signals import be_deaf

NOT_BEGUN = 127  # an exit status of shells: there is no such command


class Attempt:
    """A step that is at work.

    Args:
        token: its name, as the owner of the run.
        number: counted from 1 in each round of the job.
        nodes: those that it is launched on.
        files: of the run.
    """

    def __init__(self, token, number, nodes, files):
        self.token, self.nodes, self.files = token, nodes, files
        self.step = f"attempt-{number}"
        self.since, self._beat, self._beat_at = time.monotonic(), files.beats(), None
        self._srun = self._writer = None

    def begin(self, site_flags, command):
        """Launch `command` once on each node."""
        count = str(len(self.nodes))
        # --wait=0: at the end one process may push to the Hub for long, and the others are done.
        step = ["srun", "--job-name=" + self.step, *EVERYWHERE]
        step += ["-N" + count, "-n" + count, "-w", ",".join(self.nodes)]
        step += ["--kill-on-bad-exit=1", "--wait=0", *site_flags, *command]
        # Slurm signals every process of the job: who writes the log has to outlive the attempt.
        writer = [sys.executable, "-BEsS", os.path.join(os.path.dirname(__file__), "log.py")]
        self._writer = start([*writer, self.log()], stdin=subprocess.PIPE, preexec_fn=be_deaf)
        if self._writer is not None:
            self._srun = start(step, stdout=self._writer.stdin, stderr=subprocess.STDOUT)
            self._writer.stdin.close()

    def log(self):
        return os.path.join(self.files.logs, self.token + ".log")

    def seconds(self):
        return time.monotonic() - self.since

    def has_ended(self):
        return self._srun is None or self._srun.poll() is not None

    def exit_status(self):
        """srun's, as a shell has it, once it has ended and all that it said is written."""
        code = NOT_BEGUN if self._srun is None else self._srun.wait()
        if self._writer is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # somebody has inherited its pipe
                self._writer.wait(2)
        return 128 - code if code < 0 else code

    def ask_to_stop(self):
        """With a save; also while it does not listen yet."""
        if not self.has_ended():
            self.files.ask_to_stop(self.token)
            self._srun.send_signal(signal.SIGUSR1)

    def kill_srun(self):
        """It waits for ever for a node that was cut off."""
        self._srun.kill()
        self._srun.wait()

    def was_alive(self):
        """Whether it has given a sign of life."""
        return self._beat_at is not None or self.files.beats() != self._beat

    def silence(self, stall_seconds, startup_seconds):
        """For how long nothing has come of it, by this host's own clock; 0: not for too long."""
        now, beat = time.monotonic(), self.files.beats()
        if beat != self._beat:
            self._beat, self._beat_at = beat, now
        begun, limit = (self._beat_at, stall_seconds)
        if begun is None:
            begun, limit = self.since, startup_seconds
        return now - begun if now - begun > limit else 0
