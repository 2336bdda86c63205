"""`--watch`: the same look again and again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import typer

from keepstep.cli.common import console

LOOK_SECONDS = 2.0
STORE_SECONDS = 30.0  # on an object store, where a look costs requests


def again_and_again(look: Callable[[], None], pause: float = LOOK_SECONDS) -> None:
    """Look until somebody interrupts it, on a terminal always at the same place.

    Args:
        pause: seconds between two looks.
    """
    try:
        while True:
            if console.moves_cursor:
                console.clear()
            with contextlib.suppress(typer.Exit):  # what is not as it should be may be so later
                look()
            time.sleep(pause)
            if not console.moves_cursor:
                console.tell("")
    except KeyboardInterrupt:
        pass
