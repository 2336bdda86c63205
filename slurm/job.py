"""One run of a Slurm job: attempt after attempt, until it is finished or cannot get on.

train.sbatch becomes this program. It is Python since bash loses a signal that comes while it parses
a command substitution. What is next is decided in next_step.py, which lies beside it in the job's
folder. For Python 3.6 and newer, whichever the batch host has, and its standard library alone:
nothing of keepstep is imported, for the environment of the ranks may be in a container.
"""

import contextlib
import os
import sys
import time
import traceback

from attempt import Attempt
from cluster import complain
from files import LIMIT, head, one_line
from next_step import (
    ENDED_BY_SLURM,
    FAILED,
    RECIPE,
    STOPPED,
    Situation,
    after_attempt,
    for_nodes,
    fruitless_after,
    may_claim,
    when_requeue_failed,
    when_unwritable,
)
from signals import Stop, be_deaf
from supervisor import LEFT_BEHIND, Left, Supervisor

ANSWERS = 33  # the exit status that says: this Python runs this program
UNDECIDED = 70
LATE_SECONDS = 120  # Slurm repeats a signal that a node did not hear after a minute; then a save


class Job(Supervisor):
    """The story of a job.

    Args:
        job: its folder, in the run folder.
        known: what train.sbatch has read in job.env and site.env.
        srun_flags: the site's own, for the step of an attempt.
        stop: what signals have asked for.
    """

    def __init__(self, job, known, srun_flags, stop):
        super().__init__(job, known, stop)
        self.srun_flags, self.tries, self.nodes = srun_flags, 0, []
        self.files.make_folder()
        self.all = self.slurm.all_nodes()
        # A budget of attempts in a row without a new checkpoint, over all restarts of the job.
        self.commits = self.files.commits(0)
        self.fruitless, self.is_counted = self.files.fruitless(), False

    def processes(self):
        return len(self.nodes) * int(self.count("processes_per_node"))

    def run(self):
        """To its end, by Left."""
        try:
            self._run()
        except Exception:
            complain(traceback.format_exc())
            self.leave("what is next cannot be decided, for the error above", UNDECIDED)

    def _run(self):
        held = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_GPUS_ON_NODE")
        if held and not self.count("gpus"):
            hint = "submit it with --gpus-per-node"
            self.say("warning: this job holds GPUs, and trains on CPU: " + hint)
        while True:
            self.tries += 1
            self.claim()
            if self.count("ranged"):
                self.slurm.start_guard(self.all)
            self.find_nodes()
            self.launch()
            self.watch()
            ended = self.record()
            self.what_next(ended)  # leaves, unless it is to launch again

    # --- the owner of the run: an attempt that finds another name there ends, and writes nothing

    def claim(self):
        """Put this attempt's name there, unless this job is a leftover of an earlier round."""
        self.predecessor = self.files.owner()
        self.call(self.tries)
        self.is_counted = False
        if not may_claim(self.predecessor, self.token):
            self.leave(f"the run belongs to {self.predecessor} now", LEFT_BEHIND)
        since, patience = time.monotonic(), self.count("NODE_WAIT_SECONDS")
        # Restarts count, since nothing else may be written: Slurm knows them.
        fruitless = max(self.fruitless + 1, self.round)
        while not self.files.take(self.token):
            waited = time.monotonic() - since
            seen = self.situation(fruitless=fruitless)
            self.obey(when_unwritable(self.files.private, waited, patience, seen))
        self.predecessor = ""

    # --- progress

    def count_fruitless(self, number):
        """Attempts in a row without a new checkpoint, this one included."""
        self.fruitless, self.is_counted = number, True
        self.files.note("fruitless", number, self.token)

    # --- decisions

    def situation(self, **more):
        self.heed()
        late = LATE_SECONDS + self.count("GRACE_SECONDS")
        facts = {
            "stop": self.stop.kind(),
            "stop_requested": self.files.stop_requested(),
            "fruitless": self.fruitless,
            "max_attempts": int(self.count("MAX_ATTEMPTS")),
            "processes": self.processes(),
            "requeued": self.round > 0 and time.monotonic() - self.begun < late,
            "retry_seconds": int(self.count("RETRY_SECONDS")),
        }
        facts.update(more)
        return Situation(**facts)

    def find_nodes(self):
        """Set `nodes` to those that answer, once there are enough; without them, queue again."""
        since = time.monotonic()
        needed, patience = int(self.count("min_nodes")), self.count("NODE_WAIT_SECONDS")
        while True:
            self.leave_if_left()
            self.nodes = self.slurm.answering(self.all, self.token)
            waited, fruitless = time.monotonic() - since, self.fruitless + (not self.is_counted)
            seen = self.situation(fruitless=fruitless)
            answer = for_nodes(self.nodes, len(self.all), needed, waited, patience, seen)
            if answer.action == "launch":
                return
            if answer.action == "wait":
                with contextlib.suppress(OSError):
                    os.write(1, head(self.slurm.log, LIMIT))
                answer = answer._replace(pause=self.count("RETRY_SECONDS"))
            self.obey(answer)

    def what_next(self, ended):
        """After an attempt."""
        asked = {}
        while True:
            answer = after_attempt(ended, self.situation(**asked))
            if answer.action == "ask-slurm":
                asked["preempted"] = "yes" if self.slurm.is_preempted() else "no"
            elif answer.action == "ask-nodes":
                is_there = self.slurm.are_prepared(self.nodes, self.token)
                asked["nodes_answer"] = "yes" if is_there else "no"
            else:
                return self.obey(answer)

    def obey(self, answer):
        """Do as a decision says; returns only if it is to launch, or to wait."""
        if answer.action in ("launch", "wait"):
            if answer.words:
                self.say(answer.words)
            self.sleep(answer.pause, self.stop.kind)
        elif answer.action == "requeue":
            self.give_back(answer.words)
        elif answer.action == "give-up":
            self.files.tell("no_progress", answer.words, answer.exit, self.token)
            self.leave("no progress: " + answer.words, answer.exit)
        else:
            if answer.exit == STOPPED:
                self.files.take_up_stop()
            self.leave(answer.words, answer.exit)

    def give_back(self, why):
        """Queue this job again: it goes on when its turn comes."""
        if not self.is_counted:
            self.count_fruitless(self.fruitless + 1)
        self.say(f"queue again: {why}, at checkpoint {self.files.newest()}")
        end = time.monotonic() + self.count("REQUEUE_SECONDS")
        while self.slurm.is_there() and not self.is_term() and time.monotonic() < end:
            self.leave_if_left()
            is_queued, told = self.slurm.requeue()
            if is_queued:
                self.sleep(120, self.is_term)  # TERM comes with it
                break
            self.say("scontrol requeue: " + one_line(told))
            if when_requeue_failed(told).action != "wait":
                break  # else the controller is away
            self.sleep(self.count("RETRY_SECONDS"), self.is_term)
        if self.is_term():
            self.leave("Slurm has ended the job", ENDED_BY_SLURM)
        self.leave("this job cannot be queued again", STOPPED)

    # --- one attempt

    def launch(self):
        """Begin an attempt on `nodes`."""
        # Below the ephemeral range, and new each time: no straggler joins the rendezvous.
        port = 10000 + (int(self.number) * 31 + self.round * 1009 + self.tries) % 20000
        head = self.slurm.address_of(self.nodes[0])
        self.attempt = Attempt(self.token, self.tries, self.nodes, self.files)
        count = self.processes()
        self.say(
            f"attempt on {','.join(self.nodes)}, {count} process{'' if count == 1 else 'es'}, "
            f"{head}:{port},"
            f" from checkpoint {self.files.newest()}; log: {self.attempt.log()}"
        )
        told = [self.token, str(len(self.nodes)), head, str(port)]
        self.attempt.begin(self.srun_flags, [*self.slurm.node_script, "launch", *told])
        if self.told:
            self.attempt.ask_to_stop()

    def watch(self):
        """Until the attempt ends, or has to be ended."""
        attempt = self.attempt
        while True:
            told = self.told
            self.sleep(
                self.count("POLL_SECONDS"),
                lambda told=told: attempt.has_ended() or self.told != told,
            )
            if attempt.has_ended():
                return
            why = self.why_to_end()
            if why:
                self.say(why + ": this attempt is ended")
                self.slurm.kill_step(attempt.step)
                self.sleep(10, attempt.has_ended)
                if not attempt.has_ended():
                    attempt.kill_srun()
                    self.say("srun did not end: a node does not answer")

    def why_to_end(self):
        """Empty: it may go on."""
        if self.is_superseded():
            return f"the run belongs to {self.files.owner()} now"
        if self.stop.kind() and self.stop.seconds() > self.count("GRACE_SECONDS"):
            return "not saved in time"
        limits = self.count("STALL_SECONDS"), self.count("STARTUP_SECONDS")
        silence = self.attempt.silence(*limits)
        return f"no step for {silence:.0f} s" if silence and not self.is_term() else ""

    def record(self):
        """How it ended: what it said of itself, counted, and written down."""
        attempt, code = self.attempt, self.attempt.exit_status()
        self.attempt = None
        self.leave_if_superseded()
        self.files.take_up_stop(self.token)
        ended = self.files.ended(self.token, code, len(attempt.nodes), attempt.was_alive())
        known, self.commits = self.commits, self.files.commits(self.commits)
        self.count_fruitless(fruitless_after(self.fruitless, known, self.commits))
        if not ended.has_begun:
            outcome = FAILED if ended.outcome == RECIPE else ended.outcome
            self.files.tell(outcome, ended.reason, ended.exit, self.token)
        facts = {"seconds": int(attempt.seconds()), "exit": ended.exit, "outcome": ended.outcome}
        facts["step"] = self.files.newest()
        self.say(
            "ended after {seconds} s: {outcome} ({reason}), checkpoint {step}".format(
                reason=ended.reason, **facts
            )
        )
        self.files.record(owner=self.token, nodes=",".join(attempt.nodes), **facts)
        return ended


def main():
    if len(sys.argv) == 1:
        return ANSWERS
    stop = Stop()  # first: what comes earlier ends this process, and nothing has begun
    job, *words = sys.argv[1:]
    end = words.index("--")
    known = dict(word.split("=", 1) for word in words[:end])
    try:
        Job(job, known, words[end + 1 :], stop).run()
    except Left as left:
        status = left.args[0]
    except Exception:
        complain(traceback.format_exc())
        status = UNDECIDED
    be_deaf()  # at its end Python gives signals their defaults back: one would be the exit status
    return status


if __name__ == "__main__":
    sys.exit(main())
