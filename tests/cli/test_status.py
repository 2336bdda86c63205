"""`keepstep status`: what it says of a run, in each state that a run can be left in."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepstep.cli import probe
from keepstep.cli.common import console
from keepstep.cli.main import app
from keepstep.cli.status import FIELDS, status_of
from keepstep.policy.retention import Policy
from keepstep.run_folder.ownership import claim
from keepstep.run_folder.progress import Reached
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from tests.helpers.folders import commit, identify

runner = CliRunner()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    identify(tmp_path, limit=3, ranking="metric", metric="eval_loss")
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5)):
        commit(tmp_path, step, metrics={"eval_loss": loss})
    return tmp_path


def told(run: Path, **fields: Any) -> None:
    """status.json, as the last attempt has written it."""
    known = {"outcome": "finished", "reason": None, "global_step": 30, "exit": 0}
    (run / ".keepstep/status.json").write_text(json.dumps(known | fields, indent=1))


def field(run: Path, name: str) -> tuple[int, str]:
    done = runner.invoke(app, ["status", str(run), "--field", name])
    return done.exit_code, done.stdout


def test_finished(run: Path) -> None:
    told(run)
    done = runner.invoke(app, ["status", str(run)])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        f"{run}: finished at step 30 (attempt 1, exit status 0)",
        "  checkpoints:  3 committed, newest checkpoint-30, best checkpoint-20",
        "  next:         nothing: the run is finished",
    ]
    values = {name: field(run, name)[1].strip() for name in FIELDS}
    assert (values["outcome"], values["exit"], values["step"]) == ("finished", "0", "30")
    assert (values["newest"], values["best"], values["attempt"]) == ("30", "20", "1")
    assert values["state"] == "ended"


def test_at_80_columns(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(run, outcome="failed", exit=70, reason="a long reason, word by word, " * 9)
    monkeypatch.setattr(console, "width", 80)
    monkeypatch.setattr(console, "_told", True)  # it is a terminal
    lines = runner.invoke(app, ["status", str(run)]).stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[1:])
    reason = [line for line in lines if "word by word" in line]
    assert len(reason) > 3
    assert reason[0].startswith("  reason:       a long reason")
    assert all(line.startswith(" " * 16) for line in reason[1:])


def test_how_far_a_run_at_work_is(run: Path) -> None:
    begin(run)
    writer = RunWriter(RunFolder(run), Policy(), Storage())
    figures = {"planned_steps": 100.0, "loss": 1.25, "tokens_per_second": 12345.6}
    figures |= {"samples_per_second": 8.0, "seconds_left": 90.0}
    spent = {"startup": 5.0, "step": 32.0}
    made = Reached("2026-11-27T05:00:00.000+00:00", writer.attempt, 32, spent, figures)
    heartbeat = run / ".keepstep/heartbeat"
    heartbeat.write_text(f"x 1\n{made.as_line()}\n")
    values = {name: field(run, name)[1].strip() for name in FIELDS}
    assert (values["reached"], values["planned"], values["loss"]) == ("32", "100", "1.25")
    assert (values["tokens_per_second"], values["seconds_left"]) == ("12345.6", "90.0")
    lines = runner.invoke(app, ["status", str(run)]).stdout.splitlines()
    assert "  progress:     step 32 of 100, loss 1.2500, 12,346 tokens/s, 1 min 30 s left" in lines
    assert max(map(len, lines[1:])) <= 80
    told_of = runner.invoke(app, ["which", str(run), "auto"]).stdout.splitlines()[0]
    assert told_of == "auto takes checkpoint-30: 2 steps to repeat"
    heartbeat.write_text(f"x 1\n{made.as_line().replace('32', '33')}\n")  # torn: its check differs
    assert field(run, "reached") == (1, "")


def test_what_there_is_not_is_empty_and_exit_status_1(run: Path) -> None:
    told(run)
    for name in ("reason", "job", "owner", "owner_alive", "silent_seconds", "requests", "faults"):
        assert field(run, name) == (1, ""), name
    (run / ".keepstep/status.json").unlink()
    assert field(run, "outcome") == (1, "")
    assert field(run, "exit") == (1, "")


@pytest.mark.parametrize("argv", [["RUN", "--field", "nope"], ["RUN/none", "--field", "outcome"]])
def test_a_shell_is_told_nothing_where_a_value_would_be(run: Path, argv: list[str]) -> None:
    done = runner.invoke(app, ["status", *(word.replace("RUN", str(run)) for word in argv)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("keepstep: ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"outcome": "finished"}',
        '{"outcome": "finished", "exit": "0"}',
        '{"outcome": "finished", "exit": 300}',
        '{"outcome": "Finished", "exit": 0}',
        '{"outcome": "failed", "exit": 0}',
        '{"outcome": "preempted", "outcome": "finished", "exit": 0}',
        '{"outcome": "finished", "exit": 0, "global_step": -1}',
        "[" * 9999,
    ],
)
def test_what_cannot_be_believed_is_no_success(run: Path, text: str) -> None:
    (run / ".keepstep/status.json").write_text(text)
    assert field(run, "outcome") == (1, "")
    assert field(run, "exit") == (1, "")
    done = runner.invoke(app, ["status", str(run)])
    assert done.exit_code == 1
    assert ".keepstep/status.json: " in done.stdout
    assert "finished" not in done.stdout.splitlines()[0]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_lies_in_its_place_is_not_read(run: Path, kind: str) -> None:
    told(run)
    path = run / ".keepstep/status.json"
    path.rename(run / "elsewhere")
    if kind == "link":
        path.symlink_to(run / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert field(run, "outcome") == (1, "")
    assert field(run, "faults")[1] == ".keepstep/status.json\n"


def begin(run: Path) -> None:
    """An attempt of this process, which has the run."""
    folder, storage = RunFolder(run), Storage()
    owner = claim(folder, storage)
    RunWriter(folder, Policy(), storage, owner.token).start()


def test_at_work_and_killed(run: Path) -> None:
    told(run)
    begin(run)
    found = status_of(RunFolder(run))
    assert (found.state, found.outcome, found.owner_alive) == ("running", None, True)
    assert field(run, "owner_alive") == (0, "true\n")
    (run / ".keepstep/stop").touch()
    assert field(run, "requests") == (0, "stop\n")
    # The same process, as it would be named after a reboot.
    owner = run / ".keepstep/owner"
    token, host, pid, began = owner.read_text().split()
    owner.write_text(f"{token} {host} {pid} another-boot.{began.rpartition('.')[2]}\n")
    found = status_of(RunFolder(run))
    assert (found.state, found.owner_alive) == ("killed", False)
    assert "was killed" in runner.invoke(app, ["status", str(run)]).stdout


def test_on_another_machine(run: Path) -> None:
    begin(run)
    owner = run / ".keepstep/owner"
    owner.write_text(owner.read_text().replace(socket.gethostname(), "elsewhere"))
    (run / ".keepstep/heartbeat").write_text("x 1\n")
    os.utime(run / ".keepstep/heartbeat", (0, 0))
    found = status_of(RunFolder(run))
    assert (found.state, found.owner_alive) == ("unknown", None)
    assert found.silent_seconds is not None
    assert found.silent_seconds > 1e9


def test_an_attempt_that_has_only_begun_has_not_ended_as_the_one_before(run: Path) -> None:
    """A job writes the owner's name first; status.json is of an earlier attempt meanwhile."""
    told(run, owner="7.0.1")
    (run / ".keepstep/owner").write_text("7.0.1\n")
    assert field(run, "outcome") == (0, "finished\n")
    (run / ".keepstep/owner").write_text("7.0.2\n")
    assert field(run, "outcome") == (1, "")
    assert field(run, "state") == (0, "unknown\n")


@pytest.mark.parametrize("words", ["x host " + "9" * 5000 + " b.1", "x host 99999999999 b.1"])
def test_an_owner_that_nobody_has_written(run: Path, words: str) -> None:
    """A number without end is none of a process, and stops neither a look nor a launch."""
    (run / ".keepstep/owner").write_text(words.replace("host", socket.gethostname()) + "\n")
    assert status_of(RunFolder(run)).owner_alive is None
    claim(RunFolder(run), Storage(), patience=0.1)


def test_a_job(run: Path) -> None:
    (run / ".keepstep/job").mkdir()
    (run / ".keepstep/job/id").write_text("4711\n")
    assert field(run, "job") == (0, "4711\n")
    (run / ".keepstep/job/ended").write_text("0\n")
    assert field(run, "job") == (1, "")


@pytest.mark.parametrize(
    ("outcome", "exit_status", "comes_back"),
    [("preempted", 75, True), ("failed", 70, True), ("failed", 2, False), ("finished", 0, False)],
)
def test_what_follows_while_a_job_may_come_back(
    run: Path, outcome: str, exit_status: int, comes_back: bool
) -> None:
    """Queued again or cancelled: from the run folder alone that cannot be told apart."""
    (run / ".keepstep/job").mkdir()
    (run / ".keepstep/job/id").write_text("4711\n")
    told(run, outcome=outcome, exit=exit_status)
    found = status_of(RunFolder(run)).next
    by_itself = "nothing while `squeue --job 4711` lists it: it goes on by itself; else "
    assert found.startswith(by_itself) == comes_back


def test_a_new_run(tmp_path: Path) -> None:
    """One that was adopted, or is queued as a job."""
    done = runner.invoke(app, ["status", str(identify(tmp_path))])
    assert (done.exit_code, done.stdout.splitlines()[0]) == (
        0,
        f"{tmp_path}: no attempt has begun",
    )


@pytest.mark.parametrize(
    ("outcome", "exit_status", "words"),
    [
        ("preempted", 75, "launch the same command again, and it carries on"),
        ("failed", 2, "mend the recipe"),
        ("failed", 70, "see to the reason"),
        ("finished", 70, "keepstep push"),
        ("no_progress", 76, "nothing is left to carry on from"),
    ],
)
def test_what_a_person_may_do(run: Path, outcome: str, exit_status: int, words: str) -> None:
    told(run, outcome=outcome, exit=exit_status, reason="because\x1b[2J\n    Hint: none")
    done = runner.invoke(app, ["status", str(run)])
    assert words in done.stdout
    assert r"because\x1b[2J Hint: none" in done.stdout


def test_it_imports_no_torch(run: Path) -> None:
    told(run)
    code = "import sys; from keepstep.cli.main import app; app(sys.argv[1:], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "status", str(run)]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0


def healthy(run: Path) -> tuple[int, str]:
    done = runner.invoke(app, ["status", str(run), "--healthy"])
    return done.exit_code, done.stdout


def silent(run: Path, seconds: float) -> None:
    """The attempt of `begin` has got on for the last time so long ago."""
    at = datetime.fromtimestamp(time.time() - seconds, UTC).isoformat()
    words = RunFolder(run).owner_words()
    number = RunFolder(run).attempts()[-1].number
    line = Reached(at, number, 31, {"step": 1.0}).as_line()
    (run / ".keepstep/heartbeat").write_text(f"{words[0]} 7\n{line}\n")


def test_healthy(run: Path) -> None:
    assert healthy(run / "not-there-yet")[0] == 0
    assert healthy(run)[0] == 0
    begin(run)
    assert healthy(run) == (0, "the attempt begins\n")
    silent(run, 2900)  # a long save, or evaluation
    assert healthy(run)[0] == 0
    silent(run, 3100)
    code, said = healthy(run)
    assert code == 1
    assert re.match(r"unhealthy: the last sign of life was 3[1-4]\d\d s ago", said)
    told = runner.invoke(app, ["status", str(run)]).stdout
    assert "next:         it has been silent for longer than it may: `keepstep stop`" in told
    silent(run, 2900)
    assert "next:         nothing" in runner.invoke(app, ["status", str(run)]).stdout


def test_another_attempts_silence_is_not_this_ones(run: Path) -> None:
    begin(run)
    silent(run, 1e6)
    owner = run / ".keepstep/owner"
    theirs = owner.read_text()
    owner.write_text(theirs.replace(socket.gethostname(), "elsewhere"))
    assert healthy(run)[0] == 0
    owner.write_text(f"new {theirs.split(maxsplit=1)[1]}")  # the heartbeat is of the one before
    assert healthy(run) == (0, "the attempt begins\n")


def test_a_limit_of_the_recipe(run: Path) -> None:
    begin(run)
    silent(run, 50)
    number = RunFolder(run).attempts()[-1].number
    text = json.dumps({"recipe": {"hang_timeout_seconds": 20, "save_timeout_seconds": 20.0}})
    (run / ".keepstep/launched").mkdir()
    (run / f".keepstep/launched/{number}.json").write_text(text)
    assert healthy(run)[0] == 1


@pytest.mark.parametrize("name", ["owner", "heartbeat"])
def test_what_cannot_be_read_ends_nothing(run: Path, name: str) -> None:
    begin(run)
    silent(run, 1e6)
    path = run / ".keepstep" / name
    path.unlink()
    assert healthy(run)[0] == 0
    path.mkdir()
    assert healthy(run)[0] == 0
    path.rmdir()
    os.mkfifo(path)
    assert healthy(run)[0] == 0


def test_a_folder_that_does_not_answer_ends_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(RunFolder, "owner_words", lambda self: threading.Event().wait())
    assert healthy(run) == (0, f"{run} does not answer\n")
