"""A throw-away Slurm cluster on one machine: real daemons, nodes that can be crashed and cut off.

    python -m tests.slurm.helpers.cluster up DIR -n 3      then: export SLURM_CONF=DIR/slurm.conf
    python -m tests.slurm.helpers.cluster crash|boot|cut|heal DIR n2
    python -m tests.slurm.helpers.cluster down DIR

Each node has network, PID, UTS and mount namespaces, a name, an address and a PID 1 of its own; the
disk is the machine's, so it is shared. A switch (a bridge in a namespace of its own) joins them.
Root is needed, and Debian's slurmctld, slurmd, slurm-client, munge, iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepstep.cli.network import free_port
from tests.helpers.switch import Switch, any_prefix
from tests.slurm.helpers.processes import below, facts, matching, run, send, wait_for

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "bridge", "nsenter", "unshare")
# Slurm's own variables, of a job that this machine may be a part of.
SLURM_VARIABLE = re.compile(r"(SLURM|SBATCH|SRUN)")
SETTINGS = """
ClusterName=lab
AuthInfo=socket={munge}/sock,cred_expire=5
StateSaveLocation={folder}/ctl
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MessageTimeout=5
TCPTimeout=2
MinJobAge=36000
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
LogTimeFormat=iso8601_ms
"""


def free_ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return list(found)


class Cluster:
    """
    Attributes:
        env: with which Slurm's commands reach it.
        own: a folder that is each node's own disk, and no other node's.
    """

    def __init__(self, folder: Path, bound: bool = False) -> None:
        """
        Args:
            bound: it ends with this process, however that ends.
        """
        self.folder, self._bound = folder.resolve(), bound
        self.munge = self.folder / "munge"
        self.own = self.folder / "own"
        self._file = self.folder / "state.json"
        self._state: dict[str, Any] = {}
        if self._file.exists():
            self._state = json.loads(self._file.read_text())
        kept = {k: v for k, v in os.environ.items() if not SLURM_VARIABLE.match(k)}
        self.env = {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def disk(self, node: str) -> Path:
        """What a node has at `own`."""
        return self.folder / "disks" / node

    def lose_disk(self, node: str) -> None:
        """Of a node that is down: what was at `own` is gone."""
        shutil.rmtree(self.disk(node))
        self.disk(node).mkdir()

    @property
    def nodes(self) -> dict[str, str]:
        """Name → address."""
        return dict(self._state.get("nodes", {}))

    def up(
        self, count: int, cpus: Sequence[int] = (4, 2), memory: int = 8000, awkward: bool = False
    ) -> None:
        """Start everything; a few seconds.

        Args:
            cpus: of the first nodes; those behind them have as many as the last of these.
            awkward: a node's own name leads to 127.0.1.1, as on Debian, and the first interface of
                each to nobody.
        """
        own = [f"{kind}/n{i + 1}" for kind in ("spool", "disks") for i in range(count)]
        for name in ("log", "run", "ctl", "munge", "own", *own):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.munge.chmod(0o711)
        prefix = any_prefix()
        names = {f"n{i + 1}": f"{prefix}.{11 + i}" for i in range(count)}
        self._state = {"id": secrets.token_hex(2), "prefix": prefix, "nodes": names, "pids": {}}
        try:
            self._configure(cpus, memory)
            self._connect(awkward)
            self._start_munge()
            self.controller_start()
            for name in names:
                self._start_node(name)
            wait_for("nodes", lambda: set(self.states().values()) == {"idle"})
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End everything, by process id; safe to repeat."""
        for name in self.nodes:
            self._kill_node(name)
        for key in ("slurmctld", "munged"):
            for number in (signal.SIGTERM, signal.SIGKILL):
                if pid := self._alive(key):
                    os.kill(pid, number)
                    with contextlib.suppress(TimeoutError):
                        wait_for(key, lambda key=key: not self._alive(key), 5)  # type: ignore[misc]
        if self._state:
            self._switch.down()
        self._state = {}
        self._file.unlink(missing_ok=True)
        for name in ("munge", "ctl", "spool"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    # --- what happens to a cluster

    def crash(self, node: str) -> None:
        """Power loss: nothing answers any more, and nothing is closed."""
        self._switch.plug(node, on=False)
        self._kill_node(node)

    def boot(self, node: str) -> None:
        self._switch.plug(node, on=True)
        if not self._alive(node):
            self._start_node(node)
        wait_for(f"{node} usable", lambda: self.states()[node] in ("idle", "mix", "alloc"))

    def cut(self, node: str) -> None:
        """Off the network; its processes live, and see the disk."""
        self._switch.plug(node, on=False)

    def heal(self, node: str) -> None:
        self._switch.plug(node, on=True)  # resume: else it would stay down for minutes
        self.slurm("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def controller_kill(self) -> None:
        if pid := self._alive("slurmctld"):
            os.kill(pid, signal.SIGKILL)

    def controller_start(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D", "-f", self.folder / "slurm.conf")
        wait_for("slurmctld", lambda: "UP" in self.slurm("scontrol", "ping", check=False))

    # --- what a user sees of it

    def slurm(self, *argv: object, check: bool = True) -> str:
        """A command of Slurm's; its output."""
        return run(*argv, check=check, env=self.env).stdout

    def states(self) -> dict[str, str]:
        answer = self.slurm("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t", check=False)
        return dict(line.split() for line in answer.splitlines())

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        answer = self.slurm("scontrol", "show", "job", "-o", number, check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", answer))

    def find(self, node: str, pattern: str) -> list[int]:
        """Processes of a node by their command line."""
        pid = self._alive(node)
        return matching(below(pid), pattern) if pid else []

    # --- how it is made

    def _configure(self, cpus: Sequence[int], memory: int) -> None:
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.geteuid()).pw_name
        controller, port = free_ports(2)
        lines = SETTINGS.format(folder=self.folder, munge=self.munge).strip().splitlines()
        lines += [f"SlurmctldHost={host}({self._state['prefix']}.1)", f"SlurmctldPort={controller}"]
        lines += [f"SlurmUser={user}", f"SlurmdUser={user}"]
        for i, (node, address) in enumerate(self.nodes.items()):
            size = f"Port={port} CPUs={cpus[min(i, len(cpus) - 1)]} RealMemory={memory}"
            lines.append(f"NodeName={node} NodeAddr={address} {size}")
        every = ",".join(self.nodes)
        lines += [f"PartitionName=main Nodes={every} Default=YES PriorityTier=1 GraceTime=30"]
        lines += [f"PartitionName=high Nodes={every} PriorityTier=10 PreemptMode=OFF"]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        # Neither of these plug-ins needs systemd, or a mount.
        major, minor = re.findall(r"\d+", run("slurmctld", "-V").stdout)[:2]
        plugin = "disabled" if (int(major), int(minor)) >= (24, 5) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _start_munge(self) -> None:
        key, socket_file = self.munge / "key", self.munge / "sock"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        places = {"socket": socket_file, "key-file": key, "pid-file": self.munge / "pid"}
        places |= {"log-file": self.munge / "log", "seed-file": self.munge / "seed"}
        self._spawn("munged", "munged", "-F", "--force", *(f"--{k}={v}" for k, v in places.items()))
        ask = ("munge", "-n", "-S", socket_file)
        wait_for("munged", lambda: run(*ask, check=False).returncode == 0)

    def _connect(self, awkward: bool) -> None:
        self._switch.up(decoy=awkward)
        prefix = self._state["prefix"]
        hosts = ["127.0.0.1 localhost", f"{prefix}.1 {socket.gethostname()}"]
        hosts += [f"{address} {name}" for name, address in self.nodes.items()]
        for name in self.nodes:
            others = [line for line in hosts if not line.endswith(f" {name}")]
            told = [*others, f"127.0.1.1 {name}"] if awkward else hosts
            (self.folder / f"hosts-{name}").write_text("\n".join(told) + "\n")

    def _start_node(self, node: str) -> None:
        enter = self._switch.inside(node)
        apart = ("unshare", "-m", "-u", "-p", "-f", "--kill-child=KILL", "--mount-proc")
        program = (sys.executable, Path(__file__).with_name("node.py"), self.folder, node)
        self._spawn(node, *enter, *apart, "--propagation=private", *program)

    def _kill_node(self, node: str) -> None:
        """Its PID 1 goes with unshare, and takes all with it."""
        pid = self._alive(node)
        if pid is None:
            return
        everything = below(pid)
        send([pid])
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        wait_for(f"{node} down", lambda: not any(map(facts, everything)), every=0.05)

    @property
    def _switch(self) -> Switch:
        return Switch(f"sl{self._state['id']}", self._state["prefix"], self.nodes)

    def _spawn(self, key: str, *argv: object) -> None:
        words = ["setpriv", "--pdeathsig", "KILL"] if self._bound else []
        with open(self.folder / "log" / f"{key}.out", "ab") as log:
            process = subprocess.Popen(
                [*words, *map(str, argv)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.env,
                cwd="/",
            )
        known = facts(process.pid)
        self._state["pids"][key] = [process.pid, known[1] if known else ""]
        self._file.write_text(json.dumps(self._state))

    def _alive(self, key: str) -> int | None:
        pid, since = self._state.get("pids", {}).get(key, (0, ""))
        known = facts(pid) if pid else None
        return pid if known and known[1] == since else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("up", "down", "crash", "boot", "cut", "heal"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("node", nargs="?")
    parser.add_argument("-n", "--nodes", type=int, default=2)
    arguments = parser.parse_args()
    cluster = Cluster(arguments.folder)
    if arguments.verb == "up":
        began = time.monotonic()
        cluster.up(arguments.nodes)
        print(f"# up in {time.monotonic() - began:.1f} s")
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
    elif arguments.verb == "down":
        cluster.down()
    else:
        getattr(cluster, arguments.verb)(arguments.node)


if __name__ == "__main__":
    main()
