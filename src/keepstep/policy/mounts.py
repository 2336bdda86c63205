"""Which file system a folder lies on, by the lines of /proc/self/mounts. Pure."""

from __future__ import annotations

import re

HERE = "/proc/self/mounts"  # device, place, type, options


def mount_of(mounts: str, folder: str) -> tuple[str, str]:
    """The device and the type of a folder's file system, as the kernel has them: of the innermost,
    the last one mounted there; two empty words: nothing tells.

    Args:
        mounts: what `HERE` holds.
        folder: an absolute path without links; it may not be there yet.
    """
    newest = ("", "", "")
    for line in mounts.splitlines():
        device, place, kind = ([*map(_unescaped, line.split()), "", "", ""])[:3]
        within = folder == place or folder.startswith(f"{place.rstrip('/')}/")
        if place and within and len(place) >= len(newest[0]):
            newest = place, device, kind
    return newest[1:]


def _unescaped(field: str) -> str:
    r"""As the kernel writes blanks in names: `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
