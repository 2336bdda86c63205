"""Rows without padding train as padded ones do, and a resume hears of what has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv

STEPS = {"max_steps": 4, "eval_steps": 2, "save_steps": 2}


def losses(run: Path) -> list[float]:
    """Of every step, and of every evaluation."""
    state = json.loads((run / "checkpoint-4/trainer_state.json").read_text())
    return [e.get("loss", e.get("eval_loss")) for e in state["log_history"][:6]]


def test_rows_without_padding(ranks: Ranks, still_demo: Path, workspace: Path) -> None:
    padded, plain = workspace / "padded", workspace / "without-padding"
    # 96 rows to evaluate on, in batches of 7: the last ones are smaller, and weigh less.
    fields = {**STEPS, "per_device_eval_batch_size": 7}
    ranks.run(argv(still_demo, padded, **fields), strategy="ddp")
    run = ranks.run(argv(still_demo, plain, padding_free=True, **fields), strategy="ddp")
    assert "no Liger (no CUDA device), rows without padding, packing off" in run.output
    assert losses(plain) == pytest.approx(losses(padded), abs=2e-5)
    kept = [RunFolder(r).checkpoint(4).manifest for r in (padded, plain)]
    assert [m.settings["padding_free"] for m in kept] == [False, True]
    assert [m.settings["use_liger_kernel"] for m in kept] == [False, False]
    assert kept[0].about["tokens"] == kept[1].about["tokens"]

    longer = fields | {"max_steps": 6}
    refused = ranks.start(argv(still_demo, padded, padding_free=True, **longer), strategy="ddp")
    assert refused.wait() == [2, 2]
    assert "padding_free: False → True" in refused.output
    refused = ranks.start(argv(still_demo, plain, **longer), strategy="ddp")
    assert refused.wait() == [2, 2]
    assert "padding_free: True → False (attention is sdpa)" in refused.output
    ranks.run(argv(still_demo, plain, padding_free=True, **longer), strategy="ddp", processes=1)
