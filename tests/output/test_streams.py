"""A terminal, a reader or a disk that takes nothing costs lines, never the outcome."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# All that prints in a run, then a word in a file: it has come to its end.
SCRIPT = """
import logging, sys, traceback, warnings
from keepstep.output import streams

streams.WAIT_SECONDS = 0.3
streams.protect()
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

sys.stdin.readline()  # until the other end is gone
print("plain", flush=True)
print("→ not in every encoding")
print("x" * int(sys.argv[2]))
Console().print("rich")
with Progress() as progress:
    progress.update(progress.add_task("bar", total=2), advance=1)
for _ in tqdm(range(3)):
    pass
logging.warning("logged")
warnings.warn("warned")
try:
    raise ValueError("raised")
except ValueError:
    traceback.print_exc()
with open(sys.argv[1], "w") as file:
    file.write("ended")
print("held by a buffer until Python ends")
"""


def run(
    end: Path, output: int, gone: Callable[[], None] = lambda: None, size: int = 10, **env: str
) -> None:
    """The script with both streams there; it ends, with exit status 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, end, str(size)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        env={**os.environ, **env},
    )
    gone()
    process.communicate(b"\n", timeout=300)
    assert process.returncode == 0
    assert end.read_text() == "ended"


def test_a_terminal_that_was_closed(tmp_path: Path) -> None:
    terminal, side = pty.openpty()

    def close() -> None:
        os.close(side)
        os.close(terminal)

    run(tmp_path / "end", side, close)


def test_a_terminal_that_nobody_reads(tmp_path: Path) -> None:
    """Ctrl-S, or a connection that stalls: without an end, more than it holds would wait."""
    terminal, side = pty.openpty()
    run(tmp_path / "end", side, size=10**6)
    os.close(side)
    os.close(terminal)


@pytest.mark.parametrize("read", [True, False])
def test_a_pipe(tmp_path: Path, read: bool) -> None:
    """Whose reader is gone; and one that is there, and does not read."""
    reading, writing = os.pipe()
    run(tmp_path / "end", writing, (lambda: None) if read else lambda: os.close(reading), 10**6)


def test_a_full_disk_under_the_log(tmp_path: Path) -> None:
    run(tmp_path / "end", os.open("/dev/full", os.O_WRONLY))


def test_what_can_be_written_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run(tmp_path / "end", descriptor, size=10**5, PYTHONIOENCODING="ascii")
    told = log.read_text()
    for text in ("plain", r"\u2192 not in", "x" * 10**5, "rich", "logged", "warned", "raised"):
        assert text in told
    assert told.endswith("held by a buffer until Python ends\n")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """And what is printed into it."""
    code = "from keepstep.output import streams; streams.protect()\n"
    code += f"import os\nopened = open({str(tmp_path / 'checkpoint')!r}, 'w')\n"
    code += "os.write(1, b'a library prints'); os.write(2, b'and warns'); print('so do we')"
    command = ["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "checkpoint").read_text() == ""


def test_a_line_is_one_write() -> None:
    """Between its text and its end another rank's could come, in a log that all ranks write."""
    code = (
        "import sys; from keepstep.output import streams; streams.protect()\n"
        "print('one'); print('two', file=sys.stderr)"
    )
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a packet a write
    with here, there:
        command = [sys.executable, "-u", "-c", code]  # as launchers start ranks
        end = there.fileno()
        subprocess.run(command, stdout=end, stderr=end, check=True, timeout=300)
        assert [here.recv(100), here.recv(100)] == [b"one\n", b"two\n"]
