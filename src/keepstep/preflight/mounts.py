"""Whether a folder is a bucket of an object store that some program shows as one. Pure.

The names are those of /proc/mounts: `BUCKET /mnt/x fuse.gcsfuse`, `s3fs /mnt/x fuse.s3fs`,
`mountpoint-s3 /mnt/x fuse`, `blobfuse2 /mnt/x fuse`, `REMOTE:PATH /mnt/x fuse.rclone`.
"""

from __future__ import annotations

import re

# Which program, and how the address of a mirror on its store begins.
PROGRAMS = {
    "gcsfuse": "gs://",
    **dict.fromkeys(("s3fs", "mountpoint-s3", "goofys", "geesefs"), "s3://"),
    **dict.fromkeys(("blobfuse", "blobfuse2"), "az://"),
    **dict.fromkeys(("rclone", "ossfs", "cosfs", "obsfs"), "s3://"),
}


def bucket_mount(mounts: str, folder: str) -> str | None:
    """The program that shows a bucket in the place of a folder; None: none does.

    Args:
        mounts: as /proc/mounts has them: device, place, type, options.
        folder: an absolute path without links; it may not be there yet.
    """
    newest = ("", "", "")  # place, device, type: of the innermost, the last one mounted there
    for line in mounts.splitlines():
        device, place, kind = ([*map(_unescaped, line.split()), "", "", ""])[:3]
        within = folder == place or folder.startswith(f"{place.rstrip('/')}/")
        if place and within and len(place) >= len(newest[0]):
            newest = place, device, kind
    _, device, kind = newest
    if kind.partition(".")[0] not in ("fuse", "fuse3"):
        return None
    return next((name for name in (kind.partition(".")[2], device) if name in PROGRAMS), None)


def _unescaped(field: str) -> str:
    r"""As the kernel writes blanks in names: `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
