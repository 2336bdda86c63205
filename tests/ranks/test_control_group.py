"""The group that decisions go over: where it lies in the network, how long it waits, its life."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from keepstep.errors import KeepstepError
from keepstep.ranks import collectives, control_group
from keepstep.ranks.control_group import interface_towards

WAIT = timedelta(seconds=77)


@pytest.fixture
def grouped() -> Iterator[None]:
    """This process is the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=WAIT)
    yield
    collectives.leave()


def of_this_machine() -> list[tuple[str, str]]:
    """Its interfaces with their IPv4 addresses, those that only it reaches left out."""
    found = ((n, a.address) for n, has in psutil.net_if_addrs().items() for a in has)
    return [(n, a) for n, a in found if a.count(".") == 3 and not a.startswith("127.")]


def test_the_interface_is_the_one_that_leads_to_the_main_process() -> None:
    assert of_this_machine(), "a machine without a network"
    for name, address in of_this_machine():
        assert interface_towards(address) == name


@pytest.mark.parametrize("address", ["", "127.0.0.1", "localhost", "::1", "host.invalid", "1.2.3"])
def test_what_leads_nowhere_else_names_none(address: str) -> None:
    """gloo then takes what this host's name resolves to, as ever."""
    assert interface_towards(address) in (None, *(name for name, _ in of_this_machine()))
    if address != "1.2.3":  # an old way to write 1.2.0.3
        assert interface_towards(address) is None


def test_on_one_machine_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, address), *_) = of_this_machine()
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert control_group._interface() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert control_group._interface() == interface_towards(address)


@pytest.mark.parametrize("named", ["", "ib0"])
def test_the_default_group_goes_there_too(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """What a person has named stays."""
    ((name, address), *_) = of_this_machine()
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv(control_group.INTERFACE, named)
    control_group.name_interface()
    assert os.environ[control_group.INTERFACE] == (named or name)


def test_the_main_process_s_own_machine_may_know_itself_as_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Debian writes 127.0.1.1 beside the host's name: the others do not reach it there."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert control_group._interface() == interface_towards(control_group.ANYWHERE)


@pytest.mark.usefixtures("grouped")
def test_it_waits_as_long_as_the_default_group() -> None:
    group = control_group.group()
    assert group is control_group.group() is not dist.group.WORLD
    assert group._get_backend(torch.device("cpu")).options._timeout == WAIT
    assert control_group.LAZILY not in os.environ


@pytest.mark.usefixtures("grouped")
def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(control_group.INTERFACE, "no-such0")
    with pytest.raises(KeepstepError, match=r"(?s)no-such0.*Hint: GLOO_SOCKET_IFNAME=NAME"):
        collectives.gather(1)
    assert os.environ[control_group.INTERFACE] == "no-such0", "as the person has set it"
    monkeypatch.delenv(control_group.INTERFACE)
    assert collectives.gather(1) == [1]


def test_another_default_group_has_another() -> None:
    """A notebook's cell, run again: what was made beside the group before is gone with that."""
    groups = []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        assert collectives.any_of(True, False) == [True, False]
        groups.append(control_group.group())
        dist.destroy_process_group()  # by whoever made it
    assert groups[0] is not groups[1]


@pytest.mark.usefixtures("grouped")
def test_nothing_goes_over_the_default_group() -> None:
    before = dist.group.WORLD._get_sequence_number_for_group()
    fetched = collectives.ask(False, True)
    assert fetched() == [False, True]
    assert collectives.gather_some(None) == {}
    assert collectives.gather_some("told") == {0: "told"}
    assert collectives.total(2.5) == 2.5
    assert collectives.on_main("counting", lambda: 3) == 3
    assert collectives.on_all("counting", lambda: 4) == 4
    assert dist.group.WORLD._get_sequence_number_for_group() == before
    assert collectives.count_entered() > before, "the watchdog counts them"
