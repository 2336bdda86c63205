"""The `keepstep` command."""

import atexit
import gc


def command() -> None:
    """The console script."""
    gc.set_threshold(50_000)  # what is imported stays: a million objects, where torch is among it
    atexit.register(gc.freeze)  # and nothing is to be found among them at the end, either
    from keepstep.cli.main import main

    main()
