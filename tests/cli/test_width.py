"""Every command on a terminal of 80 columns: none goes over the edge; in a pipe each is whole."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.cells import cell_len

from keepstep.output.fold import UNITS
from keepstep.policy.samples import Sample, lines_of
from tests.cli.test_history import begin, of_runs, of_stock
from tests.cli.test_places import OF_A_CHECKPOINT, OF_A_RUN
from tests.helpers.folders import commit
from tests.helpers.waiting import PATIENCE

WIDTH = 80
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
AT = "--- "
TO_BE_COPIED = "  cd "  # the way on, of `show`
# One process for all: real streams, as `keepstep` has them.
PROGRAM = f"""
import json, sys
from keepstep.cli.common import app
import keepstep.cli.main
for given in json.loads(sys.argv[1]):
    print({AT!r} + " ".join(given), flush=True)
    try:
        app(given, standalone_mode=False)
    except SystemExit:
        pass
    sys.stdout.flush()
"""
REASON = "OSError: the file server has answered with something that takes a whole sentence to say"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Killed, gone back, and failed, with a long name, a damaged checkpoint, completions."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "experiments of november/llama with a long name, seed 7"
    for number in (1, 2, 3):
        writer = begin(run, command="keepstep launch recipe.yaml --learning_rate 1e-4 " * 2)
        writer.record("resume", request="10" if number == 3 else "auto", step=10 * (number == 3))
        (writer.run.launched / f"{number}.log").write_text(f"{REASON}\n{REASON} once more\n" * 2)
        for step in (10, 20, 30)[: number if number < 3 else None]:
            commit(run, step, run_id=writer.run.run_id(), attempt=number, parent=10)
            writer.record("commit", step=step, stall=1.0, write=1.0, bytes=1, longest_step=2.0)
    writer.record("publish", step=20, repo_id="someone/with-a-long-name", commit="0123abcd" * 5)
    (run / "checkpoint-10/rng_state_0.pth").unlink()
    answers = [Sample(20, 1, "ask of many words " * 8, "an answer of words " * 8, None)]
    (run / "samples.jsonl").write_text("\n".join(lines_of(answers, 1, "now")))
    (run / ".keepstep/quarantine/2/checkpoint-5").mkdir(parents=True)
    (run / ".keepstep/quarantine/2/checkpoint-5/x").write_text("x")
    writer.end({"outcome": "failed", "reason": REASON, "global_step": 30, "exit": 70})
    of_runs(Path("runs with names"))
    of_stock(Path("what a stock trainer has written, of all names"))
    return str(run)


def commands(run: str) -> list[list[str]]:
    made = [[name, run, *flags] for name, calls in OF_A_RUN.items() for flags in calls]
    for name, calls in {**OF_A_RUN, **OF_A_CHECKPOINT}.items():
        for place in ("runs with names", f"{run}/checkpoint-70", "nowhere/at/all"):
            made.append([name, place, *calls[0]])
    made = [given for given in made if "--json" not in given and given[0] != "sync"]
    made += [
        ["verify", f"{run}/checkpoint-10"],
        ["status", run, "--field", "no-such-field"],
        ["which", run, "--num_processes", "3"],
        ["status", run, "--field", "next"],
        ["rm", run, "20"],
        ["rm", run, "77"],
        ["config", "nope"],
        ["init", "new recipes"],
        ["prune", run, "--quarantine", "--dry_run"],
        ["log", run, "--attempt", "2"],
        ["ls", run, "--mtbf_hours", "2"],
        ["ls", "s3:/x"],
        ["status", "s3://bucket/a/run"],
        ["ls", "what a stock trainer has written, of all names"],
    ]
    return made  # what changes something comes last


def on_terminal(given: list[list[str]]) -> str:
    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    hidden = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(given)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    told = b""
    try:
        while read := os.read(own, 2**16):
            told += read
    except OSError:  # its other end is closed
        pass
    os.close(own)
    assert process.wait(PATIENCE) == 0, told.decode()
    return ESCAPES.sub("", told.decode().replace("\r\n", "\n"))


def in_pipe(given: list[list[str]]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    return done.stdout.decode()


def test_no_line_goes_over_the_edge(run: str) -> None:
    told = on_terminal(commands(run))
    too_long = [
        line
        for line in (drawn.rpartition("\r")[2] for drawn in told.split("\n"))
        if cell_len(line) > WIDTH
        and not line.startswith((AT, TO_BE_COPIED))
        and len(UNITS.findall(line)) > 1
    ]
    assert too_long == []
    assert "Traceback" not in told


def test_a_pipe_gets_whole_lines(run: str) -> None:
    """One event a line, for `grep`; and the same words as on a terminal."""
    looks = [["log", run], ["status", run], ["which", run], ["samples", run], ["ls", run + "x"]]
    piped, shown = in_pipe(looks), on_terminal(looks)
    assert piped.split() == shown.split()
    events = piped.partition(f"{AT}status")[0].splitlines()[1:]
    assert len(events) > 10
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in events)
    assert max(map(len, piped.splitlines())) > 120
