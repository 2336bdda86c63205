"""Which ranks share a machine. The first of each acts for it, where a disk is a machine's own."""

from __future__ import annotations

import os
import socket
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from keepstep.errors import KeepstepError
from keepstep.ranks import collectives


class RanksApartError(KeepstepError, RuntimeError):
    """The ranks of a machine are not numbered one after the other."""


@dataclass(frozen=True)
class Nodes:
    """The machines of an attempt, in the order of their ranks.

    Attributes:
        firsts: of each machine its first rank.
        hosts: of each machine its name, with its number where another one (a pod) has the same.
    """

    firsts: tuple[int, ...]
    hosts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.firsts)

    def of(self, rank: int) -> int:
        """The number of the machine that a rank is on."""
        return bisect_right(self.firsts, rank) - 1

    @property
    def here(self) -> int:
        """The number of this machine. Ranks: any."""
        return self.of(collectives.rank())

    @property
    def host(self) -> str:
        """This machine's name. Ranks: any."""
        return self.hosts[self.here]

    @property
    def acts(self) -> bool:
        """Whether this rank acts for its machine. Ranks: any."""
        return collectives.rank() in self.firsts


def look() -> Nodes:
    """As the launcher has numbered them. Ranks: all (collective).

    Raises:
        RanksApartError: on every rank: a machine's ranks are not numbered one after the other.
    """
    places = collectives.gather((int(os.environ.get("LOCAL_RANK", "0")), socket.gethostname()))
    local = [number for number, _ in places]
    hosts = told_apart([host for number, host in places if number == 0])
    nodes = Nodes(tuple(rank for rank, number in enumerate(local) if number == 0), hosts)
    for rank, number in enumerate(local):
        if rank < nodes.firsts[0] or rank - nodes.firsts[nodes.of(rank)] != number:
            raise RanksApartError(f"rank {rank} is number {number} of its machine (LOCAL_RANK)")
    return nodes


def told_apart(hosts: Sequence[str]) -> tuple[str, ...]:
    """The names of machines, with the numbers of those that have the same one, as pods may."""
    return tuple(
        f"{host} (machine {number})" if hosts.count(host) > 1 else host
        for number, host in enumerate(hosts)
    )
