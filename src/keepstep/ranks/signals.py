"""Signal → flag → agreed at a step boundary → save and stop. Imports nothing slow."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

# HUP: the terminal was closed, the connection lost.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def steady() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# Ctrl-C reaches a rank from the terminal and again from its launcher: that is one request.
ONE_REQUEST_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BEGAN = "KEEPSTEP_BEGAN"  # seconds since the machine's start, by launch/train.sh
ENOUGH = 0  # in the place of a signal's number: nothing more is told

_started = time.time(), steady()
_launcher: int | None = None
_installed = False  # for as long as this process lives
_raises = False  # a second SIGINT is an error of this process, which has no peers
_fresh = True  # nobody has asked yet when this process began its work
_received: list[tuple[int, float]] = []
_continued = False  # it was told to go on, and nobody has asked since


def install_handlers() -> None:
    """From now on the first signal asks for a stop at the next step boundary.

    Call it before the slow imports, in every rank: a signal that comes earlier ends the process.
    """
    global _started, _installed
    _started, _installed = (time.time(), steady()), True
    for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup
        signal.signal(number, _handle)
    _hear_continue()
    _watch_launcher()


def _watch_launcher() -> None:
    """Have the end of torchrun, or of accelerate's like of it, ask for a stop."""
    global _launcher
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _launcher = os.getppid()
        if is_orphan(_launcher, Path("/proc/1/cmdline").read_bytes()):
            os.kill(os.getpid(), signal.SIGTERM)  # its launcher ended before this line
        die_with_parent(signal.SIGTERM)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Within, the first signal asks for a stop, as after `install_handlers()`; afterwards signals
    do what they did before. Nothing changes where handlers are installed already, and in another
    thread than the main one, where Python lets nobody install any: there `keepstep stop` is left.

    Ranks: any. A second SIGINT, in a process without peers, is a KeyboardInterrupt.
    """
    global _started, _raises, _fresh
    if _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _fresh:  # a notebook's kernel: the time of its first attempt is not that of this one
        _started = time.time(), steady()
    before = {n: signal.getsignal(n) for n in (*SIGNALS, signal.SIGCONT)}
    _fresh, _raises = False, os.environ.get("WORLD_SIZE", "1") == "1"
    _received.clear()
    for number in SIGNALS:
        if number != signal.SIGHUP or before[number] != signal.SIG_IGN:  # nohup
            signal.signal(number, _handle)
    _hear_continue()
    _watch_launcher()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _raises = False
        _received.clear()


def is_orphan(parent: int, init: bytes) -> bool:
    """Whether a launcher's child with this parent has lost the launcher already: without it the
    ranks never find each other. `init`: the command line of process 1, which in a container may be
    the launcher itself."""
    return parent == 1 and not any(name in init for name in (b"python", b"accelerate", b"torchrun"))


def die_with_parent(number: int, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent is gone, however it ended.

    Args:
        parent: who has started it, and may be gone since; None: who is its parent now.
    """
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it was faster
        os.kill(os.getpid(), number)


def started() -> tuple[float, float]:
    """When this process began its work: in seconds since the epoch, and on the steady clock. Where
    launch/train.sh has launched the run again by itself, when its first attempt began."""
    wall, now = _started
    try:
        since = max(0.0, now - float(os.environ[BEGAN]))
    except (KeyError, ValueError):
        return _started
    return wall - since, now - since


def requested() -> str | None:
    """The signal that this process has received, by name, None so far."""
    if not _received:
        return None
    name = signal.Signals(_received[0][0]).name
    # Without it nobody would end the ranks, or hear of their end.
    return f"{name} (its launcher is gone)" if _launcher not in (None, os.getppid()) else name


def tell_at_once(tell: Callable[[str], object]) -> Callable[[], None]:
    """Have `tell` called with the name of the first signal, in a thread of its own.

    At once: the handler waits for the main thread to come back from a long call, as into a
    collective, and somebody who is in a hurry may kill it there. Ranks: any; in another thread than
    the main one, where Python lets nobody listen, nothing is told.

    Returns: ends it.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    heard, written = os.pipe()
    os.set_blocking(written, False)
    before = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    for number, _ in _received[:1]:  # it came earlier
        os.write(written, bytes([number]))

    def listen() -> None:
        while (number := os.read(heard, 1)[0]) not in (*SIGNALS, ENOUGH):
            pass  # a child has ended, say
        if number != ENOUGH:
            tell(signal.Signals(number).name)

    thread = threading.Thread(target=listen, daemon=True, name="keepstep-signals")
    thread.start()

    def stop() -> None:
        signal.set_wakeup_fd(before)
        os.write(written, bytes([ENOUGH]))
        thread.join()
        os.close(written)
        os.close(heard)

    return stop


def was_continued() -> bool:
    """Whether this process was told to go on (SIGCONT) since this was asked last. Ranks: any; one
    thread."""
    global _continued
    heard, _continued = _continued, False
    return heard


def _hear_continue() -> None:
    def hear(number: int, frame: FrameType | None) -> None:
        global _continued
        _continued = True

    signal.signal(signal.SIGCONT, hear)
    signal.siginterrupt(signal.SIGCONT, False)  # libraries' calls go on as without it


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    interrupts = [when for earlier, when in _received if earlier == signal.SIGINT]
    if number == signal.SIGINT and interrupts and now - interrupts[0] > ONE_REQUEST_SECONDS:
        if _raises:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"keepstep: a second SIGINT: this rank ends at once\n")
        os._exit(128 + number)  # as safe as SIGKILL; a raised error would meet waiting peers
    _received.append((number, now))
