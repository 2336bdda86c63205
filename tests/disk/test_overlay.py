"""A run whose folders lie in the lower layer of an overlay, as in a container's image.

There a folder cannot be renamed (EXDEV), only what is in it; and killed at any operation, a valid
checkpoint is found, nothing that was pinned, damaged or somebody's is gone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from keepstep.policy.retention import Policy
from keepstep.run_folder.reader import RunFolder, read_checkpoint
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.trash import PRUNED
from tests.helpers.attempts import Launch
from tests.helpers.folders import left_behind

TWO = Policy(2, "recency")


class KilledError(BaseException):
    """In the place of SIGKILL: no one catches it, and nothing is done after it."""


class CrashAt:
    def __init__(self, nth: int) -> None:
        self.nth, self.count, self.seen = nth, 0, set[str]()

    def __call__(self, operation: str, path: Path) -> None:
        self.count += 1
        self.seen.add(operation)
        if self.count == self.nth:
            raise KilledError(operation, path)


@contextmanager
def overlay(lower: Path, place: Path) -> Iterator[Path]:
    """`lower` with a fresh layer above it."""
    if os.geteuid() != 0:
        pytest.skip("not root: no overlay can be mounted")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    for name in ("upper", "work", "merged"):
        (place / name).mkdir()
    options = f"lowerdir={lower},upperdir={place}/upper,workdir={place}/work"
    merged = place / "merged"
    words = ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)]
    if subprocess.run(words, check=False).returncode:
        subprocess.run(["umount", place], check=True)
        pytest.skip("no overlay in this kernel, or none upon this file system")
    try:
        yield merged / "run"
    finally:
        # Lazily: killed in the middle of a write, here a file stays open.
        subprocess.run(["umount", "--lazy", merged], check=True)
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()


def image(lower: Path) -> None:
    """10 to 40, all kept; leftovers of a killed save and of a killed prune."""
    launch = Launch(lower / "run", Policy(None))
    for step in (10, 20, 30, 40):
        launch.save(step)
    launch.writer.stage(50).joinpath("rank0.pt").write_bytes(b"x")
    shutil.copytree(lower / "run/checkpoint-10", launch.writer.trash.folder / "checkpoint-5-abc")


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    image(tmp_path / "lower")
    return tmp_path / "lower"


def is_refused(run: Path) -> bool:
    """Whether a folder cannot be renamed here, as this test wants it."""
    try:
        os.rename(run / "checkpoint-40", run / "other")
    except OSError:
        return True
    os.rename(run / "other", run / "checkpoint-40")
    return False


def test_a_run_in_an_image_goes_on(lower: Path, tmp_path: Path) -> None:
    with overlay(lower, tmp_path / "mount") as run:
        assert is_refused(run)
        launch = Launch(run, TWO)
        assert launch.step == 40
        assert launch.steps() == [30, 40]
        launch.save(50)
        launch.save(60)
        again = Launch(run, TWO)
        assert again.steps() == [50, 60]
        assert left_behind(again.folder) == []
        names = {p.name for p in run.iterdir()}
        assert names == {".keepstep", "latest", "checkpoint-50", "checkpoint-60"}


def test_a_damaged_one_is_set_aside_whole(lower: Path, tmp_path: Path) -> None:
    (lower / "run/checkpoint-40/rank0.pt").write_bytes(b"damage")
    with overlay(lower, tmp_path / "mount") as run:
        launch = Launch(run, TWO)
        assert launch.step == 30
        aside = launch.folder.quarantine / "checkpoint-40-attempt-2"
        assert {p.name for p in aside.iterdir()} == {"manifest.json", "rank0.pt", "rank1.pt"}
        assert (aside / "rank0.pt").read_bytes() == b"damage"
        assert not (run / "checkpoint-40").exists()


def prunes(run: Path, storage: Storage) -> None:
    Launch(run, TWO, storage=storage).save(50)


def branches(run: Path, storage: Storage) -> None:
    """20 is saved again, in the place of the image's."""
    Launch(run, Policy(None), request="10", storage=storage).save(20)


def quarantines(run: Path, storage: Storage) -> None:
    Launch(run, Policy(None), storage=storage)


def check_pruned(run: Path) -> None:
    launch = Launch(run, TWO)
    assert launch.step in (40, 50)
    assert launch.steps() in ([30, 40], [40, 50])
    assert not list(run.glob(f"*/{PRUNED}"))


def check_branch(run: Path) -> None:
    launch = Launch(run, Policy(None))
    assert launch.step in (40, 20)
    twenty = launch.folder.checkpoint(20)
    assert twenty.manifest.attempt == (2 if launch.step == 20 else 1)
    assert launch.steps() == [10, 20, 30, 40]
    assert not launch.folder.quarantine.exists()


def check_quarantine(run: Path) -> None:
    launch = Launch(run, Policy(None))
    assert launch.step == 30
    parts = launch.folder.quarantine.glob("checkpoint-40-attempt-*/*")
    assert {p.name for p in parts} == {"manifest.json", "rank0.pt", "rank1.pt"}
    assert not (run / "checkpoint-40").exists()


@pytest.mark.parametrize(
    ("act", "check"),
    [(prunes, check_pruned), (branches, check_branch), (quarantines, check_quarantine)],
)
def test_killed_at_any_operation(
    lower: Path,
    tmp_path: Path,
    act: Callable[[Path, Storage], None],
    check: Callable[[Path], None],
) -> None:
    if act is quarantines:
        (lower / "run/checkpoint-40/rank0.pt").write_bytes(b"damage")
    undisturbed = CrashAt(0)
    with overlay(lower, tmp_path / "undisturbed") as run:
        act(run, Storage(undisturbed))
        check(run)
    assert undisturbed.seen >= {"rename", "remove", "remove_folder"}
    for nth in range(1, undisturbed.count + 1):
        with overlay(lower, tmp_path / str(nth)) as run:
            with pytest.raises(KilledError):
                act(run, Storage(CrashAt(nth)))
            check(run)
            folder = RunFolder(run)
            assert all(folder.faults(c, deep=True) == [] for c in folder.checkpoints())
            assert left_behind(folder) == []


def test_a_pinned_one_is_kept_elsewhere(lower: Path, tmp_path: Path) -> None:
    with overlay(lower, tmp_path / "mount") as run:
        launch = Launch(run, Policy(None), request="10")
        launch.writer.pin(20)
        launch.save(20)
        kept = run / ".keepstep/pinned/attempt-1/checkpoint-20"
        assert launch.folder.faults(read_checkpoint(kept), deep=True) == []
        assert launch.folder.checkpoint(20).manifest.attempt == 2
