"""A bar for what takes long: on stderr, on a terminal, after two seconds; else nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from tqdm import tqdm

from keepstep.output.log_filters import BARS
from tests.output.test_table import on_a_terminal

ESCAPE = re.compile(r"\x1b\[\??[\d;]*[a-zA-Z]")
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
        time.sleep(4 * {pause})  # until it is drawn, on a machine that is busy, too
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


@pytest.mark.parametrize("width", [80, 60])
def test_a_long_name_does_not_fold_it(width: int) -> None:
    work = WORK.replace('"reading"', f'"reading {"x" * 60} 的名字"')
    work = work.replace('"sending"', f'"sending {"y" * 90}"').replace("10**6", "123 * 10**6")
    seen = on_a_terminal([sys.executable, "-c", work.format(after=0.01, pause=0.2)], width)
    frames = [plain for part in seen.split("\r") if (plain := ESCAPE.sub("", part)).strip()]
    drawn = [frame for frame in frames if "…" in frame]
    assert any("readi" in frame and "名字 " in frame and "0:00:0" in frame for frame in drawn)
    assert any("sending y" in frame and "yy 0:00:0" in frame for frame in drawn)


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


def test_a_launcher_that_reads_stderr() -> None:
    """As launch/train.sh does: the bar is on stdout, if that is a terminal."""
    seen = on_a_terminal(
        ["bash", "-c", '"$@" 2> >(cat >/dev/null)', "bash", *program(after=0.01, pause=0.3)], 80
    )
    assert "reading" in seen
    assert "MB/s" in seen
    assert "sending" in seen
    assert "a line" in seen


PIPED = """if True:
    import os, pty, subprocess, sys
    ours, theirs = pty.openpty()
    command = sys.argv[5:]
    os.environ["TERM"] = "xterm"
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True)
    sys.stdout.write(done.stdout)
"""


LOADING = """if True:
    import os, sys, time
    from keepstep.output import loading
    from keepstep.output.terminal import Terminal
    streams = sys.stdout, sys.stderr
    with loading.loading(Terminal(), after=0.01):
        time.sleep(0.5)
        assert (sys.stdout, sys.stderr) == streams, "a library would keep another one"
    print("done", flush=True)
"""


def test_what_is_imported_for_long_is_told_of() -> None:
    command = [sys.executable, "-c", LOADING]
    seen = on_a_terminal(command, 80)
    assert "loading PyTorch and what is built on it … 0:00:0" in ESCAPE.sub("", seen)
    assert ESCAPE.sub("", seen).endswith("done\r\n")
    assert subprocess.run(command, capture_output=True).stdout == b"done\n"


BEGUN = """if True:
    import sys
    from keepstep.output import loading
    shown = loading.begin(every=0.05)
    sys.stdin.readline()
    {ends}
    sys.stdin.readline()
"""


@pytest.mark.parametrize("ends", ["shown.close()", "raise ImportError('none')"])
def test_in_a_log_a_launch_tells_what_it_loads(ends: str) -> None:
    """Again and again, until it is done, or has failed; of the ranks the first one."""
    command, pipe = [sys.executable, "-c", BEGUN.format(ends=ends)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as launch:
        assert launch.stdin is not None
        assert launch.stdout is not None
        for _ in range(2):
            assert launch.stdout.readline().startswith("loading PyTorch and what is built on it: ")
        _, errors = launch.communicate("\n\n")
    assert ("ImportError: none" in errors) == (launch.returncode != 0) == ("raise" in ends)
    other = {**os.environ, "RANK": "1"}
    quiet = subprocess.run(command, input="\n\n", capture_output=True, text=True, env=other)
    assert quiet.stdout == ""


LIBRARY = """if True:
    from keepstep.output.log_filters import silence
    silence()
    from datasets.utils import tqdm
    from tqdm import std
    now = 1000.0
    std.time = lambda: now
    for row in tqdm(range(100000), desc="Dropping fully masked examples", unit=" examples"):
        now += {seconds} / 100000
    print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("after", "seconds"), [(None, 1.9), (None, 2.5), ("0", 2.5), ("3600", 2.5)]
)
def test_bars_of_libraries_are_as_ours(after: str | None, seconds: float) -> None:
    """None within two seconds; then one line with rate and time left, which goes in the end."""
    own = {} if after is None else {"TQDM_DELAY": after}
    seen = on_a_terminal([sys.executable, "-c", LIBRARY.format(seconds=seconds)], 80, **own)
    assert seen.endswith("done\r\n")
    if after == "3600" or (after is None and seconds < 2):  # what a person has set goes before
        assert seen == "done\r\n"
        return
    frames = [frame for frame in seen.split("\r") if "/100000, " in frame]
    assert frames
    assert any(" examples/s, 00:0" in frame and frame.endswith(" left") for frame in frames)
    assert max(map(len, frames)) <= 80
    assert seen.split("\r")[-3].strip() == ""  # it is gone


@pytest.mark.parametrize("total", [1_000_000, None])
def test_a_bar_of_a_million_rows_fits(total: int | None) -> None:
    told = tqdm.format_meter(
        999_999,
        total,
        elapsed=600,
        ncols=80,
        prefix="Dropping fully masked examples from train dataset",
        unit=" examples",
        bar_format=BARS["TQDM_BAR_FORMAT"],
    )
    assert len(told) <= 80
    assert told.startswith("Dropping fully masked ex ")
    assert told.endswith("1666.66 examples/s, 00:00 left")
