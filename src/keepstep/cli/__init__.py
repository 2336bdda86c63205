"""The `keepstep` command."""

import atexit
import gc
import os
import signal

INTERRUPTED = 130  # as shells say it of SIGINT


def command() -> None:
    """The console script."""
    asked = signal.getsignal(signal.SIGINT)
    if asked is signal.default_int_handler:  # nothing is begun: no traceback of an import
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    gc.set_threshold(50_000)  # what is imported stays: a million objects, where torch is among it
    atexit.register(gc.freeze)  # and nothing is to be found among them at the end, either
    from keepstep.cli.main import main

    signal.signal(signal.SIGINT, asked)
    main()
