"""A systemd of a user, with processes and control groups of its own: on a machine that systemd need
not have booted. What is started there is `systemctl --user`'s, as on a workstation."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers import launchers
from tests.helpers.waiting import wait_for

PROGRAM = next(
    (p for p in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if Path(p).exists()), None
)
BOOT = """
set -e
echo $$ > "$1/cgroup.procs"
exec unshare -C -m -p -f --mount-proc --kill-child --propagation private env -i PATH="$PATH" \
  HOME="$2/home" XDG_RUNTIME_DIR="$2/run" SYSTEMD_LOG_TARGET=console bash -c '
  mount -t cgroup2 none /sys/fs/cgroup && mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system
  "$0" --user --unit=default.target & wait' "$3"
"""


def _cgroups() -> Path | None:
    """Where control groups of version 2 are mounted."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((Path(words[1]) for words in lines if words[2] == "cgroup2"), None)


def obstacle() -> str | None:
    """Why systemd cannot be started on this machine; None: nothing is in the way."""
    if PROGRAM is None or shutil.which("systemctl") is None:
        return "systemd is not installed"
    if os.geteuid() != 0:
        return "not root: systemd gets namespaces of its own"
    place = _cgroups()
    if place is None or not os.access(place, os.W_OK):
        return "no control groups of version 2 that can be written"
    apart = ["unshare", "-C", "-m", "-p", "-f", "--mount-proc", "true"]
    done = subprocess.run(apart, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no namespaces: {done.stderr.strip()}"


@dataclass
class Manager:
    """systemd, as it looks after one user's units.

    Attributes:
        folder: with the user's home and run folder; its path is short, as a socket's has to be.
    """

    folder: Path
    pid: int = 0

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def start(self) -> None:
        place = _cgroups()
        assert place is not None
        assert PROGRAM is not None
        self._group = place / f"keepstep-{self.folder.name}"
        self._group.mkdir()
        (self.folder / "run").mkdir(mode=0o700)
        command = ["bash", "-c", BOOT, "-", str(self._group), str(self.folder), PROGRAM]
        self._process = launchers.start(command, self.folder / "systemd.log")
        socket = self.folder / "run/systemd/private"
        wait_for(socket.exists, self._process, self.folder / "systemd.log")
        inside = psutil.Process(self._process.pid).children(recursive=True)
        (self.pid,) = (one.pid for one in inside if one.cmdline()[:1] == [PROGRAM])

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-C", "env"]
        told = [f"HOME={self.home}", f"XDG_RUNTIME_DIR={self.folder}/run"]
        command = [*enter, *told, "systemctl", "--user", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    def shown(self, unit: str) -> dict[str, str]:
        """What systemd knows of a unit."""
        lines = self.systemctl("show", unit).stdout.splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        while self._group.exists():  # its processes are on their way out
            for group in sorted(self._group.rglob("*/"), reverse=True):
                _removed(group)
            _removed(self._group)
            time.sleep(0.1)


def _removed(group: Path) -> None:
    with contextlib.suppress(OSError):  # not empty yet
        group.rmdir()
