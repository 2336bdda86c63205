"""A bar for what takes long: on stderr, on a terminal, after two seconds; else nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.output.test_table import on_a_terminal

WORK = """if True:
    import sys, time
    from keepstep.output.terminal import Terminal, progress_bar
    terminal = Terminal()
    with progress_bar(terminal, "reading", after={after}) as tell:
        for done in range(1, 6):
            tell(done * 10**6, 10**7)
            time.sleep({pause})
        print("a line", flush=True)
    with terminal.waiting("sending", after={after}):
        time.sleep({pause})
    print("done", flush=True)
"""


def program(after: float, pause: float) -> list[str]:
    return [sys.executable, "-c", WORK.format(after=after, pause=pause)]


def test_what_takes_long_has_a_bar_with_rate_and_time_left() -> None:
    seen = on_a_terminal(program(after=0.01, pause=0.3), 80)
    assert "reading" in seen
    assert "MB" in seen
    assert "MB/s" in seen
    assert "0:00:0" in seen
    assert "sending" in seen
    assert "a line" in seen


def test_what_is_soon_done_has_none() -> None:
    seen = on_a_terminal(program(after=60, pause=0), 80)
    assert seen.split() == ["a", "line", "done"]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}])
def test_what_moves_no_cursor_has_none(environment: dict[str, str]) -> None:
    seen = on_a_terminal(program(after=0.01, pause=0.1), 80, **environment)
    assert seen.split() == ["a", "line", "done"]


def test_a_file_has_none() -> None:
    done = subprocess.run(program(after=0.01, pause=0.1), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("a line\ndone\n", "")


def test_what_a_program_reads_has_none() -> None:
    """stdout is a pipe, stderr a terminal: the bar does not take what is for the program."""
    shell = ["bash", "-c", '"$@" | cat >&1', "bash", *program(after=0.01, pause=0.2)]
    told = subprocess.run(
        [sys.executable, "-c", PIPED, *shell], capture_output=True, text=True, check=True
    )
    assert told.stdout == "a line\ndone\n"


PIPED = """if True:
    import os, pty, subprocess, sys
    ours, theirs = pty.openpty()
    command = sys.argv[5:]
    os.environ["TERM"] = "xterm"
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    sys.stdout.write(done.stdout)
"""
