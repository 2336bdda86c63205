"""Whether a folder is a bucket of an object store that some program shows as one. Pure.

The names are those of /proc/mounts: `BUCKET /mnt/x fuse.gcsfuse`, `s3fs /mnt/x fuse.s3fs`,
`mountpoint-s3 /mnt/x fuse`, `blobfuse2 /mnt/x fuse`, `REMOTE:PATH /mnt/x fuse.rclone`.
"""

from __future__ import annotations

from keepstep.policy.mounts import mount_of

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
        mounts, folder: see `mount_of`.
    """
    device, kind = mount_of(mounts, folder)
    if kind.partition(".")[0] not in ("fuse", "fuse3"):
        return None
    return next((name for name in (kind.partition(".")[2], device) if name in PROGRAMS), None)
