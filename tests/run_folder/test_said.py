"""What an attempt said is kept: bounded, without secrets, through a kill, on a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep.policy.retention import Policy
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.said import KEPT, OF_OTHERS, PART, Said, lines_said, log_of, said_by
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from tests.helpers.faulty_disk import faulty_disk
from tests.helpers.waiting import PATIENCE

# A process that speaks as a run does, and is killed in the middle of a line of a bar.
SPEAKER = """
import os, signal, sys, warnings
from keepstep.output import streams
streams.protect()
print("before it is known where to keep it")
from keepstep.output.said import finish_lines, keep_lines
from keepstep.output.terminal import complain
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder import said as module
module.PROMPT_SECONDS = 300.0  # on a machine that is busy, too
said = module.Said(RunFolder(sys.argv[1]), 3, 0, int(sys.argv[2]))
keep_lines(said.keep)
for percent in range(0, 101, 10):
    print(f"\\r{percent}% done", end="", file=sys.stderr)
print(file=sys.stderr)
print("my token is", os.environ["HF_TOKEN"])
child = os.fork()
if child == 0:
    print("from a worker")
    os._exit(0)
os.waitpid(child, 0)
warnings.warn("a warning")
complain("Traceback\\nValueError: it was here")
exec(sys.argv[3])
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def speak(run: Path, then: str, rank: int = 0) -> tuple[int, list[str], str]:
    (run / ".keepstep").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", SPEAKER, str(run), str(rank), then],
        env={**os.environ, "HF_TOKEN": "s3cret-s3cret"},
        capture_output=True,
        text=True,
    )
    path = log_of(RunFolder(run), 3)
    return done.returncode, lines_said(path) if path.exists() else [], done.stderr


def test_a_kill_costs_no_line(tmp_path: Path) -> None:
    """The next statement after the last line is SIGKILL."""
    for attempt in range(3):
        run = tmp_path / str(attempt)
        status, lines, _ = speak(run, KILL)
        assert status == -signal.SIGKILL
        assert lines[0] == "before it is known where to keep it"
        assert lines[1:4] == ["100% done", "my token is ***", "from a worker"]
        assert any("UserWarning: a warning" in line for line in lines)
        assert lines[-2:] == ["Traceback", "ValueError: it was here"]


def test_another_rank_is_named(tmp_path: Path) -> None:
    _, lines, _ = speak(tmp_path, "print('end', end=''); finish_lines(); said.drain(300)", rank=2)
    assert lines[1] == "[rank 2] 100% done"
    assert lines[-1] == "[rank 2] end"


def test_what_is_said_is_bounded_and_has_a_beginning_and_an_end(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    said = Said(run, 3, 0, 0)
    for number in range(9 * PART // 1000):
        said.keep(b"%8d " % number + b"x" * 990)
        if number % 1000 == 0:
            said.drain(PATIENCE)
    said.drain(PATIENCE)
    paths = said_by(run, 3)
    assert [path.name for path in paths] == ["3.log", "3.log.2", "3.log.1"]
    assert sum(path.stat().st_size for path in paths) < 4 * PART
    told = [line for path in paths for line in lines_said(path)]
    assert told[0].split()[0] == "0"
    assert told[-1].split()[0] == f"{9 * PART // 1000 - 1}"
    assert lines_said(paths[-1], 2) == told[-2:]


def test_another_rank_says_less(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    said = Said(run, 3, 1, 9)
    for _ in range(3000):
        said.keep(b"x" * 100)
    said.drain(PATIENCE)
    (path,) = said_by(run, 3)
    assert path.name == "3.node-1.log"
    assert path.stat().st_size < 1.2 * OF_OTHERS
    assert lines_said(path)[-1].endswith("what this rank says from here on is not kept]")


def test_attempts_long_ago_are_forgotten(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.launched.mkdir(parents=True)
    for number in range(1, KEPT + 5):
        for name in (f"{number}.log", f"{number}.log.1", f"{number}.node-2.log", f"{number}.json"):
            (run.launched / name).write_text("x\n")
    said = Said(run, KEPT + 5, 0, 0)
    said.keep(b"now")
    said.drain(PATIENCE)
    assert said_by(run, 5) == []
    assert len(said_by(run, 6)) == 3
    assert (run.launched / "1.json").exists()


def test_a_full_disk_costs_lines_and_is_told_once(tmp_path: Path) -> None:
    with faulty_disk(tmp_path / "disk") as disk:
        disk.fail("write", "*.log", 28, times=3)
        more = "\nfor n in range(5):\n    print('line', n)\n    said.drain(300)"
        status, lines, told = speak(disk.folder / "run", more)
    assert status == 0
    assert told.count("what this attempt says is not all kept") == 1
    assert "No space left on device" in told
    assert lines[-1] == "line 4"
    assert "before it is known where to keep it" not in lines


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.launched.mkdir(parents=True)
    (run.launched / "3.log").symlink_to(tmp_path / "theirs")
    said = Said(run, 3, 0, 0)
    said.keep(b"x")
    said.drain(PATIENCE)
    assert not (tmp_path / "theirs").exists()
    assert said_by(run, 3) == []


@pytest.mark.parametrize("name", ["3.node-x.log", "3.log.7", "x.log", "33333333333333.log"])
def test_odd_names_are_left_alone(tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path)
    run.launched.mkdir(parents=True)
    (run.launched / name).write_text("x\n")
    said = Said(run, 99, 0, 0)
    said.drain(PATIENCE)
    assert (run.launched / name).exists()
    assert said_by(run, 3) == []


def test_the_reason_of_an_end_quotes_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-s3cret")
    writer = RunWriter(RunFolder(tmp_path), Policy(), Storage())
    writer.start()
    facts = {"global_step": 4, "best_step": None, "exit": 70}
    writer.end({"outcome": "failed", "reason": "bad key s3cret-s3cret", **facts})
    written = b"".join(p.read_bytes() for p in (tmp_path / ".keepstep").rglob("*") if p.is_file())
    assert b"bad key ***" in written
    assert b"s3cret" not in written
