"""Which machines make an attempt together, when power, network and commands are lost: the real
commands and networks; a script of a few lines takes the launcher's place."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.policy.machines import Plan
from keepstep.run_folder.machines import MachinesFolder
from keepstep.run_folder.reader import RunFolder
from tests.helpers.machines import PROGRAMS, Command, Machines
from tests.helpers.switch import obstacle
from tests.slurm.helpers.processes import wait_for

pytestmark = pytest.mark.long

# Until a file says with which status it ends, or it is asked to.
ATTEMPT = """#!/bin/bash
trap 'touch "$KEEPSTEP_SCRATCH/asked"; exit 75' TERM INT
echo "$KEEPSTEP_LAUNCH_ARGS" >>"$(dirname "$0")/attempts"
end=$(dirname "$0")/end.$KEEPSTEP_OWNER
while [[ ! -s $end ]]; do sleep 0.1; done
exit $(<"$end")
"""


class Lab:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "recipe.yaml").write_text(f"output_dir: {folder}/run\n")
        (folder / "attempt").write_text(ATTEMPT)
        (folder / "attempt").chmod(0o755)
        self.files = MachinesFolder(RunFolder(folder / "run"))
        self.machines = Machines(folder, "a", "b", "c")
        self.commands: dict[str, Command] = {}
        self._begun = 0
        (folder / "attempts").touch()

    def start(self, names: str, nnodes: str = "1:3") -> None:
        told = {"PATH": os.environ["PATH"], "KEEPSTEP_JOIN_SECONDS": "4", "KEEPSTEP_PROCESSES": "1"}
        command = [sys.executable, "-P", "-m", "keepstep.cli.together", nnodes, "3"]
        command += [str(self.folder / "attempt"), str(self.folder / "recipe.yaml")]
        for name in names:
            self.commands[name] = self.machines.start(name, command, **told)

    def plan(self, number: int, *machines: str) -> Plan:
        """Wait for it, and for its attempt."""
        plan = wait_for(f"plan {number}", lambda: self._plan(number), 120)
        assert sorted(self.hosts(plan)) == sorted(machines)
        assert plan.number == number
        self._begun += len(machines)
        told = self.folder / "attempts"
        wait_for("the attempt", lambda: told.read_text().count("\n") == self._begun, 60)
        return plan

    def _plan(self, number: int) -> Plan | None:
        plan = self.files.plan()
        return plan if plan.number >= number else None

    def hosts(self, plan: Plan) -> list[str]:
        return [one.partition("-")[0] for one in plan.machines]

    def end(self, plan: Plan, status: int) -> None:
        """The attempt ends so, on all machines that are in it."""
        (self.folder / f"end.{plan.token}").write_text(str(status))

    def ends(self, names: str) -> list[int]:
        return [self.commands[name].ends(60) for name in names]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    reason = obstacle(PROGRAMS)
    if reason:
        pytest.skip(f"no machines on this machine: {reason}")
    made = Lab(tmp_path)
    yield made
    made.machines.down()


def test_the_larger_part_goes_on(lab: Lab) -> None:
    """The first machine is cut off; it is healed, and another one's command is killed."""
    lab.start("abc")
    plan = lab.plan(1, "a", "b", "c")
    first = lab.hosts(plan)[0]
    rest = [name for name in "abc" if name != first]
    lab.machines.cut(first)
    time.sleep(6)
    lab.end(plan, 70)
    plan = lab.plan(2, *rest)
    lab.commands[first].says("waiting: attempt 2 is at work on")
    lab.machines.heal(first)
    time.sleep(6)
    lab.end(plan, 70)
    plan = lab.plan(3, "a", "b", "c")
    lost = lab.hosts(plan)[1]
    lab.commands[lost].signal(signal.SIGKILL)
    time.sleep(5)
    lab.end(plan, 70)
    left = [name for name in "abc" if name != lost]
    plan = lab.plan(4, *left)
    lab.end(plan, 0)
    assert lab.ends("".join(left)) == [0, 0]
    told = "".join(command.text() for command in lab.commands.values())
    assert told.count("retry 1 of 3") == 2, "one attempt has failed by itself; it is said again"


def test_an_attempt_that_hangs_without_its_network(lab: Lab) -> None:
    """Of two equal parts that of the first machine goes on; the other takes over from it."""
    lab.start("ab", "1:2")
    plan = lab.plan(1, "a", "b")
    first, other = lab.hosts(plan)
    lab.machines.cut(other)
    lab.plan(2, first)
    lab.commands[first].says("which does not end by itself: it is ended")
    lab.machines.heal(other)
    lab.commands[first].signal(signal.SIGINT)
    assert lab.ends(first) == [75]
    plan = lab.plan(3, other)
    lab.end(plan, 2)
    assert lab.ends(other) == [2]


def test_too_few_are_left_and_all_are_stopped(lab: Lab) -> None:
    lab.start("abc", "2:3")
    plan = lab.plan(1, "a", "b", "c")
    first, *rest = lab.hosts(plan)
    for name in rest:
        lab.machines.crash(name)
    lab.end(plan, 70)
    lab.commands[first].says("waiting: 1 of 2 machines are there")
    lab.machines.boot(rest[0])
    lab.start(rest[0], "2:3")
    lab.plan(2, first, rest[0])
    for name in (first, rest[0]):
        lab.commands[name].signal(signal.SIGTERM)
    assert lab.ends(first + rest[0]) == [75, 75]
