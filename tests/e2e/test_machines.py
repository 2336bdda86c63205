"""`launch/train.sh --nnodes MIN:MAX`: machines with a network of their own share a run; they lose
power and network, leave, and come back."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.run_folder.machines import MachinesFolder
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import events
from tests.helpers.launchers import TIMEOUT
from tests.helpers.machines import PROGRAMS, RANK, Command, Machines
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv
from tests.helpers.switch import obstacle
from tests.slurm.helpers.job import HOOKS
from tests.slurm.helpers.processes import wait_for

STEPS = 60
SHORT = {"max_steps": STEPS, "eval_steps": 10, "save_steps": 10, "save_total_limit": 10}
ROWS = 6  # a step of two processes has 12 rows, which three can share out, too


class Run:
    """A run that several machines share."""

    def __init__(self, folder: Path, demo: Path, *names: str) -> None:
        self.folder = RunFolder(folder / "run")
        self._recipe, self._demo, self._faults = folder / "recipe.yaml", demo, folder / "faults"
        self.faults(step_seconds=0.5)
        self.recipe()
        self.machines = Machines(folder, *names)

    def recipe(self, **fields: object) -> None:
        own = {"per_device_train_batch_size": ROWS, "peer_timeout_seconds": 6}
        flags = argv(self._demo, self.folder.path, **(SHORT | own | fields))
        pairs = zip(flags[::2], flags[1::2], strict=True)
        self._recipe.write_text("".join(f"{n[2:]}: {json.dumps(v)}\n" for n, v in pairs))

    def faults(self, **values: object) -> None:
        """What is to go wrong, from the next attempt on; see hooks/sitecustomize.py."""
        self._faults.write_text(json.dumps(values))

    def fired(self, text: str) -> None:
        """Wait for a fault."""
        file = Path(f"{self._faults}.fired")
        wait_for(text, lambda: file.exists() and text in file.read_text(), TIMEOUT, 0.02)

    def start(self, name: str, nnodes: str = "1:3", *more: str, **variables: str) -> Command:
        command = [
            "launch/train.sh",
            str(self._recipe),
            "--nnodes",
            nnodes,
            "--retries",
            "3",
            *more,
        ]
        told = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
        told |= {"KEEPSTEP_JOIN_SECONDS": "4", "KEEPSTEP_PROCESSES": "1"}
        told |= {"PYTHONPATH": str(HOOKS), "KEEPSTEP_FAULTS": str(self._faults)}
        return self.machines.start(name, command, **(told | variables))

    def saved(self, step: int) -> None:
        """Wait for a checkpoint of that step, or of a later one."""
        wait_for(
            f"checkpoint-{step}",
            lambda: any(c.step >= step for c in self.folder.checkpoints()),
            TIMEOUT,
            0.05,
        )

    def losses(self, step: int = STEPS) -> list[tuple[int, float]]:
        state = json.loads((self.folder.path / f"checkpoint-{step}/trainer_state.json").read_text())
        return [(e["step"], e["loss"]) for e in state["log_history"] if "loss" in e]

    def intact(self) -> None:
        for checkpoint in self.folder.checkpoints():
            assert self.folder.faults(checkpoint, deep=True) == []


@pytest.fixture
def pair(tmp_path: Path, still_demo: Path) -> Iterator[Run]:
    yield from made(tmp_path, still_demo, "one", "two")


@pytest.fixture
def three(tmp_path: Path, still_demo: Path) -> Iterator[Run]:
    yield from made(tmp_path, still_demo, "one", "two", "three")


def made(folder: Path, demo: Path, *names: str) -> Iterator[Run]:
    reason = obstacle(PROGRAMS)
    if reason:
        pytest.skip(f"no machines on this machine: {reason}")
    run = Run(folder, demo, *names)
    yield run
    run.machines.down()


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks, still_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes of one machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fields = {**SHORT, "per_device_train_batch_size": ROWS}
    ranks.run(argv(still_demo, folder / "run", **fields))
    return folder


def same_curve(run: Run, undisturbed: Path) -> None:
    """The same rows, and the same losses but for the rounding of another number of processes."""
    straight = RunFolder(undisturbed / "run")
    path = straight.path / f"checkpoint-{STEPS}/trainer_state.json"
    history = json.loads(path.read_text())["log_history"]
    expected = [(e["step"], e["loss"]) for e in history if "loss" in e]
    ours = run.losses()
    assert [step for step, _ in ours] == [step for step, _ in expected]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in expected], abs=2e-3)
    samples = [f.checkpoint(STEPS).manifest.samples for f in (run.folder, straight)]
    assert samples[0] == samples[1]


def test_a_machine_leaves_and_comes_back(pair: Run, undisturbed: Path) -> None:
    """With a save, as a spot machine that is told so; nothing is trained twice."""
    # A busy machine may come late, or give no sign for a while: here nobody is given up for that.
    patient = {"KEEPSTEP_JOIN_SECONDS": "120"}
    pair.recipe(peer_timeout_seconds=120)
    one, two = pair.start("one", "1:2", **patient), pair.start("two", "1:2", **patient)
    pair.saved(10)
    pair.faults(step_seconds=1.0)  # the next attempt outlasts any start of a machine
    two.signal(signal.SIGTERM)
    assert two.ends() == 75
    assert "this machine leaves, the others go on" in two.text()
    one.says("carrying on")
    pair.faults(step_seconds=0.0)
    two = pair.start("two", "1:2", **patient)
    one.says("two has come: saving, then on 2 machines")
    assert (one.ends(), two.ends()) == (0, 0), one.text() + two.text()
    attempts = pair.folder.attempts()
    assert [a.outcome for a in attempts] == ["preempted", "preempted", "finished"]
    resumed = [a.resumed_from for a in attempts]
    assert resumed == [0, *(a.reached for a in attempts[:-1])]

    assert len(re.findall(r"attempt \d on one, two", one.text())) == 2
    same_curve(pair, undisturbed)
    pair.intact()


@pytest.mark.long
def test_three_of_which_one_loses_power_in_mid_save(three: Run, undisturbed: Path) -> None:
    """Two go on; it comes back when they train."""
    three.faults(step_seconds=0.5, place="save", step=40, rank=2, seconds=30)
    commands = [three.start(name) for name in ("one", "two")]
    three.saved(10)
    three.start("three")
    commands[0].says("three has come: saving, then on 3 machines")
    three.fired("save 40")
    three.faults(step_seconds=1.0)
    three.machines.crash("three")
    commands[0].says("without three")
    commands[0].says("carrying on", 2)
    three.faults()
    three.machines.boot("three")
    commands.append(three.start("three"))
    commands[0].says("three has come: saving, then on 3 machines", 2)
    assert [c.ends() for c in commands] == [0, 0, 0]
    (lost,) = events(three.folder, "machine_lost")
    assert (lost["attempt"], lost["machines"]) == (2, ["three"])
    same_curve(three, undisturbed)
    three.intact()


@pytest.mark.long
@pytest.mark.parametrize("how", ["crash", "cut", "kill"])
def test_the_first_machine_is_lost(three: Run, undisturbed: Path, how: str) -> None:
    """By power, network, or SIGKILL to its command; and is back before the end."""
    three.recipe(per_device_train_batch_size=4)  # as many rows a step as the undisturbed run has
    commands = {name: three.start(name) for name in ("one", "two", "three")}
    three.saved(10)
    three.faults(step_seconds=1.0)
    first = MachinesFolder(three.folder).plan().machines[0].partition("-")[0]
    if how == "kill":
        commands[first].signal(signal.SIGKILL)
    else:
        getattr(three.machines, how)(first)
    others = [command for name, command in commands.items() if name != first]
    second = MachinesFolder(three.folder).plan
    wait_for("another plan", lambda: second().number == 2, TIMEOUT)
    assert len(second().machines) == 2
    heads = [c for n, c in commands.items() if second().machines[0].startswith(f"{n}-")]
    heads[0].says("carrying on")
    three.faults()
    if how == "crash":
        three.machines.boot(first)
    if how == "cut":
        commands[first].says("waiting: attempt 2 is at work on")
        three.machines.heal(first)
    else:
        commands[first] = three.start(first)
    heads[0].says(f"{first} has come: saving, then on 3 machines")
    assert [c.ends() for c in (*others, commands[first])] == [0, 0, 0]
    same_curve(three, undisturbed)
    three.intact()


@pytest.mark.long
def test_too_few_are_left(pair: Run, undisturbed: Path) -> None:
    """The other one waits, until there are enough again."""
    one, two = pair.start("one", "2"), pair.start("two", "2")
    pair.saved(10)
    pair.machines.crash("two")
    one.says("waiting: 1 of 2 machines are there (one)")
    pair.machines.boot("two")
    pair.faults()
    two = pair.start("two", "2")
    assert (one.ends(), two.ends()) == (0, 0)
    same_curve(pair, undisturbed)


@pytest.mark.long
def test_both_are_stopped_and_go_on(pair: Run, undisturbed: Path) -> None:
    """`keepstep stop` ends both; Ctrl-C on both does; and each time the same commands go on."""
    commands = [pair.start(name, "1:2") for name in ("one", "two")]
    pair.saved(10)
    pair.folder.request("stop").write_text("")
    assert [c.ends() for c in commands] == [75, 75]
    commands = [pair.start(name, "1:2") for name in ("one", "two")]
    pair.saved(30)
    for command in commands:
        command.signal(signal.SIGINT)
    assert [c.ends() for c in commands] == [75, 75]
    pair.faults()
    commands = [pair.start(name, "1:2") for name in ("one", "two")]
    assert [c.ends() for c in commands] == [0, 0]
    same_curve(pair, undisturbed)


@pytest.mark.long
def test_a_rank_and_a_launcher_are_killed(pair: Run, undisturbed: Path) -> None:
    """Both are launched again, on both."""
    one, two = pair.start("one", "1:2"), pair.start("two", "1:2")
    pair.saved(10)
    two.signal(signal.SIGKILL, RANK)
    wait_for("another attempt", lambda: len(pair.folder.attempts()) == 2, TIMEOUT)
    pair.saved(30)
    pair.faults()
    one.signal(signal.SIGKILL, "accelerate-launch ")
    assert (one.ends(), two.ends()) == (0, 0), one.text() + two.text()
    assert MachinesFolder(pair.folder).plan().end == 0
    assert len(pair.folder.attempts()) == 3
    same_curve(pair, undisturbed)


@pytest.mark.long
def test_a_number_of_machines_that_cannot_share_the_rows(three: Run) -> None:
    """Two have 8 rows a step, which three cannot share out: the third waits, and ends with them."""
    three.recipe(per_device_train_batch_size=4, max_steps=30)
    commands = [three.start(name) for name in ("one", "two")]
    three.saved(10)
    commands.append(three.start("three"))
    assert [c.ends() for c in commands] == [0, 0, 0]
    assert len(three.folder.attempts()) == 1
