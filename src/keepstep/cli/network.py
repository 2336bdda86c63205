"""Where machines reach each other: each answers with its id, at a port of its own.

A host name may not be resolved, or to 127.0.1.1; an address may be one that every machine has
(a bridge of containers). So all of a machine's addresses are tried, and the answer is looked at.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil

from keepstep.policy.machines import Machine

SECONDS = 2.0  # for an answer
AT_ONCE = 16
PORTS = range(10000, 30000)  # below those that the kernel gives out to whoever connects


class Answerer:
    """Tells whoever connects which machine this is.

    Attributes:
        port: where.
    """

    def __init__(self, name: str) -> None:
        self._name, self._over = name.encode(), False
        self._socket = socket.create_server(("", 0), backlog=64)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True, name="keepstep-answers").start()

    def close(self) -> None:
        """Safe to repeat."""
        if self._over:
            return
        self._over = True
        self._socket.shutdown(socket.SHUT_RDWR)  # or the thread would wait on
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._over:
                    return
                continue  # who has asked is gone
            with connection:
                try:
                    connection.settimeout(SECONDS)
                    connection.sendall(self._name)
                except OSError:
                    pass


def answers(address: str, port: int, name: str) -> bool:
    """Whether the machine of this id answers there."""
    try:
        with socket.create_connection((address, port), SECONDS) as connection:
            connection.settimeout(SECONDS)
            heard = b""
            while len(heard) < len(name) and (more := connection.recv(len(name) - len(heard))):
                heard += more
    except OSError:
        return False
    return heard == name.encode()


def reached(others: list[Machine], pool: ThreadPoolExecutor) -> dict[str, tuple[str, ...]]:
    """Which other machines answer, and at which of their addresses."""
    asked = [(one, address) for one in others for address in one.addresses]
    heard = list(pool.map(lambda ask: answers(ask[1], ask[0].port, ask[0].id), asked))
    found: dict[str, tuple[str, ...]] = {}
    for (one, address), is_there in zip(asked, heard, strict=True):
        if is_there:
            found[one.id] = (*found.get(one.id, ()), address)
    return found


def own_addresses() -> tuple[str, ...]:
    """The IPv4 addresses of this machine at which others could reach it."""
    return tuple(address for address, _ in _addresses())


def interface_towards(address: str) -> str | None:
    """The network interface that has this address, or that leads to it; nothing is sent."""
    has = dict(_addresses())
    if address in has:
        return has[address]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return has.get(probe.getsockname()[0])
    except OSError:
        return None


def _addresses() -> list[tuple[str, str]]:
    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    found = []
    for interface, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and interface in up:
                address = ipaddress.ip_address(one.address)
                if not (address.is_loopback or address.is_link_local or address.is_unspecified):
                    found.append((one.address, interface))
    return found


def free_port() -> int:
    """One that nobody uses here now, another one each time: no straggler joins an attempt."""
    while True:
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
