"""What `keepstep adopt` refuses, and that nothing is left of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from keepstep.convert.adopt import AdoptError, adopt
from keepstep.run_folder.reader import RunFolder
from keepstep.sharding.shards import zero_source
from keepstep.sharding.sources import ReshardError, stored_optimizer
from keepstep.trainer.restore import schedule_for
from tests.helpers.folders import commit, left_behind


def stock(folder: Path, **changes: object) -> Path:
    """A stock Trainer's checkpoint of one process, as small as can be."""
    folder.mkdir(parents=True)
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 4}, folder / "scheduler.pt")
    torch.save({}, folder / "rng_state.pth")
    torch.save({"hub_token": "hf_secret"}, folder / "training_args.bin")
    log = [{"step": 4, "eval_loss": 1.5}, {"step": 2, "eval_loss": 9.0}]
    state = {"global_step": 4, "epoch": 0.5, "max_steps": 8, "log_history": log}
    state["best_model_checkpoint"] = "/home/me/checkpoint-2"
    (folder / "trainer_state.json").write_text(json.dumps(state | changes))
    return folder


def test_a_stock_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    told: list[tuple[int, int]] = []
    adopted = adopt(stock(tmp_path / "checkpoint-4"), run, progress=lambda *far: told.append(far))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    (checkpoint,) = run.checkpoints()
    assert checkpoint == adopted.checkpoint
    manifest = checkpoint.manifest
    assert (manifest.global_step, manifest.planned_steps, manifest.samples) == (4, 8, None)
    assert (manifest.world_size, manifest.zero_stage, manifest.metrics) == (
        1,
        0,
        {"eval_loss": 1.5},
    )
    assert run.faults(checkpoint, deep=True) == []
    assert "the rows of a step: the recipe's are taken" in adopted.unchecked
    assert not (checkpoint.path / "training_args.bin").exists()
    assert "/home/me" not in (checkpoint.path / "trainer_state.json").read_text()
    with pytest.raises(AdoptError, match="is a run already"):
        adopt(tmp_path / "checkpoint-4", run)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdoptError, match="is no checkpoint"):
        adopt(tmp_path / "empty", run)
    with pytest.raises(AdoptError, match="has a manifest"):
        adopt(commit(tmp_path / "other", 3), run)
    half = stock(tmp_path / "half")
    (half / "scheduler.pt").unlink()
    with pytest.raises(AdoptError, match=r"has no scheduler\.pt"):
        adopt(half, run)
    torn = stock(tmp_path / "torn")
    (torn / "optimizer.pt").write_bytes((torn / "optimizer.pt").read_bytes()[:100])
    with pytest.raises(AdoptError, match=r"optimizer\.pt"):
        adopt(torn, run)
    assert run.checkpoints() == []
    assert left_behind(run) == []


def test_a_schedule_for_other_groups() -> None:
    """DeepSpeed drops parameter groups that are empty; torch keeps them."""
    stored = {"last_epoch": 4, "base_lrs": [0.1], "_last_lr": [0.05], "lr_lambdas": [None]}
    two = schedule_for(2, stored)
    assert (two["base_lrs"], two["_last_lr"], two["last_epoch"]) == ([0.1] * 2, [0.05] * 2, 4)
    assert schedule_for(1, two) == stored
    with pytest.raises(ValueError, match="different schedules"):
        schedule_for(1, stored | {"base_lrs": [0.1, 0.2]})


def test_what_deepspeed_stores_at_stage_0(tmp_path: Path) -> None:
    """The optimizer is in the module's file, whole; in 16 bit with masters that are not known."""
    (tmp_path / "latest").write_text("global_step3")
    file = tmp_path / "global_step3/mp_rank_00_model_states.pt"
    file.parent.mkdir()
    whole = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"params": [0]}]}
    torch.save({"module": {}, "optimizer": whole}, file)
    assert zero_source(tmp_path) is None
    assert stored_optimizer(tmp_path) == whole
    torch.save({"module": {}, "optimizer": {"fp32_groups_flat": []}}, file)
    with pytest.raises(ReshardError, match="half precision at ZeRO stage 0 is not supported"):
        stored_optimizer(tmp_path)
