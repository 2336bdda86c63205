"""Stop at any step, run the same command again: the same weights, bit for bit, with dropout on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import LORA, argv

CASES = {
    "zero2": ("cpu_zero2", {}),
    "zero3": ("cpu_zero3", {}),
    "zero2-offload": ("cpu_zero2-offload", {}),
    "zero3-offload": ("cpu_zero3-offload", {}),
    "lora": ("cpu_zero3", LORA),
    "ddp": ("ddp", {}),
    "zero0": ("cpu_zero0", {}),
    "zero0-lora": ("cpu_zero0", LORA),
    "sequences": ("cpu_zero3-sp2", {}),
    "compiled": ("cpu_zero2", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
}


def loss_curve(output_dir: Path) -> dict[int, float]:
    state = json.loads((output_dir / "checkpoint-12/trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


@pytest.mark.parametrize(
    "case",
    cases(
        CASES,
        long=[
            "ddp",
            "lora",
            "zero2",
            "zero2-offload",
            "zero3-offload",
            "zero0",
            "zero0-lora",
            "compiled",
        ],
    ),
)
def test_interrupted_equals_uninterrupted(
    ranks: Ranks, demo: Path, workspace: Path, case: str
) -> None:
    strategy, fields = CASES[case]
    straight, broken = workspace / f"straight-{case}", workspace / f"broken-{case}"
    ranks.run(argv(demo, straight, **fields), strategy=strategy)
    command = argv(demo, broken, **fields)

    killed_at = random.Random(case).randint(1, 9)
    ranks.killed(command, killed_at, strategy=strategy)

    stopped = ["forward@10", "1", "SIGTERM", *command]  # one rank hears it, all of them stop
    run = ranks.start(stopped, strategy=strategy, script=PROGRAMS / "stopped.py")
    assert run.wait() == [75, 75]
    assert "SIGTERM to rank 1" in run.output
    status = json.loads((broken / ".keepstep/status.json").read_text())
    assert status["outcome"] == "preempted"
    stopped_at = status["global_step"]
    assert stopped_at in (11, 12)
    assert RunFolder(broken).checkpoints()[-1].step == stopped_at
    for shard in broken.glob(f"checkpoint-{stopped_at}/global_step*/*model_states.pt"):
        assert torch.load(shard, weights_only=False)["global_steps"] == stopped_at

    run = ranks.run(command, strategy=strategy)
    assert f"carrying on from checkpoint-{stopped_at}" in run.output
    assert final_digests(broken, 12) == final_digests(straight, 12)

    assert loss_curve(broken) == loss_curve(straight)
    tokens = {RunFolder(run).checkpoint(12).manifest.about["tokens"] for run in (broken, straight)}
    assert len(tokens) == 1, "all attempts are counted"
    assert min(tokens) > 0


def test_a_finished_run_does_not_train_again(ranks: Ranks, demo: Path, workspace: Path) -> None:
    output_dir = workspace / "again"
    ranks.run(argv(demo, output_dir, max_steps=4))
    before = RunFolder(output_dir).checkpoints()
    run = ranks.run(argv(demo, output_dir, max_steps=4))
    assert "there is nothing to train" in run.output
    assert RunFolder(output_dir).checkpoints() == before
    run = ranks.run(argv(demo, output_dir, max_steps=6))
    assert "carrying on from checkpoint-4" in run.output
    assert [c.step for c in RunFolder(output_dir).checkpoints()] == [4, 6]


def test_a_damaged_checkpoint_is_passed_by(ranks: Ranks, demo: Path, workspace: Path) -> None:
    output_dir = workspace / "damaged"
    ranks.run(argv(demo, output_dir, max_steps=8))
    weights = output_dir / "checkpoint-8/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    run = ranks.run(argv(demo, output_dir, max_steps=8))
    assert "checkpoint-8 is passed by: model.safetensors has 1000 bytes" in run.output
    assert "carrying on from checkpoint-4" in run.output
    folder = RunFolder(output_dir)
    assert folder.faults(folder.checkpoint(8), deep=True) == []
    assert (folder.quarantine / "checkpoint-8-attempt-2").is_dir()
