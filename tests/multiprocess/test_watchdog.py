"""Whoever is dead, frozen or stuck is named, and nobody else; a pause of all is none of that."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import PROGRAMS, Ranks

THREE: dict[str, Any] = {"script": PROGRAMS / "watched.py", "strategy": "ddp", "processes": 3}
TOLD = {
    "loader": "made no progress for 3 s at the start: stuck",
    "forward": "made no progress for 3 s at the start: stuck",
    "SIGSTOP": "gave no sign of life for",
    "SIGKILL": "died: the process is gone",
    "raises": "failed: ValueError: no such row",
}


@pytest.mark.parametrize("fate", TOLD)
def test_the_rank_that_is_behind_it_is_named_alone(ranks: Ranks, tmp_path: Path, fate: str) -> None:
    started = [ranks.start([fate, str(v), str(tmp_path / str(v))], **THREE) for v in range(3)]
    for victim, run in enumerate(started):
        run.wait_without(victim)
        output = run.output
        assert f"rank {victim} meets its fate" in output
        assert "done" not in output
        told = re.findall(r"rank (\d) (?:ends|fails): (.*)", output)
        others = {rank: reason for rank, reason in told if int(rank) != victim}
        assert len(others) == 2, output
        for reason in others.values():
            assert re.match(rf"rank {victim} on \S+ {TOLD[fate]}", reason), output
            assert "," not in reason.partition(":")[0], "nobody else"


@pytest.mark.long
@pytest.mark.parametrize("seconds", [12])
def test_all_ranks_are_stopped_and_go_on(ranks: Ranks, tmp_path: Path, seconds: float) -> None:
    """docker pause, Slurm's suspend: longer than a silent rank is borne."""
    run = ranks.start(["none", "0", str(tmp_path / "met")], **THREE)
    time.sleep(4)
    run.kill(signal.SIGSTOP)
    time.sleep(seconds)
    run.kill(signal.SIGCONT)
    assert run.wait() == [0, 0, 0]
    assert run.output.count("done") == 3
