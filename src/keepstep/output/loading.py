"""That libraries are being imported: seconds, minutes from a slow disk, and no line of theirs."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from keepstep.output.progress import EVERY
from keepstep.output.terminal import SHOWN_AFTER, Terminal
from keepstep.output.units import human_duration

TEXT = "loading PyTorch and what is built on it"


@contextmanager
def loading(terminal: Terminal, text: str = TEXT, after: float = SHOWN_AFTER) -> Iterator[None]:
    """Around imports: on a terminal the text and the time, once they have taken a while. What is
    imported may keep the streams that it finds: they stay the real ones."""
    with terminal.waiting(f"{text} …", after, redirect=False):
        yield


def begin(every: float = EVERY) -> ExitStack:
    """The same for a program whose imports are its first lines, until what is returned is closed;
    in a log a line each half minute. Ranks: any, before anything is imported; only the main process
    shows it."""
    shown = ExitStack()
    if os.environ.get("RANK", "0") != "0":
        return shown
    terminal = Terminal()
    if terminal.moves_cursor:
        shown.enter_context(loading(terminal))
    else:
        over = threading.Event()
        teller = threading.Thread(target=_lines, args=(terminal, every, over), daemon=True)
        teller.start()
        shown.callback(teller.join)  # Python aborts where a thread writes to stdout at its end
        shown.callback(over.set)
    atexit.register(shown.close)  # an import may fail
    return shown


def _lines(terminal: Terminal, every: float, over: threading.Event) -> None:
    began = time.monotonic()
    while not over.wait(every):
        terminal.tell(f"{TEXT}: {human_duration(time.monotonic() - began)}")
