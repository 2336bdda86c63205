"""PID 1 of a node: sets up what is the node's own, starts slurmd, and buries the dead.

node.py FOLDER NAME
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

folder, name = Path(sys.argv[1]), sys.argv[2]
for command in (
    ["hostname", name],
    ["mount", "--bind", str(folder / f"hosts-{name}"), "/etc/hosts"],
    ["mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", "/dev/shm"],
    ["mount", "--bind", str(folder / "disks" / name), str(folder / "own")],
):
    subprocess.run(command, check=True)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
subprocess.Popen(
    ["slurmd", "-D", "-N", name, "-f", str(folder / "slurm.conf")], stdin=subprocess.DEVNULL
)
while True:
    try:
        os.wait()
    except ChildProcessError:
        signal.pause()
