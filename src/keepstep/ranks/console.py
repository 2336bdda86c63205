"""What a launch tells whoever watches it: once, by the main process; of an error, by its rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from keepstep.output.progress import progress_lines
from keepstep.output.terminal import Terminal, complain, progress_bar
from keepstep.ranks import collectives

console = Terminal()


def say(text: str) -> None:
    """A line to whoever watches. Ranks: any; only the main process prints."""
    if collectives.is_main():
        console.tell_lines(text)


def say_everywhere(text: str) -> None:
    """A line from this rank, whichever it is: something is wrong. Ranks: any, any thread."""
    complain(text)


@contextmanager
def progress(text: str) -> Iterator[Callable[[int, int | None], None]]:
    """How far something is that takes long: a bar on a terminal, a line now and then in a log.
    Yields (done, total) → None, in bytes. Ranks: any; only the main process shows it."""
    if not collectives.is_main():
        yield lambda done, total: None
    elif console.moves_cursor:
        with progress_bar(console, text) as tell:
            yield tell
    else:
        yield progress_lines(say, text)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """That something goes on of which nobody knows how far it is: on a terminal alone. No process
    is forked within, since a thread draws it. Ranks: any; only the main process shows it."""
    if not collectives.is_main():
        yield
        return
    with console.waiting(text):
        yield
