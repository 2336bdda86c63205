"""What a run tells of itself while it is killed and launched again, by real processes."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.run_folder.progress import goodput_of, progress_of
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import events
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv


def test_a_run_of_kills(ranks: Ranks, demo: Path, workspace: Path) -> None:
    """Killed with steps that are not saved, then on one process; all its time is accounted for."""
    run = RunFolder(workspace / "kills")
    every = {"save_steps": 60, "eval_steps": 60, "eval_on_start": True}
    command = argv(demo, run.path, max_steps=100_000, **every)
    killed = ranks.start(command)
    killed.wait_for("saved checkpoint-60")
    deadline = time.monotonic() + 60
    while True:  # until the heartbeat has told of steps that are not saved
        seen, saved = progress_of(run), run.latest()
        if seen is not None and saved is not None and seen.step > saved.step:
            break
        assert time.monotonic() < deadline
    killed.kill(signal.SIGKILL)
    killed.wait()
    alone = goodput_of(run)
    assert alone.repeated > 0  # nobody has launched it again: what is not saved is lost
    step = run.checkpoints()[-1].step
    ranks.run([*command, "--max_steps", str(step + 60)], processes=1)

    (heard,) = events(run, "heard")
    assert heard["of"] == 1
    assert heard["step"] >= seen.step
    found = goodput_of(run)
    assert sum(found.parts.values()) == found.wall
    lacking = [name for name, part in found.parts.items() if part == 0 and name != "unknown"]
    assert lacking == []
    assert found.unknown < 0.1 * found.wall
    told = CliRunner().invoke(app, ["goodput", str(run.path), "--json"])
    assert round(sum(json.loads(told.stdout)["percent"].values()), 6) == 100
    listed = CliRunner().invoke(app, ["ls", str(run.path)]).stdout
    assert f"goodput: {found.told()}" in listed
