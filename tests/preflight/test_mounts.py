"""A bucket that is mounted as a folder is told from a disk, by the lines of /proc/mounts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from keepstep.preflight import probes
from keepstep.preflight.mounts import bucket_mount

DISKS = """overlay / overlay rw,relatime 0 0
proc /proc proc rw 0 0
/dev/nvme0n1p1 /data ext4 rw 0 0
host:/home /home nfs4 rw 0 0
user@host: /mnt/ssh fuse.sshfs rw 0 0
redis://x /mnt/juice fuse.juicefs rw 0 0
fusectl /sys/fs/fuse/connections fusectl rw 0 0
"""
BUCKETS = {
    "my-bucket {} fuse.gcsfuse rw,user_id=0 0 0": "gcsfuse",
    "s3fs {} fuse.s3fs rw,nosuid 0 0": "s3fs",
    "mountpoint-s3 {} fuse rw,noatime 0 0": "mountpoint-s3",
    "mountpoint-s3 {} fuse.mountpoint-s3 rw 0 0": "mountpoint-s3",
    "bucket {} fuse.goofys rw 0 0": "goofys",
    "remote:path {} fuse.rclone rw 0 0": "rclone",
    "blobfuse2 {} fuse rw,allow_other 0 0": "blobfuse2",
    "blobfuse {} fuse rw 0 0": "blobfuse",
}


@pytest.mark.parametrize("line", BUCKETS)
def test_buckets(line: str) -> None:
    mounts = DISKS + line.format("/mnt/bucket") + "\n"
    for folder in ("/mnt/bucket", "/mnt/bucket/runs/not/there/yet"):
        assert bucket_mount(mounts, folder) == BUCKETS[line]
    for folder in (
        "/mnt/bucket2/run",
        "/data/run",
        "/home/me",
        "/mnt/ssh/run",
        "/mnt/juice/run",
        "/",
    ):
        assert bucket_mount(mounts, folder) is None


def test_what_is_mounted_last_and_innermost_counts() -> None:
    line = "s3fs {} fuse.s3fs rw 0 0\n"
    assert bucket_mount(DISKS + line.format("/data/a\\040b"), "/data/a b/run") == "s3fs"
    assert (
        bucket_mount(line.format("/mnt") + "/dev/sda /mnt/disk ext4 rw 0 0", "/mnt/disk/x") is None
    )
    over = line.format("/mnt/x") + "/dev/sda /mnt/x ext4 rw 0 0\n"
    assert bucket_mount(over, "/mnt/x/run") is None
    assert bucket_mount(line.format("/"), "/any/where") == "s3fs"
    for odd in ("", "\n\n", "one", "two words"):
        assert bucket_mount(odd, "/mnt/x") is None


def test_a_launch_is_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"my-bucket {tmp_path} fuse.gcsfuse rw 0 0\n"
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: mounts if str(self) == "/proc/self/mounts" else real(self, *a, **k),
    )
    (problem,) = probes.see_together(tmp_path / "run")
    assert (problem.code, problem.severity) == ("bucket-mount", "warning")
    assert f"{tmp_path}/run is a bucket that gcsfuse shows as a folder" in problem.what
    assert "`mirror: gs://bucket/prefix`" in problem.hint

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "rename", refuse)
    (problem,) = probes.see_together(tmp_path / "run")
    assert (problem.code, problem.severity) == ("not-writable", "error")
    assert "`mirror: gs://bucket/prefix`" in problem.hint
