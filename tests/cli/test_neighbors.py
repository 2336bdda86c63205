"""Machines find each other by the run folder, and by an answer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keepstep.cli import network
from keepstep.cli.neighbors import Neighbors
from keepstep.policy.machines import Machine, Part, Plan
from keepstep.run_folder.by_hand import AtWorkError
from keepstep.run_folder.machines import PLAN, MachinesFolder
from keepstep.run_folder.ownership import OURS, Owner
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import NotOwnerError, Storage
from tests.helpers.waiting import wait_for


@pytest.fixture
def folder(tmp_path: Path) -> MachinesFolder:
    made = MachinesFolder(RunFolder(tmp_path))
    made.make()
    return made


@pytest.fixture
def two(folder: MachinesFolder) -> Iterator[tuple[Neighbors, Neighbors]]:
    pair = Neighbors(folder, 2, 3), Neighbors(folder, 4, 3)
    for one in pair:
        one.start()
    yield pair
    for one in pair:
        one.stop()


def test_an_answer() -> None:
    answerer = network.Answerer("one-1234")
    assert network.answers("127.0.0.1", answerer.port, "one-1234")
    assert not network.answers("127.0.0.1", answerer.port, "two-1234")
    asked = [Machine("one-1234", "one", 1, ("127.0.0.1", "127.0.0.2"), answerer.port)]
    asked.append(Machine("two-1234", "two", 1, ("127.0.0.1",), answerer.port))
    with ThreadPoolExecutor(2) as pool:
        assert network.reached(asked, pool) == {"one-1234": ("127.0.0.1", "127.0.0.2")}
    answerer.close()
    assert not network.answers("127.0.0.1", answerer.port, "one-1234")


def test_addresses_that_others_could_reach() -> None:
    for address in network.own_addresses():
        assert not address.startswith("127.")
        assert network.interface_towards(address)
    assert network.free_port() in network.PORTS


def test_they_see_each_other(folder: MachinesFolder, two: tuple[Neighbors, Neighbors]) -> None:
    one, other = two
    wait_for(lambda: other.me in one.alive() and one.me in other.alive())
    if network.own_addresses():
        wait_for(lambda: other.me in one.alive()[one.me].reaches)
    assert one.known()[other.me].processes == 4
    other.tell(leaves=True, part=Part(1, "failed", "why", 70, True))
    wait_for(lambda: one.known()[other.me].leaves)
    other.stop()
    wait_for(lambda: other.me not in one.alive())
    assert one.known()[other.me].part == Part(1, "failed", "why", 70, True)


def test_who_gives_no_sign_is_gone(
    folder: MachinesFolder, two: tuple[Neighbors, Neighbors]
) -> None:
    one, other = two
    wait_for(lambda: other.me in one.alive())
    other._over.set()  # as if it were killed
    wait_for(lambda: other.me not in one.alive())
    assert other.me in one.known()


def test_one_plan_after_the_other(folder: MachinesFolder, tmp_path: Path) -> None:
    """Of two that are written at once one counts; its attempt has the run."""
    run, first = RunFolder(tmp_path), Plan(1, f"{OURS}1", ("a",))
    assert folder.plan() == Plan()
    assert folder.agree(first, Plan())
    assert not folder.agree(Plan(1, f"{OURS}2", ("b",)), Plan())
    assert folder.plan() == first
    Owner(run, first.token).check()
    second = Plan(2, f"{OURS}3", ("b",))
    assert folder.agree(second, first)
    with pytest.raises(NotOwnerError):
        Owner(run, first.token).check()
    (folder.path / PLAN).write_text("damaged")
    assert folder.agree(Plan(3, end=75), second)
    assert run.owner() == second.token


def test_another_command_has_the_run(folder: MachinesFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    Storage().write(run.owner_file, b"12.0.1\n")
    Storage().show(run.heartbeat, "12.0.1 1\n")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(folder.agree, Plan(1, f"{OURS}1", ("a",)), Plan())
        for beat in itertools.count(2):
            Storage().show(run.heartbeat, f"12.0.1 {beat}\n")
            time.sleep(0.1)
            if asked.done():
                break
        with pytest.raises(AtWorkError, match="is being trained by job 12"):
            asked.result()


def test_files_that_nobody_has_written(folder: MachinesFolder) -> None:
    (folder.path / "one-12345678").write_text("{}")
    (folder.path / "two-12345678").mkdir()
    (folder.path / "three").write_text("x")
    assert folder.signs() == {}
