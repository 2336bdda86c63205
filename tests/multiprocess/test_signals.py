"""Any signal, any rank, any phase: all ranks stop at the same step, and go on bit for bit."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from keepstep.ranks import signals
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests, left_behind
from tests.helpers.launchers import end, start
from tests.helpers.ranks import PROGRAMS, Ranks, Run
from tests.helpers.recipes import argv

SCRIPT, SHIM = (PROGRAMS / name for name in ("stopped.py", "shimmed.py"))
PHASES = ("tokenisation", "forward", "backward", "evaluation", "save", "write")
SIGNALS = itertools.cycle(("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"))
EVERY = [
    (phase, target, strategy, processes, next(SIGNALS))
    for phase in PHASES
    for target in ("0", "1", "all")
    for strategy in ("cpu_zero3", "ddp")
    for processes in (2, 3)
]
SOME = EVERY[::11]  # every phase, target, strategy and number
LAUNCHED = [*itertools.product(PHASES, ("cpu_zero3", "ddp"), (2, 3), ("SIGTERM", "SIGHUP"))]
FIELDS = {"max_steps": 9, "per_device_train_batch_size": 2}


def test_the_sample_is_one() -> None:
    for part, all_of_it in zip(zip(*SOME, strict=True), zip(*EVERY, strict=True), strict=True):
        assert set(part) == set(all_of_it)


def compare(run: Path, straight: Path) -> None:
    """Bit for bit."""
    found, expected = final_digests(run, 9), final_digests(straight, 9)
    assert found.keys() == expected.keys()
    # The last of three ranks pads its slices, and nobody looks at what is in the padding.
    padded = "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    assert [n for n in found if found[n] != expected[n] and not n.endswith(padded)] == []


@pytest.fixture(scope="module")
def straight(ranks: Ranks, demo: Path, workspace: Path) -> dict[tuple[str, int], Path]:
    found = {}
    for strategy, processes in itertools.product(("cpu_zero3", "ddp"), (2, 3)):
        run = workspace / f"never-stopped-{strategy}-{processes}"
        ranks.run(argv(demo, run, **FIELDS), strategy=strategy, processes=processes)
        found[strategy, processes] = run
    return found


@pytest.mark.parametrize(
    ("phase", "target", "strategy", "processes", "name"), cases(EVERY, long={*EVERY} - {*SOME})
)
def test_a_signal(
    ranks: Ranks,
    demo: Path,
    tmp_path: Path,
    straight: dict,
    phase: str,
    target: str,
    strategy: str,
    processes: int,
    name: str,
) -> None:
    run = tmp_path / "run"
    where: dict[str, Any] = {"strategy": strategy, "processes": processes, "script": SCRIPT}
    command = argv(demo, run, **FIELDS)
    stopped = ranks.start([phase, target, name, *command], **where)
    assert stopped.wait() == [75] * processes, stopped.output
    assert f"{name} in {phase} to rank" in stopped.output
    assert "Finished" not in stopped.output
    assert f"{name} to rank {0 if target == 'all' else target}" in check_stopped(run, phase)

    ranks.run(["none", "0", name, *command], **where)
    compare(run, straight[strategy, processes])


def check_stopped(run: Path, phase: str) -> str:
    """All is as it should be after a stop in that phase; returns the reason that is given."""
    status = json.loads((run / ".keepstep/status.json").read_text())
    assert (status["outcome"], status["exit"]) == ("preempted", 75)
    folder = RunFolder(run)
    if phase == "tokenisation":  # there is nothing to save
        assert (status["global_step"], folder.checkpoints()) == (None, [])
        return str(status["reason"]).removesuffix(", before training began")
    # The ranks ask each other before a step's last pass: what comes in it is heard at the next
    # step's end, unless another rank had not asked yet.
    at = {
        "forward": (5, 6),
        "backward": (5, 6),
        "evaluation": (4, 4),
        "save": (5, 5),
        "write": (5, 6),
    }
    first, last = at[phase]
    assert first <= status["global_step"] <= last
    assert folder.checkpoints()[-1].step == status["global_step"]
    assert all(folder.faults(checkpoint, deep=True) == [] for checkpoint in folder.checkpoints())
    assert left_behind(folder) == []
    return str(status["reason"])


@pytest.mark.parametrize(
    ("phase", "strategy", "processes", "name"),
    cases(LAUNCHED, long=LAUNCHED),  # tests/e2e sends one to each kind of launcher
)
def test_a_signal_to_the_launcher(
    ranks: Ranks,
    demo: Path,
    tmp_path: Path,
    straight: dict,
    phase: str,
    strategy: str,
    processes: int,
    name: str,
) -> None:
    run = tmp_path / "run"
    fields = argv(demo, run, **FIELDS)
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{strategy}.yaml"]
    command += ["--num_processes", str(processes), "--num_machines", "1"]
    command += ["--main_process_port", "0", str(SCRIPT), phase, "launcher", name, *fields]
    code, output = end(start(command, tmp_path / "log"), tmp_path / "log")
    assert code != 0
    assert f"{name} in {phase} to the launcher" in output
    assert "Finished" not in output
    told = check_stopped(run, phase)
    assert told == ", ".join(f"{name} to rank {rank}" for rank in range(processes))

    ranks.run(fields, strategy=strategy, processes=processes)
    compare(run, straight[strategy, processes])


def test_a_rank_that_waits_for_one_that_never_comes(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    """As when a signal has ended the other before it could be handled there."""
    run = ranks.start(argv(demo, tmp_path), script=SCRIPT.with_name("unjoined.py"))
    run.wait_for("rank 0 waits for the others")
    time.sleep(2)
    run.kill(signal.SIGTERM, ranks=[0])
    assert run.wait_without(1) == [75, -signal.SIGKILL]
    assert "Stopped on request (SIGTERM) before the run began." in run.output


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("cpu_zero3", marks=pytest.mark.long)])
def test_while_a_compiler_is_at_work(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str
) -> None:
    """What the stop has broken off is no error, and no fault of the recipe's. TERM that nobody has
    asked for is what launchers send when a rank has failed: there the error counts."""
    script = SCRIPT.with_name("compiling.py")
    run = ranks.start(["SIGUSR1", *argv(demo, tmp_path / "run")], script=script, strategy=strategy)
    assert run.wait() == [75, 75], run.output
    status = json.loads((tmp_path / "run/.keepstep/status.json").read_text())
    assert (status["outcome"], status["global_step"]) == ("preempted", None)
    assert status["reason"] == "SIGUSR1 to rank 0, before training began"
    assert "Traceback" not in run.output

    run = ranks.start(["SIGTERM", *argv(demo, tmp_path / "run")], script=script, strategy=strategy)
    assert run.wait()[0] == 70, run.output
    assert "CalledProcessError" in run.output


def test_a_second_interrupt_means_now(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """In the middle of a save; as safe as any kill."""
    fields = argv(demo, tmp_path, max_steps=12)
    run = ranks.start(["held", *fields], script=SHIM)
    run.wait_for("rank 1 writes checkpoint-4")
    run.kill(signal.SIGINT)
    run.wait_for("rank 1 writes checkpoint-(?!4)")  # what was in flight has arrived
    time.sleep(signals.ONE_REQUEST_SECONDS + 0.1)  # then this is another request
    run.kill(signal.SIGINT)
    assert run.wait() == [128 + signal.SIGINT] * 2  # that save would never end
    assert "keepstep: a second SIGINT: this rank ends at once" in run.output
    folder = RunFolder(tmp_path)
    assert [c.step for c in folder.checkpoints()] == [4]
    assert folder.faults(folder.checkpoints()[0], deep=True) == []
    assert "carrying on from checkpoint-4" in ranks.run(fields).output


@pytest.mark.parametrize(
    ("strategy", "processes"),
    cases([("cpu_zero3", 2), ("ddp", 3), ("cpu_zero3", 3)], long=[("ddp", 3), ("cpu_zero3", 3)]),
)
def test_a_rank_that_dies_ends_the_others(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str, processes: int
) -> None:
    command = argv(demo, tmp_path, max_steps=100_000, save_steps=50_000, eval_steps=50_000)
    run = ranks.start(command, strategy=strategy, processes=processes)
    run.wait_for(r"step +3/\d+  loss")
    run.kill(signal.SIGKILL, ranks=[processes - 1])
    codes = run.wait()
    assert codes[-1] == -signal.SIGKILL
    assert 0 not in codes
    status = json.loads((tmp_path / ".keepstep/status.json").read_text())
    assert status["outcome"] == "failed"
    named = f"rank {processes - 1} on {socket.gethostname()} died: the process is gone"
    assert status["reason"].startswith(named), "not: Connection closed by peer"


@pytest.mark.parametrize("victim", cases([0, 1], long=[1]))
def test_a_frozen_rank_is_named(ranks: Ranks, demo: Path, tmp_path: Path, victim: int) -> None:
    """SIGSTOP: its connections stay open, and without a watchdog the others wait for ever."""
    fields = {"max_steps": 100_000, "save_steps": 50_000, "eval_steps": 50_000}
    run = ranks.start(argv(demo, tmp_path, **fields, peer_timeout_seconds=6), processes=3)
    run.wait_for(r"step +3/\d+  loss")
    run.kill(signal.SIGSTOP, ranks=[victim])
    codes = run.wait_without(victim)
    assert [code for rank, code in enumerate(codes) if rank != victim] == [70, 70]
    assert f"keepstep: rank {victim} on " in run.output
    assert "gave no sign of life for" in run.output
    if victim != 0:
        reason = json.loads((tmp_path / ".keepstep/status.json").read_text())["reason"]
        assert "rank 1 on" in reason


@pytest.mark.long
def test_a_rank_that_freezes_before_the_first_step(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    fields = argv(demo, tmp_path, peer_timeout_seconds=4)
    run = ranks.start(["tokenisation", "1", "SIGSTOP", *fields], script=SCRIPT)
    run.wait_for("SIGSTOP in tokenisation to rank 1")
    assert run.wait_without(1) == [70, -signal.SIGKILL]
    assert "keepstep: rank 1 on " in run.output
    assert "gave no sign of life for 16 s" in run.output


def test_dataloader_workers_leave_signals_to_their_ranks(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    """Slurm signals every process of a job."""
    fields = {"max_steps": 100_000, "save_steps": 50_000, "eval_steps": 50_000}
    fields |= {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    run = ranks.start(argv(demo, tmp_path, **fields))
    run.wait_for(r"step +3/\d+  loss")
    workers = [w for pid in run.pids for w in psutil.Process(pid).children(recursive=True)]
    assert len(workers) >= 2
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    time.sleep(1)
    run.kill(signal.SIGTERM)
    assert run.wait() == [75, 75]
    assert "exited unexpectedly" not in run.output


@pytest.mark.parametrize(
    ("strategy", "processes"), cases([("ddp", 1), ("cpu_zero3", 2)], long=[("cpu_zero3", 2)])
)
def test_a_stop_in_an_evaluation_that_a_callback_makes(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str, processes: int
) -> None:
    """The callback gets its metrics, whatever called it goes on; the step is saved, all stop."""
    where: dict[str, Any] = {
        "script": PROGRAMS / "two_lines.py",
        "strategy": strategy,
        "processes": processes,
    }
    fields = {"save_steps": 100, "eval_strategy": "no", "keep_ranking": "recency"}

    def launch(run: Path, **more: object) -> Run:
        return ranks.start([str(run), str(demo), json.dumps(fields | more)], **where)

    stopped = launch(tmp_path / "run", evaluate=5)
    assert stopped.wait() == [75] * processes, stopped.output
    assert stopped.output.count("evaluated by itself: True") == processes
    assert RunFolder(tmp_path / "run").checkpoints()[-1].step == 5
    assert json.loads((tmp_path / "run/.keepstep/status.json").read_text())["exit"] == 75
    assert launch(tmp_path / "run").wait() == [0] * processes
    assert launch(tmp_path / "straight").wait() == [0] * processes
    ends = [
        RunFolder(tmp_path / name).checkpoint(12).manifest.files for name in ("run", "straight")
    ]
    assert ends[0]["model.safetensors"] == ends[1]["model.safetensors"]
