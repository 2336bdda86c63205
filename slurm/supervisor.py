"""What a job is whatever it decides: it has a name, says and hears things, and leaves.

For Python 3.6 and newer: see job.py.
"""

import contextlib
import os
import time

from cluster import SLICE, Slurm
from files import Files, to_bytes
from next_step import ENDED_BY_SLURM, STOPPED
from signals import HEARD, TERM

LEFT_BEHIND = 1  # the exit status of one whose run another process has


class Left(BaseException):
    """The job is over, with an exit status."""


class Supervisor:
    """The process that looks after the attempts of a run.

    Args:
        job: its folder, in the run folder.
        known: what train.sbatch has read in job.env and site.env.
        stop: what signals have asked for.
    """

    def __init__(self, job, known, stop):
        self.known, self.stop = known, stop
        self.number, self.begun = os.environ["SLURM_JOB_ID"], time.monotonic()
        self.told = ""  # of what `stop` has, said and passed on
        self.attempt = None
        self.files = Files(known["run"], known["logs"], job, self.say)
        self.slurm = Slurm(job, self.number, known["logs"], self.count("PROBE_SECONDS"), stop.kind)
        self.round, self.predecessor = self.slurm.round(), ""
        self.call(0)

    def call(self, tries):
        """Give it the name of one of its attempts."""
        self.token = f"{self.number}.{self.round}.{tries}"

    def count(self, name):
        """A number of the site's, or of job.env."""
        return float(self.known[name])

    def say(self, words):
        """A line of the job's log, in one write."""
        line = "{} [{}] {}\n".format(time.strftime("%Y-%m-%d %H:%M:%S"), self.token, words)
        with contextlib.suppress(OSError):  # a full disk, or nobody reads: the run goes on
            os.write(1, to_bytes(line))

    def leave(self, words, status):
        self.say(words)
        if status not in (LEFT_BEHIND, ENDED_BY_SLURM):
            # For `keepstep stop`: unless Slurm, or another process, goes on with this job.
            self.files.note("ended", status, self.token)
        self.slurm.end_guard()
        if status == STOPPED:
            self.say("to go on: " + self.known["submitted_as"])
        raise Left(status)

    # --- signals

    def heed(self):
        """Say, and pass on, what somebody has asked for."""
        kind = self.stop.kind()
        if kind != self.told:
            self.told = kind
            self.say(HEARD[kind])
            if self.attempt is not None:  # Slurm has told the ranks; `scancel --batch` has not
                self.attempt.ask_to_stop()

    def sleep(self, seconds, until=lambda: False):
        """Hearing signals; shorter, once `until` holds."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            self.heed()
            time.sleep(SLICE)
        self.heed()

    def is_term(self):
        return self.stop.kind() == TERM

    # --- the owner of the run: an attempt that finds another name there ends, and writes nothing

    def is_superseded(self):
        """Somebody else has the run by now."""
        return self.files.owner() not in ("", self.token, self.predecessor)

    def leave_if_superseded(self):
        if self.is_superseded():
            self.leave(f"the run belongs to {self.files.owner()} now", LEFT_BEHIND)

    def leave_if_left(self):
        self.leave_if_superseded()
        if self.slurm.is_queued_again(self.round):
            self.leave("this job has been queued again: this shell was left behind", LEFT_BEHIND)
