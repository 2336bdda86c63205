"""`keepstep log` and `keepstep ls --watch`: what has happened, and what happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli import watch
from keepstep.cli.log import LogLine
from keepstep.cli.main import app
from keepstep.policy.retention import Policy
from keepstep.policy.strict import build
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from tests.helpers.folders import commit
from tests.helpers.waiting import PATIENCE

runner = CliRunner()


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    made = RunWriter(RunFolder(tmp_path), Policy(), Storage())
    made.start()
    made.record("resume", request="auto", step=None, passed_by={})
    made.record("save_failed", step=5, reason="No space\x1b[31m left")
    return made


def test_a_sentence_a_line(writer: RunWriter) -> None:
    with open(writer.run.events, "a") as file:
        file.write('{"time": "2026-11-27T05:00:00.000+00:00", "event": "launch", "exit": 0}\n{"to')
    done = runner.invoke(app, ["log", str(writer.run.path)])
    lines = done.stdout.splitlines()
    assert [line[19:26] for line in lines[:4]] == ["Z    1 ", "Z    1 ", "Z    1 ", "Z  job "]
    assert lines[0].endswith("  the attempt begins")
    assert lines[1].endswith("  begins at step 0 (resume_from_checkpoint: auto)")
    assert lines[2].endswith(r"  checkpoint-5 was not saved: No space\x1b[31m left")
    assert lines[4:] == ["1 line is damaged, and passed by"]


def test_an_attempt_that_was_not_is_told(writer: RunWriter) -> None:
    done = runner.invoke(app, ["log", str(writer.run.path), "--attempt", "7"])
    assert done.exit_code == 2
    assert "has no attempt 7; there: 1" in done.output


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_output_is_told_in_a_line(
    writer: RunWriter, options: list[str], unbuffered: str
) -> None:
    code = "from keepstep.cli import command; command()"
    command = [sys.executable, "-c", code, "log", str(writer.run.path), *options]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            timeout=PATIENCE,
        )
    assert done.stderr == "keepstep: [Errno 28] No space left on device\n"
    assert done.returncode == 1


def test_an_object_a_line(writer: RunWriter) -> None:
    told = runner.invoke(app, ["log", str(writer.run.path), "--json"]).stdout
    lines = [build(LogLine, json.loads(line)) for line in told.splitlines()]
    assert [line.event for line in lines] == ["attempt", "resume", "save_failed"]
    assert lines[2].facts == {"step": 5, "reason": "No space\x1b[31m left"}
    assert lines[2].attempt == 1


def test_what_comes_is_told_whole(writer: RunWriter) -> None:
    """A line that is being written is not told before its end is there."""
    # Where the tests run in the background, Ctrl-C is ignored, and a child inherits that.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from keepstep.cli import command; command()"
    command = [sys.executable, "-c", code]
    follower = subprocess.Popen(
        [*command, "log", str(writer.run.path), "--follow"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    ended = threading.Timer(PATIENCE, follower.kill)
    ended.start()
    assert follower.stdout is not None
    told = [follower.stdout.readline() for _ in range(3)]
    assert "was not saved" in told[2]
    writer.record("training")
    line = writer.run.events.read_bytes().splitlines()[-1]
    assert "training begins" in follower.stdout.readline()
    with open(writer.run.events, "ab", buffering=0) as file:
        file.write(line[:20])
        file.write(line[20:] + b"\n")
    assert "training begins" in follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    rest = follower.stdout.read()
    assert (follower.wait(), rest) == (0, "")
    ended.cancel()


def test_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(RunFolder(tmp_path), Policy(), Storage())
    writer.start()
    looks = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        commit(tmp_path, 10, run_id=writer.run_id)

    monkeypatch.setattr(watch.time, "sleep", pause)
    done = runner.invoke(app, ["ls", str(tmp_path), "--watch"])
    assert done.exit_code == 0
    first, second = done.stdout.split("\n\n")
    assert "no checkpoint is committed yet" in first
    assert "attempt 1 has not told of its end" in first
    assert "1 checkpoint, " in second
