"""Kill at every disk operation of start, save, commit, prune and sweep; then run the same command.

The resume takes the last step that was saved, or the one that was being saved: never neither.
"""

from __future__ import annotations

import ast
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import left_behind
from tests.helpers.ranks import PROGRAMS, Ranks

JOB = PROGRAMS / "crash_job.py"
STEPS = 4
Tell = Callable[[str], None]
KINDS = cases([("off", 3), ("lazy", 1), ("lazy", 3)], long=[("lazy", 3)])


def each_or(stride: int) -> pytest.MarkDecorator:
    """Each operation in the long campaigns; on every change one of so many."""
    each = pytest.param(1, marks=pytest.mark.long, id="each")
    return pytest.mark.parametrize("stride", [each, pytest.param(stride, id="some")])


class Sweep:
    """Runs the job, killed at one operation, and then the same job undisturbed."""

    def __init__(
        self, ranks: Ranks, folder: Path, world: int, limit: int, mode: str = "lazy"
    ) -> None:
        self.ranks, self.folder, self.world, self.limit = ranks, folder, world, limit
        self.mode = mode
        self.run, self.progress = folder / "run", folder / "progress"
        self.before: Path | None = None
        self.request = "auto"

    def job(self, rank: int = 0, nth: int = 0) -> tuple[list[int], list[str]]:
        """Exit statuses, and what the job told this time."""
        known = len(self.told())
        argv = [self.run, self.progress, self.limit, STEPS, rank, nth, self.request, self.mode]
        run = self.ranks.start([str(a) for a in argv], processes=self.world, script=JOB)
        codes = run.wait()
        if nth == 0:
            assert set(codes) == {0}, run.output
        return codes, self.told()[known:]

    def told(self) -> list[str]:
        return self.progress.read_text().splitlines() if self.progress.exists() else []

    def reset(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, self.run, symlinks=True)

    def operations(self, rank: int) -> int:
        """How many disk operations the undisturbed job makes on a rank."""
        self.reset()
        _, told = self.job()
        (count,) = [int(t.split()[2]) for t in told if t.startswith(f"operations {rank} ")]
        return count

    def kill_at(self, rank: int, nth: int, saved_before: int = 0) -> str:
        """One crash point; returns the operation it was at."""
        self.reset()
        codes, told = self.job(rank, nth)
        (fired,) = [t for t in told if t.startswith("killed ")]
        assert codes[rank] == -signal.SIGKILL
        saved = max(steps(told, "saved"), default=saved_before)
        saving = max(steps(told, "saving"), default=saved)
        _, after = self.job()
        (resumed,) = [t for t in after if t.startswith("resumed ")]
        assert int(resumed.split()[1]) in (saved, saving), f"{fired}: {told} then {after}"
        passed_by = ast.literal_eval(resumed.split(maxsplit=2)[2])
        assert set(passed_by.values()) <= {"on an abandoned branch"}, "nothing torn is visible"
        self.check_end()
        return fired

    def check_end(self) -> None:
        folder = RunFolder(self.run)
        kept = [c.step for c in folder.checkpoints()]
        assert kept == ([STEPS] if self.limit == 1 else [1, 2, STEPS])
        assert all(folder.faults(c, deep=True) == [] for c in folder.checkpoints())
        assert left_behind(folder) == []
        names = {p.name for p in self.run.iterdir()}
        assert names == {".keepstep", "latest", "best", *(f"checkpoint-{s}" for s in kept)}


def steps(told: list[str], word: str) -> list[int]:
    return [int(line.split()[1]) for line in told if line.startswith(f"{word} ")]


@pytest.mark.parametrize(("mode", "limit"), KINDS)
@each_or(3)
def test_operations_of_one_process(
    ranks: Ranks, tmp_path: Path, mode: str, limit: int, stride: int, tell: Tell
) -> None:
    sweep = Sweep(ranks, tmp_path, world=1, limit=limit, mode=mode)
    fired = [sweep.kill_at(0, nth) for nth in range(1, sweep.operations(0) + 1, stride)]
    tell(f"{len(fired)} crash points, limit {limit}, {mode}")
    assert len(fired) > 60 / stride
    assert {f.split()[1] for f in fired} >= {"create", "sync", "rename", "sync_folder", "remove"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("mode", "limit"), KINDS)
@each_or(13)
def test_operations_of_two_processes(
    ranks: Ranks, tmp_path: Path, mode: str, limit: int, rank: int, stride: int, tell: Tell
) -> None:
    sweep = Sweep(ranks, tmp_path, world=2, limit=limit, mode=mode)
    fired = [sweep.kill_at(rank, nth) for nth in range(1, sweep.operations(rank) + 1, stride)]
    tell(f"{len(fired)} crash points, limit {limit}, {mode}, rank {rank}")
    assert fired


@pytest.mark.parametrize("limit", cases([1, 3], long=[1]))
def test_every_operation_of_a_start_that_sweeps(
    ranks: Ranks, tmp_path: Path, limit: int, tell: Tell
) -> None:
    """What a killed save and a killed prune left behind is swept; killed again on the way."""
    sweep = Sweep(ranks, tmp_path, world=1, limit=limit)
    sweep.job(0, sweep.operations(0) - 12)  # somewhere in the last save
    sweep.before = tmp_path / "before"
    shutil.copytree(sweep.run, sweep.before, symlinks=True)
    left = RunFolder(sweep.before)
    for place in (left.staging, left.trash):
        shutil.copytree(left.checkpoints()[-1].path, place / "leftover")
    saved = left.checkpoints()[-1].step
    every = range(1, sweep.operations(0) + 1)
    fired = [sweep.kill_at(0, nth, saved) for nth in every]
    tell(f"{len(fired)} crash points, limit {limit}")
    assert any("leftover" in f or "remove" in f for f in fired)


@each_or(3)
def test_operations_of_a_second_branch(
    ranks: Ranks, tmp_path: Path, stride: int, tell: Tell
) -> None:
    """Back to step 1, and the later steps saved again: each in the place of the abandoned one."""
    sweep = Sweep(ranks, tmp_path, world=1, limit=3)
    sweep.job()
    sweep.before = tmp_path / "before"
    shutil.copytree(sweep.run, sweep.before, symlinks=True)
    sweep.request = "1"
    every = range(1, sweep.operations(0) + 1, stride)
    fired = [sweep.kill_at(0, nth, saved_before=1) for nth in every]
    tell(f"{len(fired)} crash points")
    assert stride > 1 or sum("replaced-" in f for f in fired) >= 2
    assert {c.manifest.parent is None for c in RunFolder(sweep.run).checkpoints()} == {True, False}
