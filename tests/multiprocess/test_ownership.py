"""Two attempts of one run: the one that lost it ends, and writes nothing any more."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv


def test_an_attempt_that_lost_its_run_ends(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """As when it lives on a node that is cut off, and the run goes on elsewhere."""
    fields = {"max_steps": 100_000, "save_steps": 50_000, "eval_steps": 50_000}
    run = ranks.start(argv(demo, tmp_path, **fields))
    run.wait_for(r"step +3/\d+  loss")
    folder = RunFolder(tmp_path)
    folder.owner_file.write_text("9.1.1\n")
    assert run.wait() == [70, 70]
    assert "Failed: the run belongs to a newer attempt (9.1.1), not to this one" in run.output
    assert "Traceback" not in run.output
    assert [attempt.outcome for attempt in folder.attempts()] == [None]
    assert not folder.status.exists()


def test_an_attempt_that_comes_too_late(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """A job names the owner: the launch of an earlier try finds another name."""
    RunFolder(tmp_path).private.mkdir()
    RunFolder(tmp_path).owner_file.write_text("9.1.1\n")
    run = ranks.start(argv(demo, tmp_path), env={"KEEPSTEP_OWNER": "9.0.4"})
    assert run.wait() == [70, 70]
    assert "the run belongs to a newer attempt (9.1.1)" in run.output
    assert [path.name for path in RunFolder(tmp_path).private.iterdir()] == ["owner"]


@pytest.mark.long
def test_the_same_command_twice(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    first = ranks.start(argv(demo, tmp_path, max_steps=400, save_steps=200, eval_steps=200))
    first.wait_for(r"step +3/\d+  loss")
    told = r"process \d+ of this machine trains this run: waiting 20 s for its end"
    stopped = ranks.start(argv(demo, tmp_path))
    stopped.wait_for(told)
    stopped.kill(signal.SIGTERM)
    assert stopped.wait() == [75, 75], "asked to stop, it does not wait on"
    assert "Traceback" not in stopped.output
    second = ranks.start(argv(demo, tmp_path))
    assert second.wait() == [70, 70]
    assert len(re.findall(told, second.output)) == 1
    assert f"is being trained by process {first.pids[0]} of this machine" in second.output
    assert first.wait() == [0, 0]
    assert RunFolder(tmp_path).checkpoints()[-1].step == 400
