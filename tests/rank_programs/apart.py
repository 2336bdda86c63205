"""The main job, but rank 1 has a filesystem and a host name of its own: apart.py PLACE [fields]."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys

from keepstep import train
from keepstep.ranks import collectives

PLACE, ARGV = sys.argv[1], sys.argv[2:]
CLONE_NEWNS, CLONE_NEWUTS = 0x00020000, 0x04000000

if collectives.rank() == 1:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWUTS) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname("another-node")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", PLACE], check=True)
sys.exit(train.main(ARGV))
