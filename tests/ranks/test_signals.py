"""Signals of a process without ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keepstep.ranks import signals
from tests.helpers import launchers
from tests.helpers.waiting import PATIENCE, wait_for

READY = """
import hashlib, sys, time
from pathlib import Path
from keepstep.ranks import signals
signals.install_handlers()
"""


def start(code: str, *prefix: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
    command = [*prefix, sys.executable, "-c", f"{READY}{code}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, preexec_fn=launchers.hear_signals
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def is_written(file: Path) -> bool:
    return file.exists() and bool(file.read_text())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    code = "print('ready', flush=True)\nwhile not signals.requested(): time.sleep(0.01)\n"
    process = start(code + "print(signals.requested())")
    process.send_signal(number)
    assert process.communicate(timeout=PATIENCE)[0] == f"{number.name}\n".encode()


def test_nohup() -> None:
    """Whoever asked that a closed terminal be no reason to stop has asked for it."""
    code = "print('ready', flush=True); sys.stdin.readline(); print(signals.requested())"
    command = ["nohup", sys.executable, "-c", READY + code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(b"\n", timeout=PATIENCE)[0] == b"None\n"


def test_a_signal_is_told_while_the_main_thread_is_in_a_long_call(tmp_path: Path) -> None:
    """Its handler waits for the call to come back; a kill does not."""
    told = tmp_path / "told"
    process = start(
        f"signals.tell_at_once(lambda name: Path({str(told)!r}).write_text(name))\n"
        "print('ready', flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # many minutes
    )
    process.send_signal(signal.SIGHUP)
    try:
        wait_for(lambda: process.poll() is not None or is_written(told))
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert told.read_text() == "SIGHUP"


def test_a_second_interrupt_on_a_terminal_that_is_gone() -> None:
    reading, writing = os.pipe()
    code = "signals.ONE_REQUEST_SECONDS = 0\nprint('ready', flush=True)\n"
    process = start(code + "while True: time.sleep(0.01)", stderr=writing)
    for end in (reading, writing):
        os.close(end)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert process.returncode == 128 + signal.SIGINT


def test_a_rank_whose_launcher_has_ended_before_it_began(tmp_path: Path) -> None:
    """Started by a shell that is gone by then, it is process 1's child."""
    assert not signals.is_orphan(1, b"/usr/bin/python3\0/usr/bin/accelerate\0launch")
    assert not signals.is_orphan(4711, b"/sbin/init")
    told = tmp_path / "told"
    code = (
        "import os, time; from pathlib import Path; from keepstep.ranks import signals\n"
        "while os.getppid() != 1: time.sleep(0.01)\n"
        "signals.install_handlers(); time.sleep(0.1)\n"
        f"Path({str(told)!r}).write_text(str(signals.requested()))"
    )
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}
    shell = [sys.executable, "-c", "import subprocess, sys; subprocess.Popen(sys.argv[1:])"]
    subprocess.run([*shell, sys.executable, "-c", code], env=environment, check=True)
    wait_for(lambda: is_written(told))
    assert told.read_text().startswith("SIGTERM")


HEARD = """
import os, signal, sys, threading, time
from keepstep.ranks import signals

def ask(number=signal.SIGINT):
    os.kill(os.getpid(), number)
    return signals.requested()

for name in ("first", "second"):  # an attempt, and one more in the same process
    before = signal.getsignal(signal.SIGTERM), signals.started()
    told = []
    with signals.heard():
        stop = signals.tell_at_once(told.append)
        print(name, signals.requested(), ask(), signals.started() == before[1])
        while not told:
            time.sleep(0.01)
        stop()
    print(told, signals.requested(), signal.getsignal(signal.SIGTERM) == before[0])
    assert signal.set_wakeup_fd(-1) == -1
with signals.heard():
    ask()
    time.sleep(2.1)
    try:
        ask()
    except KeyboardInterrupt:
        print("interrupted")

def beside():
    with signals.heard():
        signals.tell_at_once(print)()
        print("beside", signal.getsignal(signal.SIGINT) is signal.default_int_handler)

thread = threading.Thread(target=beside)
thread.start()
thread.join()
"""


def test_heard_for_a_while() -> None:
    """As in a notebook, whose kernel goes on: what signals did before, they do afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", HEARD],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=launchers.hear_signals,
    )
    assert done.stdout.splitlines() == [
        *("first None SIGINT True", "['SIGINT'] None True"),
        *("second None SIGINT False", "['SIGINT'] None True"),
        *("interrupted", "beside True"),
    ], done.stderr


def test_attempts_of_one_launch_have_one_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """`time_limit` counts from it; a moment stays the moment that it is."""
    wall, steady = signals.started()
    monkeypatch.setenv(signals.BEGAN, str(steady - 100))
    assert signals.started() == pytest.approx((wall - 100, steady - 100))
    for nonsense in ("", "soon", str(steady + 100)):
        monkeypatch.setenv(signals.BEGAN, nonsense)
        assert signals.started() == (wall, steady)
