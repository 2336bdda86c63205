"""Network namespaces for machines on one machine, joined by a switch: each with an address of its
own, and a plug that can be pulled. Root is needed, and iproute2.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable

from tests.slurm.helpers.processes import run


def obstacle(programs: Iterable[str]) -> str | None:
    """Why there can be no machines that are namespaces here; None: nothing is in the way."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "not root: machines are namespaces"
    name = f"probe{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("unshare", "-m", "-u", "-p", "-f", "--mount-proc", "true")
    except RuntimeError as error:
        return f"no namespaces: {error}"
    finally:
        run("ip", "netns", "del", name, check=False)
    return None


def any_prefix() -> str:
    """The first three numbers of addresses that are probably nobody's here."""
    return f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(255)}"


class Switch:
    """A bridge in a namespace of its own, where no firewall of the machine's reaches it.

    Args:
        mark: begins the names of the namespaces: a few letters.
        prefix: the first three numbers of all addresses.
        nodes: name → address.
    """

    def __init__(self, mark: str, prefix: str, nodes: dict[str, str]) -> None:
        self.mark, self._prefix, self._nodes = mark, prefix, nodes

    def namespace(self, node: str) -> str:
        return f"{self.mark}{node}"

    def inside(self, node: str) -> tuple[str, ...]:
        """What a command begins with that is to run in that node's network."""
        return "nsenter", f"--net=/run/netns/{self.namespace(node)}"

    def up(self, decoy: bool = False) -> None:
        """This machine has the address that ends with 1.

        Args:
            decoy: the first interface of each node leads to nobody.
        """
        switch, ours = self.namespace("sw"), self.mark
        run("ip", "netns", "add", switch)
        run(*f"ip -n {switch} link add br0 up type bridge forward_delay 0".split())
        run(*f"ip link add {ours} type veth peer name ctl netns {switch}".split())
        run(*f"ip -n {switch} link set ctl master br0 up".split())
        run(*f"ip addr add {self._prefix}.1/24 dev {ours}".split())
        run(*f"ip link set {ours} up".split())
        for name, address in self._nodes.items():
            inside = self.namespace(name)
            run("ip", "netns", "add", inside)
            run(*f"ip -n {inside} link set lo up".split())
            if decoy:
                own = f"10.99.0.{address.rpartition('.')[2]}/24"
                run(*f"ip -n {inside} link add aaa0 up type veth peer name aaa1".split())
                run(*f"ip -n {inside} link set aaa1 up".split())
                run(*f"ip -n {inside} addr add {own} dev aaa0".split())
            run(*f"ip -n {inside} link add eth0 type veth peer name {name} netns {switch}".split())
            run(*f"ip -n {switch} link set dev {name} master br0 up".split())
            run(*f"ip -n {inside} addr add {address}/24 dev eth0".split())
            run(*f"ip -n {inside} link set eth0 up".split())

    def plug(self, node: str, on: bool) -> None:
        """A disabled port of the bridge drops every frame, both ways, without a word."""
        state = "3" if on else "0"
        run("bridge", "-n", self.namespace("sw"), "link", "set", "dev", node, "state", state)
        for other in self._nodes if on else ():
            run("ip", "-n", self.namespace(other), "neigh", "flush", "dev", "eth0", check=False)

    def down(self) -> None:
        """Safe to repeat."""
        for name in (*self._nodes, "sw"):
            run("ip", "netns", "del", self.namespace(name), check=False)
        run("ip", "link", "del", self.mark, check=False)
