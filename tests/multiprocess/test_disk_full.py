"""A real full disk (tmpfs of a fixed size), met by either rank of a ZeRO-3 run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.conftest import make
from tests.helpers.campaigns import cases
from tests.helpers.disks import small_disk_at
from tests.helpers.folders import events, left_behind
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv

SCRIPT = PROGRAMS / "disk_full.py"
FIELDS = {"max_steps": 20, "save_steps": 4, "eval_steps": 4}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of its layers: the sizes below are counted in its checkpoints."""
    return make(tmp_path_factory.mktemp("demo"), dropout=0.1, layers=4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """100 MB: six checkpoints of the demo model."""
    with small_disk_at(tmp_path / "disk", "100m") as place:
        yield place


@pytest.mark.parametrize(
    ("rank", "mode"),
    cases(itertools.product((0, 1), ("lazy", "off")), long=[(0, "lazy"), (1, "off"), (0, "off")]),
)
def test_a_save_is_skipped_and_the_next_one_arrives(
    ranks: Ranks, demo: Path, small_disk: Path, rank: int, mode: str
) -> None:
    """Nothing may be pruned: the checkpoint that is there is the only one."""
    run = RunFolder(small_disk / "run")
    fields = argv(demo, run.path, **FIELDS, async_save=mode)
    words = [str(rank), "8", "100000", "11", str(small_disk / "ballast")]
    made = ranks.run([*words, *fields], script=SCRIPT)
    assert f"checkpoint-8 was not saved: rank {rank}: OSError: [Errno 28] No space" in made.output
    assert "Training goes on without it; the next save tries again." in made.output
    assert [e["step"] for e in events(run, "save_failed")] == [8]
    assert [c.step for c in run.checkpoints()] == [4, 12, 16, 20]
    assert [e["step"] for e in events(run, "commit")] == [4, 12, 16, 20]
    assert all(run.faults(c, deep=True) == [] for c in run.checkpoints())
    assert left_behind(run) == []
    assert "Finished: 20 steps." in made.output


@pytest.mark.parametrize("mode", cases(["lazy", "off"], long=["lazy", "off"]))
def test_what_may_be_pruned_goes_first(
    ranks: Ranks, demo: Path, small_disk: Path, mode: str
) -> None:
    """Three checkpoints are there, and one of them would go for the fourth: it goes at once."""
    run = RunFolder(small_disk / "run")
    fields = argv(demo, run.path, **{**FIELDS, "save_total_limit": 3}, async_save=mode)
    words = ["1", "16", "1000000", "19", str(small_disk / "ballast")]
    made = ranks.run([*words, *fields], script=SCRIPT)
    assert "checkpoint-16 was not saved: rank 1: OSError: [Errno 28] No space left" in made.output
    assert "Pruned 4: it is tried once more." in made.output
    assert "are left on this disk: room for 0 more checkpoints" in made.output
    committed = [e["step"] for e in events(run, "commit")]
    assert committed[:3] == [4, 8, 12]
    assert committed[3] in ((16,) if mode == "off" else (17, 18))
    assert all(run.faults(c, deep=True) == [] for c in run.checkpoints())
    assert left_behind(run) == []


def test_a_disk_that_is_too_small_is_refused(ranks: Ranks, demo: Path, small_disk: Path) -> None:
    """Before a model is loaded: eight checkpoints, and the one that is being written."""
    run = RunFolder(small_disk / "run")
    made = ranks.start(argv(demo, run.path, **FIELDS, save_total_limit=8))
    assert made.wait() == [2, 2]
    assert "output_dir: 9 checkpoints of 14." in made.output
    assert "[space]" in made.output
    assert made.output.count("keepstep: the recipe has a problem:") == 1
    assert not run.path.exists()


def test_room_is_left_for_others(ranks: Ranks, demo: Path, small_disk: Path) -> None:
    run = RunFolder(small_disk / "run")
    fields = {**FIELDS, "save_total_limit": 2, "min_free_bytes": "50MB"}
    made = ranks.run(argv(demo, run.path, **fields))
    assert "min_free_bytes" not in made.output
    assert len(run.checkpoints()) == 2
    (small_disk / "others").write_bytes(bytes(20 * 10**6))
    fields |= {"max_steps": 28, "last_save_retry_seconds": 0}
    made = ranks.start(argv(demo, run.path, **fields))
    assert made.wait() == [70, 70]
    assert "warning: output_dir: 3 checkpoints of 14." in made.output, "told, not refused"
    assert "min_free_bytes keeps 0.05 GB" in made.output
    assert "Failed at step 28: checkpoint-28 was not saved" in made.output
