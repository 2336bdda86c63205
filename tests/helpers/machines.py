"""Several machines on this one, that share its disk: each has network, process, name and mount
namespaces, and can lose its power and its network. Their names are resolved nowhere.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import launchers
from tests.helpers.ranks import ROOT
from tests.helpers.switch import Switch, any_prefix
from tests.slurm.helpers.processes import below, facts, matching, send, wait_for

APART = ("unshare", "-m", "-u", "-p", "-f", "--kill-child=KILL", "--mount-proc")
PROGRAMS = ("ip", "bridge", "nsenter", "unshare", "setpriv")
COMMAND = r"^\S*python\S* (-\S+ )*-m keepstep\.cli\.together "
RANK = r"^\S*python\S* (-u )?-m keepstep\.train "


@dataclass
class Command:
    """What runs on a machine."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text()

    def says(self, text: str, count: int = 1, timeout: float = launchers.TIMEOUT) -> None:
        """Wait for words."""
        try:
            wait_for(text, lambda: self.text().count(text) >= count, timeout)
        except TimeoutError as error:
            raise AssertionError(f"{error}:\n{self.text()[-6000:]}") from None

    def find(self, pattern: str) -> list[int]:
        return matching(below(self.process.pid), pattern)

    def signal(self, number: int, pattern: str = COMMAND) -> None:
        found = self.find(pattern)
        assert found, pattern
        send(found, number)

    def ends(self, timeout: float = launchers.TIMEOUT) -> int:
        code, _ = launchers.end(self.process, self.log, timeout)
        return code


class Machines:
    """
    Args:
        folder: for their logs.
        names: of them.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        prefix = any_prefix()
        addresses = {name: f"{prefix}.{11 + i}" for i, name in enumerate(names)}
        self._switch = Switch(f"ks{secrets.token_hex(2)}", prefix, addresses)
        self._hosts = folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = 0
        self._switch.up()
        for name in names:
            self.boot(name)

    def boot(self, name: str) -> None:
        self._switch.plug(name, on=True)
        program = [
            sys.executable,
            str(Path(__file__).with_name("machine.py")),
            name,
            str(self._hosts),
        ]
        command = [*self._switch.inside(name), *APART, "--propagation=private", *program]
        self._inits[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], stdout=subprocess.PIPE, cwd="/"
        )
        stdout = self._inits[name].stdout
        assert stdout is not None
        assert stdout.readline() == b"up\n"

    def crash(self, name: str) -> None:
        """Power loss: nothing answers any more, and nothing is closed."""
        self._switch.plug(name, on=False)
        init = self._inits.pop(name)
        everything = below(init.pid)
        init.kill()
        init.wait()
        wait_for(f"{name} down", lambda: not any(map(facts, everything)), every=0.05)

    def cut(self, name: str) -> None:
        """Off the network; its processes live, and see the disk."""
        self._switch.plug(name, on=False)

    def heal(self, name: str) -> None:
        self._switch.plug(name, on=True)

    def start(self, name: str, command: list[str], **environment: str) -> Command:
        """Run a command there, from the project's folder, as launchers.start() does."""
        (init,) = [pid for pid in below(self._inits[name].pid) if pid != self._inits[name].pid][:1]
        self._logs += 1
        log = self.folder / f"{self._logs}-{name}.log"
        told = [f"{key}={value}" for key, value in environment.items()]
        enter = ["nsenter", "-t", str(init), "-n", "-m", "-u", "-p", f"--wdns={ROOT}"]
        process = launchers.start([*enter, "env", *told, *command], log)
        return Command(process, log)

    def down(self) -> None:
        for name in list(self._inits):
            with contextlib.suppress(TimeoutError):
                self.crash(name)
        self._switch.down()
