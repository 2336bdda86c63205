"""What a job asks of Slurm, and of its nodes. For Python 3.6 and newer: see job.py."""

import contextlib
import os
import re
import shutil
import subprocess
import time

# A step has all that the job has on each node (--whole), whose number of CPUs may differ.
EVERYWHERE = ["--overlap", "--whole", "--ntasks-per-node=1"]
SLICE = 0.1  # seconds between looks at a command, and at signals


def output_of(command, seconds=20, errors=subprocess.DEVNULL):
    """What a command answers; None: there is no such command, it fails, or it is too slow."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=seconds,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return os.fsdecode(done.stdout) if done.returncode == 0 else None


def complain(words):
    """In the job's log, if that can be written."""
    with contextlib.suppress(OSError):
        os.write(2, words.encode("utf-8", "backslashreplace"))


def start(command, **how):
    """Begin a command in the background; None: that is not possible now."""
    try:
        return subprocess.Popen(command, **{"stdin": subprocess.DEVNULL, **how})
    except OSError as error:
        complain(f"{command[0]}: {error.strerror}\n")
        return None


class Slurm:
    """The job's allocation.

    Args:
        job: the job's folder.
        number: of the job.
        logs: the folder of logs.
        probe_seconds: for a node to answer.
        is_asked: whether somebody has asked for a stop: then nothing is waited for.
    """

    def __init__(self, job, number, logs, probe_seconds, is_asked):
        self.number, self.probe_seconds, self.is_asked = number, probe_seconds, is_asked
        self.node_script = ["bash", os.path.join(job, "node.sh")]
        self.log = os.path.join(logs, "prepare.log")
        self.guard = None

    # --- the controller

    def is_there(self):
        """In a container there may be no scontrol."""
        return shutil.which("scontrol") is not None

    def facts(self):
        """What scontrol says of the job."""
        return output_of(["scontrol", "show", "job", "-o", self.number]) or ""

    def is_preempted(self):
        return re.search(r" PreemptTime=[0-9]", self.facts()) is not None

    def restarts(self):
        """How often Slurm has queued this job again; None: that cannot be known now."""
        found = re.search(r" Restarts=([0-9]+)", self.facts())
        return None if found is None else int(found.group(1))

    def round(self):
        """The same, when this process was begun: later, another one may have taken its place.

        Of a job that was never queued again the variable is that of the shell it is submitted from.
        """
        told = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return 0 if told and self.restarts() == 0 else told

    def is_queued_again(self, since):
        """Whether it was, and Slurm could not tell this process: it was left behind."""
        return self.restarts() not in (None, since)

    def requeue(self):
        """Whether it has worked; and what scontrol says."""
        try:
            done = subprocess.run(
                ["scontrol", "requeue", self.number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return False, str(error)
        return done.returncode == 0, os.fsdecode(done.stdout).strip()

    def kill_step(self, name):
        """End a step of this job by force."""
        steps = output_of(["squeue", "-h", "-s", "-j", self.number, "-o", "%i %j"]) or ""
        for line in steps.splitlines():
            step, _, called = line.strip().partition(" ")
            if called == name:
                output_of(["scancel", "--signal=KILL", step])

    # --- its nodes

    def all_nodes(self):
        nodes = output_of(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]])
        if nodes is None:
            count = os.environ["SLURM_JOB_NUM_NODES"]
            where = ["--mem=0", "-N" + count, "-n" + count]
            step = ["srun", *EVERYWHERE, *where, "printenv", "SLURMD_NODENAME"]
            nodes = output_of(step, 300, errors=None) or ""
        return nodes.split()

    def address_of(self, node):
        """Where the others reach it."""
        facts = output_of(["scontrol", "show", "node", "-o", node]) or ""
        found = re.search(r" NodeAddr=([^ ]+)", facts)
        return found.group(1).strip() if found else node

    def answering(self, nodes, token):
        """The nodes that answer and are prepared for an attempt, in their order."""
        self._open_log("wb").close()
        if self.are_prepared(nodes, token):
            return nodes
        alone = [(node, self._prepare([node], token)) for node in nodes]
        end = time.monotonic() + self.probe_seconds
        return [node for node, step in alone if self._succeeds(step, end)]

    def are_prepared(self, nodes, token):
        """End what earlier attempts left there, see that the run folder is there."""
        end = time.monotonic() + self.probe_seconds
        return self._succeeds(self._prepare(nodes, token), end)

    def _prepare(self, nodes, token):
        count = str(len(nodes))
        where = ["--mem=0", "-N" + count, "-n" + count, "-w", ",".join(nodes)]
        step = ["srun", "--job-name=prepare", *EVERYWHERE, *where, "--kill-on-bad-exit=1"]
        with self._open_log("ab") as log:
            command = [*step, *self.node_script, "prepare", token]
            return start(command, stdout=log, stderr=subprocess.STDOUT)

    def _open_log(self, mode):
        try:
            return open(self.log, mode)
        except OSError:
            return open(os.devnull, mode)

    def _succeeds(self, step, end):
        """Whether a step does; one that does not end is ended."""
        if step is None:
            return False
        while step.poll() is None and time.monotonic() < end and not self.is_asked():
            time.sleep(SLICE / 4)
        for finish in (step.terminate, step.kill):
            if step.poll() is None:
                finish()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    step.wait(5)
        return step.poll() == 0

    def start_guard(self, nodes):
        """A range of nodes comes with --no-kill: the allocation outlives a node. But when the node
        of this process dies, Slurm then neither ends nor requeues the job; so a step on the other
        nodes does."""
        if self.guard is None:
            count = str(len(nodes))
            where = ["--no-kill", *EVERYWHERE, "--mem=0", "-N" + count, "-n" + count]
            step = ["srun", "--job-name=guard", *where, *self.node_script, "guard"]
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.guard = start(step, **silent)

    def end_guard(self):
        if self.guard is not None:
            self.guard.terminate()
