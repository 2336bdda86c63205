"""Saves that go on behind training: the same bytes, the same promises."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import left_behind
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import LORA, argv

SHIM = PROGRAMS / "shimmed.py"
FAILED = "checkpoint-4 was not saved: rank 1: "


def digests(run: Path) -> dict[tuple[int, str], str]:
    """(step, file) → digest, of all but the log, which holds how long evaluations took."""
    return {
        (c.step, name): entry.xxh3_128
        for c in RunFolder(run).checkpoints()
        for name, entry in c.manifest.files.items()
        if name != "trainer_state.json"
    }


def saves(run: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (run / ".keepstep/events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "commit"]


@pytest.mark.parametrize(
    ("strategy", "fields"),
    [
        pytest.param("cpu_zero3", {}, marks=pytest.mark.long),
        pytest.param("cpu_zero2", {}, marks=pytest.mark.long),
        pytest.param("ddp", LORA, marks=pytest.mark.long),
        ("ddp", {"optim": "adafactor"}),
    ],
    ids=["zero3", "zero2", "ddp-lora", "ddp-adafactor"],
)
def test_checkpoints_are_the_same_in_every_mode(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str, fields: dict[str, object]
) -> None:
    # Of an optimizer that is not known, snapshots are taken where saves should be lazy.
    modes = ("off", "lazy") if "optim" in fields else ("off", "snapshot", "lazy")
    for mode in modes:
        ranks.run(argv(demo, tmp_path / mode, async_save=mode, **fields), strategy=strategy)
    assert len(digests(tmp_path / "off")) > 20
    assert all(digests(tmp_path / "off") == digests(tmp_path / mode) for mode in modes)


def test_training_goes_on_while_a_save_is_written(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """A save takes until the next one, which waits for it, and says so; and two seconds more."""
    run = ranks.run(["slow", *argv(demo, tmp_path, save_steps=4, max_steps=12)], script=SHIM)
    text = run.output
    assert text.index("rank 0 writes checkpoint-4") < text.index("step  5/12  loss")
    assert text.index("step  5/12  loss") < text.index("saved checkpoint-4")
    waited = re.findall(r"of it for the save before", text)
    assert len(waited) == 2, text
    first, second, third = saves(tmp_path)
    assert first["wait"] == 0
    assert min(second["wait"], third["wait"]) > 0.5
    assert second["stall"] >= second["wait"]
    assert {"copy", "write", "digest", "commit", "gb_per_s", "slowest_rank"} <= first.keys()
    assert [c.step for c in RunFolder(tmp_path).checkpoints()] == [4, 8, 12], "drained at the end"


def test_a_signal_during_a_background_write(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """What is on its way arrives, then the step that training stopped at; twice asked is once."""
    run = ranks.start(["asked", *argv(demo, tmp_path, max_steps=40)], script=SHIM)
    run.wait_for("rank 1 writes checkpoint-4")
    run.kill(signal.SIGTERM, ranks=[0])
    run.kill(signal.SIGTERM, ranks=[0, 1])
    assert run.wait() == [75, 75]
    status = json.loads((tmp_path / ".keepstep/status.json").read_text())
    assert status["outcome"] == "preempted"
    folder = RunFolder(tmp_path)
    assert [c.step for c in folder.checkpoints()] == [4, status["global_step"]]
    assert all(folder.faults(c, deep=True) == [] for c in folder.checkpoints())
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("full", FAILED + r"OSError: \[Errno 28\] No space left on device"),
        pytest.param(
            "speechless",
            FAILED + r"OSError: \[Errno 28\] No space left on device",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_writer_that_fails_is_heard_of_while_training_goes_on(
    ranks: Ranks, demo: Path, tmp_path: Path, fault: str, message: str
) -> None:
    run = ranks.run([fault, *argv(demo, tmp_path)], script=SHIM)
    assert len(re.findall(message, run.output)) == 2, "every rank says so"
    told = re.search(message, run.output)
    assert told is not None
    assert told.start() < run.output.index("step 12/12  loss"), "not at the end alone"
    folder = RunFolder(tmp_path)
    assert [c.step for c in folder.checkpoints()] == [8, 12]
    assert left_behind(folder) == []


def test_a_writer_that_is_stuck(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Noticed when the time is over; no save until it comes back; then as before."""
    run = ranks.run(["stuck", *argv(demo, tmp_path, max_steps=24)], script=SHIM)
    told = "checkpoint-4 was not saved: .*rank 1: its writer is stuck"
    assert len(re.findall(told, run.output)) == 2, "every rank says so"
    assert "checkpoint-8 was not saved: rank 0: the one of step 4 is not done" in run.output
    folder = RunFolder(tmp_path)
    kept = [c.step for c in folder.checkpoints()]
    assert 4 not in kept
    assert kept[-1] == 24
    assert left_behind(folder) == [], "what it wrote when it came back is gone"
    lines = folder.events.read_text().splitlines()
    assert sum('"save_failed", "step": 4' in line for line in lines) == 1
    assert all(folder.faults(c, deep=True) == [] for c in folder.checkpoints())


def test_on_save_error_stop(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    command = argv(demo, tmp_path, on_save_error="stop")
    run = ranks.start(["full", *command], script=SHIM)
    assert run.wait() == [70, 70]
    assert "SaveError: checkpoint-4 was not saved: rank 1" in run.output
    assert json.loads((tmp_path / ".keepstep/status.json").read_text())["outcome"] == "failed"


def test_too_little_memory_for_snapshots(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    run = ranks.run(["little-memory", *argv(demo, tmp_path)], script=SHIM)
    assert "has 0.005 GB of memory left, and snapshots of its ranks take 0.0" in run.output
    assert run.output.count("checkpoints are written in the foreground") == 1
    assert [c.step for c in RunFolder(tmp_path).checkpoints()] == [4, 8, 12]


@pytest.mark.parametrize(("stage", "weights"), cases([(2, 4), (3, 4)], long=[(2, 4)]))
def test_bytes_of_a_checkpoint(
    ranks: Ranks, demo: Path, tmp_path: Path, stage: int, weights: int
) -> None:
    """Masters and two moments of four bytes, and the weights once, in their own type."""
    ranks.run(argv(demo, tmp_path, max_steps=4), strategy=f"cpu_zero{stage}")
    (checkpoint,) = RunFolder(tmp_path).checkpoints()
    fixed = sum(
        entry.bytes
        for name, entry in checkpoint.manifest.files.items()
        if not name.endswith(("optim_states.pt", ".safetensors"))
    )
    assert checkpoint.manifest.total_bytes - fixed <= 1.02 * 853_120 * (12 + weights)
    assert fixed < 600_000, "none of these has the weights in it"


@pytest.mark.parametrize("strategy", cases(["cpu_zero2", "cpu_zero3"], long=["cpu_zero2"]))
def test_weights_that_have_to_be_gathered(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str
) -> None:
    ranks.run(argv(demo, tmp_path / "slices", max_steps=4), strategy=strategy)
    command = ["gather", *argv(demo, tmp_path / "gathered", max_steps=4)]
    run = ranks.run(command, strategy=strategy, script=SHIM)
    assert run.output.count("every save gathers the weights on one rank: save_pretrained") == 1
    weights = [
        load_file(tmp_path / name / "checkpoint-4/model.safetensors")
        for name in ("slices", "gathered")
    ]
    assert weights[0].keys() <= weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    folder = RunFolder(tmp_path / "gathered")
    assert folder.faults(folder.checkpoint(4), deep=True) == []


@pytest.mark.parametrize(
    "strategy", cases(["cpu_zero2", "cpu_zero3", "ddp"], long=["cpu_zero3", "ddp"])
)
def test_the_best_is_loaded_at_the_end(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str
) -> None:
    """After the last save has arrived, and under ZeRO-2 without the 16-bit weights in the file."""
    # The loss falls, so with the sign turned round the first checkpoint is the best.
    fields = {"load_best_model_at_end": True, "greater_is_better": True}
    script = PROGRAMS / "load_best.py"
    run = ranks.run(argv(demo, tmp_path, **fields), strategy=strategy, script=script)
    told = re.search(r"best (\d+) of 12, loaded: True", run.output)
    assert told is not None, run.output
    assert int(told[1]) == 4
