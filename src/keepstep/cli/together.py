"""`launch/train.sh --nnodes MIN:MAX`: several machines make a run together, without a scheduler.

`python -m keepstep.cli.together MIN:MAX N TRAIN.SH RECIPE …`, on each of them, as launch/train.sh
becomes it. They find each other by the run folder, which all of them see, and agree there on each
attempt (agreement.py). The attempt that was agreed on last has the run: whoever is in another one
can write nothing more (run_folder/ownership.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from keepstep.cli.again import Supervisor, from_where, value_of, warn_without_setpriv
from keepstep.cli.agreement import ENDING_SECONDS, Agreement, Terms, newest_number
from keepstep.cli.gone import say
from keepstep.cli.neighbors import Neighbors
from keepstep.cli.network import interface_towards
from keepstep.output.units import counted
from keepstep.policy.machines import ENDS, GROWS, LEAVES, Machine, Part, Plan, range_of
from keepstep.policy.next_step import FAILED, FINISHED, RECIPE, STOPPED, Ended
from keepstep.ranks.signals import BEGAN, steady
from keepstep.run_folder.machines import MachinesFolder
from keepstep.run_folder.ownership import VARIABLE
from keepstep.run_folder.reader import RunFolder

JOIN_SECONDS = 30  # as torchrun's last_call_timeout
LEAST_JOIN_SECONDS = 3  # a machine shows itself each second
TOLD_EVERY = 60.0  # seconds between two lines of who waits
SHORT = 4.0  # seconds: what is over within them is not told
LOOK_SECONDS = 0.3
OWN_DISKS = ("ext", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay")


class Together(Supervisor):
    """This machine's part: launches the attempts that it is in.

    Args:
        terms: what the command asks for.
        command: launch/train.sh and its arguments.
        run: the run folder.
        processes: that this machine can have.
    """

    def __init__(self, terms: Terms, command: list[str], run: RunFolder, processes: int) -> None:
        super().__init__(terms.retries, command)
        del self._environment["KEEPSTEP_RETRIES"]  # KEEPSTEP_COMMAND has it
        self._environment.setdefault(BEGAN, str(steady()))  # time_limit is meant for all attempts
        self._folder, self._terms = run, terms
        self._files = files = MachinesFolder(run)
        files.make()
        self._neighbors = Neighbors(files, processes, terms.patience)
        self._agreement = Agreement(run, files, self._neighbors, terms)
        self._launched = self._agreement.since
        self._idle = time.monotonic()  # since when no attempt is at work here
        self._told: tuple[str, float] = ("", -math.inf)
        self._why = ""  # this machine has asked for a stop
        self._code = STOPPED
        self._bigger_since = self._lost_since = math.inf

    def supervise(self) -> int:
        """Until the run has ended, or this machine leaves. Returns: the exit status."""
        with self._files.alone():  # of two at the same moment the second one sees the first
            twin = self._neighbors.twin()
            if twin is None:
                self._neighbors.start()
        if twin is not None:
            say(f"{self._folder.path} is being trained on this machine already (process {twin})")
            return 2
        try:
            if self._terms.machines.most > 1:
                warn_if_own_disk(self._folder)
            return self._go_on()
        finally:
            self._neighbors.stop()

    def _go_on(self) -> int:
        agreement = self._agreement
        while True:
            is_ours = agreement.look()
            plan = agreement.plan
            if is_ours and plan.end is not None:
                say(plan.words if plan.end == 0 else f"not launched again: {plan.words}")
                return plan.end
            if self.asked:
                if self._launched == agreement.since:
                    say("stopped before the run began; run the same command again to go on")
                return self._code
            if self._neighbors.me in plan.machines and plan.number > self._launched:
                self._take_part(plan)
            else:
                try:
                    waits_for = agreement.consider(self._idle)
                except OSError as error:  # a disk that does not answer now
                    waits_for = str(error)
                if waits_for:
                    self._tell(f"waiting: {waits_for}")
                time.sleep(LOOK_SECONDS)

    def _take_part(self, plan: Plan) -> None:
        """In an attempt, until it has ended here."""
        self._launched, self._why = plan.number, LEAVES if self.asked else ""
        self._bigger_since = self._lost_since = math.inf
        count = len(plan.machines) * plan.processes
        names = self._agreement.said(plan.machines)
        told = f"attempt {plan.number} on {names}: {counted(count, 'process')}"
        say(f"{told}, {from_where(self._folder)}")
        own = self._neighbors.processes
        if own > plan.processes:
            say(f"{plan.processes} of this machine's {own} processes: as many as the smallest has")
        self._environment |= {
            VARIABLE: plan.token,
            "KEEPSTEP_PROCESSES": str(count),
            "KEEPSTEP_LAUNCH_ARGS": "--num_machines 1 --main_process_port 0",
            "KEEPSTEP_EXIT_FILE": os.devnull,  # what follows is decided here, for all machines
        }
        if len(plan.machines) > 1:
            self._meet(plan)
        self._neighbors.tell(waits=False)
        ended, self._code = self._attempt()
        self._see_out_what_is_left()
        if self._code == 0:
            ended = ended._replace(outcome=FINISHED, exit=0)
        self._neighbors.tell(part=Part(plan.number, *ended, asked=self._why), waits=True)
        self._idle = time.monotonic()

    def _meet(self, plan: Plan) -> None:
        rank = plan.machines.index(self._neighbors.me)
        machines = f"--num_machines {len(plan.machines)} --machine_rank {rank}"
        where = f"--main_process_ip {plan.address} --main_process_port {plan.port}"
        self._environment["KEEPSTEP_LAUNCH_ARGS"] = f"{machines} {where}"
        interface = interface_towards(plan.address)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if interface and name not in os.environ:
                self._environment[name] = interface

    def _wished(self, ended: Ended, is_asked: bool) -> Ended:
        return ended  # another machine may have asked

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._why = self._why or LEAVES
        super()._pass_on(number, frame)

    def _wait_for(self, child: subprocess.Popen[bytes]) -> int:
        """Until the attempt ends here, or must: the machines are others by now."""
        is_told, ends_at = False, math.inf
        while True:
            try:
                return child.wait(LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            if self.asked and not is_told:
                is_told = True
                self._neighbors.tell(leaves=True)
                say("this machine leaves, the others go on; `keepstep stop` ends the run on all")
            now = time.monotonic()
            why = ""
            with contextlib.suppress(OSError):  # a disk that does not answer is asked again
                why = self._must_end(now) if ends_at == math.inf else ""
            if why:
                say(why)
                ends_at, self._why = now + ENDING_SECONDS, self._why or ENDS
                child.send_signal(signal.SIGTERM)
            if now > ends_at and self._why != GROWS:
                ends_at = now + ENDING_SECONDS
                child.send_signal(signal.SIGINT)  # twice: now
                time.sleep(LOOK_SECONDS)
                child.send_signal(signal.SIGINT)

    def _must_end(self, now: float) -> str:
        """Why the attempt here must end, in words; empty: it need not."""
        self._agreement.look()
        plan, alive = self._agreement.plan, self._neighbors.alive()
        if plan.number > self._launched:
            return "the others go on without this machine: its part of the attempt ends"
        me = alive[self._neighbors.me]
        heard = {me.id, *me.reaches}
        there = {n for n in alive if n in heard and not _has_failed(alive[n], plan)}
        gone = [name for name in plan.machines if name not in there]
        self._lost_since = min(self._lost_since, now) if gone else math.inf
        if now - self._lost_since > ENDING_SECONDS:
            names = self._agreement.said(gone)
            return f"{names} is gone from this attempt, which does not end by itself: it is ended"
        return "" if self.asked or gone else self._grows(plan, alive, now)

    def _grows(self, plan: Plan, alive: dict[str, Machine], now: float) -> str:
        """The first machine saves and ends an attempt that could be one of more machines."""
        there = {name: one for name, one in alive.items() if not one.leaves}
        if plan.machines[0] != self._neighbors.me or len(there) <= len(plan.machines):
            return ""
        more = self._agreement.could_make_it(there)
        is_bigger = set(more) > set(plan.machines)
        self._bigger_since = min(self._bigger_since, now) if is_bigger else math.inf
        is_full = len(more) == self._terms.machines.most
        patience = LEAST_JOIN_SECONDS if is_full else self._terms.patience
        if now - self._bigger_since < patience or not self._has_saved(plan):
            return ""
        self._why = GROWS
        names = self._agreement.said(one for one in more if one not in plan.machines)
        return f"{names} has come: saving, then on {len(more)} machines"

    def _has_saved(self, plan: Plan) -> bool:
        """Whether the attempt makes steps, of a run that has saved: else there is nothing to save,
        and whoever comes and goes would keep it from ever getting on."""
        try:
            owner = self._folder.heartbeat.read_text(encoding="utf-8").split(maxsplit=1)[:1]
        except (OSError, ValueError):
            return False
        attempts = self._folder.attempts()
        begun = newest_number(attempts) > plan.attempts and attempts[-1].began_training
        return begun and owner == [plan.token] and self._folder.latest() is not None

    def _tell(self, words: str) -> None:
        """At once what is new, and each minute what is not; what is over in a moment not at all."""
        told, when = self._told
        now = time.monotonic()
        is_due = now - when >= TOLD_EVERY if words == told else now - self._idle >= SHORT
        if is_due:
            self._told = words, now
            say(words)


def _has_failed(machine: Machine, plan: Plan) -> bool:
    part = machine.part
    return part is not None and part.number == plan.number and part.outcome in (FAILED, RECIPE)


def warn_if_own_disk(run: RunFolder) -> None:
    """Machines that do not see each other's files would each train a run of their own."""
    kind = ["stat", "-f", "-c", "%T", str(run.private)]
    told = subprocess.run(kind, capture_output=True, text=True, check=False).stdout.strip()
    if told.startswith(OWN_DISKS):
        say(
            f"warning: this run folder looks like this machine's own disk ({told}): all must see it"
        )


def is_true(text: str | None) -> bool:
    """As a recipe has it, or a flag without a value."""
    return text is not None and (text.lower() in ("", "true", "1", "yes", "on") or text[0] == "-")


def refuse(*lines: str) -> int:
    say("\n    Hint: ".join(lines))
    return 2


def main() -> int:
    """The module as a program."""
    nnodes, retries, *command = sys.argv[1:]
    try:
        machines = range_of(nnodes)
    except ValueError as error:
        return refuse(f"--nnodes: {error}", "--nnodes 1:3: one machine at least, three at most")
    text = os.environ.get("KEEPSTEP_JOIN_SECONDS", str(JOIN_SECONDS))
    if not text.isdecimal() or not LEAST_JOIN_SECONDS <= int(text) <= 10**6:
        least = f"{LEAST_JOIN_SECONDS} at least"
        return refuse(f"KEEPSTEP_JOIN_SECONDS: {text} is no number of seconds", least)
    output = value_of(command[1:], "output_dir")
    if not output:
        return refuse("--nnodes: the recipe names no output_dir, by which machines find each other")
    if is_true(value_of(command[1:], "node_local")):
        return refuse(
            "--nnodes: node_local: the machines find each other by a run folder that all see",
            "an output_dir that all see; or KEEPSTEP_LAUNCH_ARGS, and the same machines each time",
        )
    warn_without_setpriv()
    any_rows = is_true(value_of(command[1:], "allow_batch_change"))
    terms = Terms(machines, int(retries), int(text), any_rows)
    try:
        processes = int(os.environ["KEEPSTEP_PROCESSES"])
        return Together(terms, command, RunFolder(output), processes).supervise()
    except OSError as error:
        say(f"nothing can be written in {output}: {error}")
        return 70


if __name__ == "__main__":
    sys.exit(main())
