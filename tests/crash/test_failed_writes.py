"""A rank that cannot write: every rank learns which and why, and nothing of the save is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import left_behind
from tests.helpers.ranks import PROGRAMS, Ranks

JOB = PROGRAMS / "failing_job.py"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mode", ["off", "lazy"])
def test_all_ranks_learn_which_and_why(ranks: Ranks, tmp_path: Path, rank: int, mode: str) -> None:
    """Rank `rank` may write no file above 1000 bytes at step 2: the kernel's own EFBIG."""
    run = ranks.run([str(tmp_path / "run"), str(rank), mode], script=JOB)
    told = [line for line in run.output.splitlines() if line.startswith("told ")]
    assert len(told) == 2
    for line in told:
        assert (
            f"checkpoint-2 was not saved: rank {rank}: OSError: [Errno 27] File too large" in line
        )
    folder = RunFolder(tmp_path / "run")
    assert [c.step for c in folder.checkpoints()] == [1, 3]
    assert left_behind(folder) == []
    assert '"event": "save_failed", "step": 2' in folder.events.read_text()
