"""PID 1 of a machine: sets up what is its own, and buries the dead.

machine.py NAME HOSTS
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

name, hosts = sys.argv[1:]
for command in (
    ["hostname", name],
    ["mount", "--bind", hosts, "/etc/hosts"],
    ["mount", "--bind", os.devnull, "/etc/resolv.conf"],  # or each look-up waits for an answer
    ["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", "/dev/shm"],
):
    subprocess.run(command, check=True)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
print("up", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        signal.sigtimedwait([], 0.2)
