"""A disk that does not answer for one file: tried again, passed by, and never taken for damage."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.selection import UnreadableError
from keepstep.run_folder import checkpoint, safe_read
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import patiently
from tests.disk.test_hostile_runs import made as made
from tests.disk.test_hostile_runs import relaunch, save
from tests.helpers.faulty_disk import FaultyDisk, faulty_disk


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with faulty_disk(tmp_path_factory.mktemp("disk") / "mount") as mounted:
        yield mounted


@pytest.fixture
def run(made: Path, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for module in (safe_read, checkpoint):
        monkeypatch.setattr(module, "PAUSES", (0.01, 0.02))
    disk.heal()
    folder = disk.folder / "run"
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("latest"))
    yield folder
    disk.heal()


NUMBERS = [errno.ESTALE, errno.EACCES, errno.ETIMEDOUT]
SICK = [
    ("read", "run/checkpoint-20/optimizer.pt"),
    ("open", "run/checkpoint-20/trainer_state.json"),
    ("getattr", "run/checkpoint-20/optimizer.pt"),
    ("open", "run/checkpoint-20/manifest.json"),
    ("getattr", "run/checkpoint-20/manifest.json"),
]


@pytest.mark.parametrize(
    ("operation", "path", "number"),
    [*((*sick, errno.EIO) for sick in SICK), *((*SICK[1], number) for number in NUMBERS)],
)
def test_what_cannot_be_read_is_passed_by_and_stays(
    run: Path, disk: FaultyDisk, operation: str, path: str, number: int
) -> None:
    disk.fail(operation, path, number)
    assert relaunch(run) == 10
    assert disk.fired
    disk.heal()
    assert (run / "checkpoint-20").is_dir()
    assert not list((run / ".keepstep/quarantine").glob("*"))
    (told,) = [e for e in RunFolder(run).journal.read()[0] if e["event"] == "resume"][-1:]
    assert path.rpartition("/")[2] in told["passed_by"]["20"]
    assert relaunch(run) == 20


@pytest.mark.parametrize(("operation", "path"), SICK)
def test_what_fails_once_is_read(run: Path, disk: FaultyDisk, operation: str, path: str) -> None:
    disk.fail(operation, path, errno.EIO, times=1)
    assert relaunch(run) == 20
    assert disk.fired


@pytest.mark.parametrize("operation", ["open", "getattr"])
def test_an_old_manifest_that_cannot_be_read_harms_nothing(
    run: Path, disk: FaultyDisk, operation: str
) -> None:
    disk.fail(operation, "run/checkpoint-10/*", errno.EIO)
    assert relaunch(run) == 20
    save(run, 30)
    assert relaunch(run) == 30
    disk.heal()
    assert [c.step for c in RunFolder(run).checkpoints()] == [10, 20, 30]


@pytest.mark.parametrize(
    ("operation", "path"),
    [("read", "run/checkpoint-*/optimizer.pt"), ("open", "run/checkpoint-*/manifest.json")],
)
def test_where_nothing_can_be_read_it_is_the_environments_error(
    run: Path, disk: FaultyDisk, operation: str, path: str
) -> None:
    disk.fail(operation, path, errno.EIO)
    for request in ("auto", "latest"):
        with pytest.raises(UnreadableError, match=path.rpartition("/")[2]):
            relaunch(run, request)
    disk.heal()
    assert relaunch(run) == 20


def test_a_folder_that_cannot_be_listed_is_named(run: Path, disk: FaultyDisk) -> None:
    disk.fail("readdir", "run", errno.EIO)
    with pytest.raises(OSError, match=str(run)):
        relaunch(run)
    disk.heal()
    assert relaunch(run) == 20


@pytest.mark.parametrize("name", ["events.jsonl", "run.json", "heartbeat", "pins", "publish/*"])
@pytest.mark.parametrize("operation", ["open", "getattr", "readdir"])
def test_the_runs_own_files_that_cannot_be_read_cost_themselves(
    run: Path, disk: FaultyDisk, name: str, operation: str
) -> None:
    disk.fail(operation, f"run/.keepstep/{name}", errno.EIO)
    assert relaunch(run) == 20
    disk.heal()
    assert RunFolder(run).checkpoints()[-1].step == 20


def test_patience() -> None:
    tries = []

    def look(number: int, good_after: int) -> int:
        tries.append(number)
        if len(tries) <= good_after:
            raise OSError(number, "no")
        return len(tries)

    assert patiently(lambda: look(errno.EIO, 2)) == 3
    tries.clear()
    with pytest.raises(OSError, match="no"):
        patiently(lambda: look(errno.EIO, 3))
    assert len(tries) == 3
    tries.clear()
    with pytest.raises(FileNotFoundError):  # it is not there, and will not be
        patiently(lambda: look(errno.ENOENT, 3))
    assert len(tries) == 1


def test_the_commands_say_what_cannot_be_read_and_go_on(run: Path, disk: FaultyDisk) -> None:
    disk.fail("read", "run/checkpoint-10/optimizer.pt", errno.EIO)
    disk.fail("open", "run/checkpoint-20/manifest.json", errno.EIO)

    def told(*words: str) -> str:
        result = CliRunner().invoke(app, [*words, str(run)])
        assert isinstance(result.exception, SystemExit | None), result.exception
        return f"{result.exit_code} {result.output}"

    assert "checkpoint-20: its manifest.json cannot be read: [Errno 5]" in told("ls")
    verified = told("verify", "--deep")
    assert verified.startswith("1 ")
    assert "checkpoint-10 cannot be read: [Errno 5]" in verified
    assert "checkpoint-20: its manifest.json cannot be read" in verified
    assert "no checkpoint can be read and resumed now" in told("which")
    disk.fail("readdir", "run", errno.EIO)
    assert told("ls").startswith(f"1 keepstep: {run}: input/output error")
    disk.heal()
    assert told("verify").startswith("0 ")
