"""Where an attempt tells its launcher's launcher how it ended."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "keepstep-"
MEMORY = "/dev/shm"


@contextlib.contextmanager
def scratch_folder(other: Path | None) -> Iterator[Path]:
    """A folder until the block ends: that of temporary files may be full by now, or gone.

    Args:
        other: a folder to take, if neither that nor memory will do.

    Raises:
        OSError: none could be made.
    """
    folder = Path(_made(None, MEMORY, str(other or MEMORY)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made(first: str | None, *others: str) -> str:
    try:
        return tempfile.mkdtemp(prefix=PREFIX, dir=first)
    except OSError:
        if not others:
            raise
        return _made(*others)
