"""The resumed run is the same run: what is easily lost on the way, and the weights bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

from keepstep.checkpoint.runfolder import RunFolder
from tests.helpers.folders import final_digests
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv

ALONE = {"strategy": "ddp", "processes": 1}


def test_a_stream_goes_on_in_a_later_pass(ranks: Ranks, demo: Path, workspace: Path) -> None:
    """50 rows, 12 a step: a pass has 5 steps, and the run is killed in the second one."""
    rows = (demo / "data/train.jsonl").read_text().splitlines(keepends=True)[:50]
    (workspace / "stream.jsonl").write_text("".join(rows))
    straight, broken = workspace / "stream-straight", workspace / "stream-broken"
    fields = {
        "dataset_name": workspace / "stream.jsonl",
        "dataset_streaming": True,
        "per_device_train_batch_size": 12,
        "save_steps": 1,
    }
    ranks.run(argv(demo, straight, **fields), **ALONE)
    run = ranks.start(argv(demo, broken, **fields), **ALONE)
    run.wait_for("step  7/12  saved")
    run.kill(signal.SIGKILL)
    run.wait()
    again = ranks.run(argv(demo, broken, **fields), **ALONE)
    assert "carrying on from checkpoint-" in again.output
    assert final_digests(broken, 12) == final_digests(straight, 12)
    last = RunFolder(broken).checkpoint(12).manifest
    assert (last.dealt["passes"], last.dealt["done"]) == (2, 2)
    refused = ranks.start(
        argv(
            *(demo, broken),
            **fields | {"per_device_train_batch_size": 6, "max_steps": 14},
            gradient_accumulation_steps=2,
        ),
        **ALONE,
    )
    assert refused.wait() == [2]
    assert "streamed rows are dealt out as before, or not at all" in refused.output
