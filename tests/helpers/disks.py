"""Filesystems of a fixed size, for tests that fill them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk_at(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size`, as in `10m`, mounted at `place`; skipped where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("not root: no filesystem can be mounted")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
