"""The group that the ranks' decisions go over: gloo, between processes, never a device.

Over NCCL a decision would be a tensor on the GPU, which the host reads once all work queued before
it is done: the GPU then has nothing queued, at every step. Connections are made when they are
first used: each rank talks to a few others, however many there are.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import torch.distributed as dist

from keepstep.errors import KeepstepError

INTERFACE = "GLOO_SOCKET_IFNAME"
LAZILY = "TORCH_GLOO_LAZY_INIT"  # torch 2.11 to 2.14: else every rank connects to every other
ANY_PORT = 9  # nothing is sent there
ANYWHERE = "192.0.2.1"  # documentation's own address (RFC 5737): where the default route leads

_made: tuple[Any, Any] | None = None  # the default group, and what was made beside it


def group() -> Any:
    """keepstep's own process group, of all ranks. Where it has to wait, it waits as long as the
    default group does (`ddp_timeout`).

    Ranks: all (collective) at the first call in a default group; any later.

    Raises:
        KeepstepError: it cannot be made; the message says of which network interface.
    """
    global _made
    world: Any = dist.group.WORLD
    if _made is None or _made[0] is not world:
        _made = world, _make(world)
    return _made[1]


def name_interface() -> None:
    """Before there is a default group: on several machines let gloo know where the others are, as a
    run on CPU goes over it. What is set stays. Ranks: any; each for itself."""
    if not os.environ.get(INTERFACE) and (found := _interface()):
        os.environ[INTERFACE] = found


def forget() -> None:
    """The default group is about to be destroyed, and with it this one. Ranks: any."""
    global _made
    _made = None


def _make(world: Any) -> Any:
    timeout = world._get_backend(world._device_types[0]).options._timeout
    interface = os.environ.get(INTERFACE) or _interface()
    try:
        with _set_for_now(INTERFACE, interface), _set_for_now(LAZILY, "1"):
            return dist.new_group(backend="gloo", timeout=timeout, group_desc="keepstep")
    except RuntimeError as error:
        raise KeepstepError(
            f"the ranks cannot be connected over the network "
            f"(gloo, {interface or 'the interface of this host name'}): {error}\n"
            f"    Hint: {INTERFACE}=NAME names the interface on which the nodes reach each other"
        ) from error


def _interface() -> str | None:
    """The interface on which the other machines reach this one; None: there are none, or gloo may
    take the address that this host's name resolves to. (On Debian that is 127.0.1.1.)"""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        return None
    towards = (os.environ.get("MASTER_ADDR", ""), ANYWHERE)
    return next((found for found in map(interface_towards, towards) if found), None)


def interface_towards(address: str) -> str | None:
    """The network interface that leads to this host; None: this machine itself, or not known.
    Nothing is sent."""
    if not address:
        return None
    try:
        ((family, kind, _, _, end), *_) = socket.getaddrinfo(
            address, ANY_PORT, type=socket.SOCK_DGRAM
        )
        with socket.socket(family, kind) as probe:
            probe.connect(end)
            own = probe.getsockname()[0]
    except OSError:  # gloo will say what is wrong with the network, if anything is
        return None
    if own.startswith("127.") or own == "::1":
        return None
    interfaces = psutil.net_if_addrs()
    return next((n for n, has in interfaces.items() if own in {a.address for a in has}), None)


@contextlib.contextmanager
def _set_for_now(name: str, value: str | None) -> Iterator[None]:
    """An environment variable that libraries read in this block alone."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
