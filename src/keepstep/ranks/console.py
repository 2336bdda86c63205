"""What a launch tells whoever watches it: once, by the main process; of an error, by its rank."""

from __future__ import annotations

from keepstep.output.terminal import Terminal, complain
from keepstep.ranks import collectives

console = Terminal()


def say(text: str) -> None:
    """A line to whoever watches. Ranks: any; only the main process prints."""
    if collectives.is_main():
        console.tell_lines(text)


def say_everywhere(text: str) -> None:
    """A line from this rank, whichever it is: something is wrong. Ranks: any, any thread."""
    complain(text)
