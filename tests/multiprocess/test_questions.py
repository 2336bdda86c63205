"""What people ask most about resuming; the README's table has a line for each.

Out of space: test_disk_full.py. A model that differs after resuming: test_resume.py.
"""

from __future__ import annotations

from pathlib import Path

from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv


def test_file_not_found_and_no_trainer_state(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}
    ranks.run(argv(demo, run, **short))

    gone = ranks.start(argv(demo, run, **short, resume_from_checkpoint="gone/checkpoint-9"))
    assert gone.wait() == [2, 2]
    assert "gone/checkpoint-9 holds no readable manifest.json" in gone.output
    gone = ranks.start(argv(demo, run, **short, resume_from_checkpoint=9))
    assert gone.wait() == [2, 2]
    assert "9 cannot be had; there are checkpoints at: 4, 2" in gone.output
    assert "Traceback" not in gone.output

    (run / "checkpoint-4/trainer_state.json").unlink()
    again = ranks.run(argv(demo, run, **short))
    assert "checkpoint-4 is passed by: trainer_state.json is missing" in again.output
    assert "carrying on from checkpoint-2" in again.output
    assert (run / ".keepstep/quarantine/checkpoint-4-attempt-4").is_dir()
