"""What grows with the number of ranks: for each of them nothing, for the main process what each
rank has written. Counted, with the real code; benchmarks/many_ranks.py takes the time, too."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.completeness import part_of
from keepstep.policy.manifest import FileEntry
from keepstep.policy.selection import SelectionError
from keepstep.ranks import collectives
from keepstep.run_folder.storage import EMPTIED_AT_ONCE, Storage
from keepstep.run_folder.writer import Saved
from keepstep.save.failure import SHOWN, Cause, SaveError
from keepstep.save.in_flight import POLL_SECONDS, Flight
from keepstep.save.manager import CheckpointManager
from keepstep.save.rank_part import Part, Report
from keepstep.save.resume_checks import check_sight
from tests.helpers.counted import Requests
from tests.helpers.folders import manifest
from tests.helpers.many import begin, save
from tests.helpers.waiting import PATIENCE
from tests.helpers.world import World

RANKS = (4, 8, 12)
PER_RANK = {  # requests of the main process for each rank more: three files, and a report
    "save": {"look": 4, "open": 1, "read": 1, "remove": 4},
    "resume": {"look": 3, "open": 3, "read": 3},
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Counter[str]]]]:
    """Save or resume → for each number of ranks the requests of the main process and of the last
    rank. (Of the third save: it removes the checkpoint before it.)"""
    found: dict[str, list[list[Counter[str]]]] = {"save": [], "resume": []}
    for ranks in RANKS:
        run, world = tmp_path_factory.mktemp("run"), World(ranks)
        requests = Requests(lambda: world.rank)  # noqa: B023
        with requests.counted():
            managers = begin(world, run)
            for step in (1, 2, 3):
                requests.forget()
                world.run(lambda rank: save(managers[rank], step))  # noqa: B023
            found["save"].append([requests.of(0), requests.of(ranks - 1)])
            requests.forget()
            managers = begin(world, run)
            found["resume"].append([requests.of(0), requests.of(ranks - 1)])
        assert [manager.chosen.step for manager in managers if manager.chosen] == [3] * ranks
    return found


@pytest.mark.parametrize("phase", ["save", "resume"])
def test_a_rank_asks_the_disk_for_no_more(
    counts: dict[str, list[list[Counter[str]]]], phase: str
) -> None:
    few, *more = (last for _, last in counts[phase])
    assert few.total() < 250
    assert more == [few, few]


@pytest.mark.parametrize("phase", ["save", "resume"])
def test_the_main_process_asks_for_a_few_things_of_each_rank(
    counts: dict[str, list[list[Counter[str]]]], phase: str
) -> None:
    few, some, many = (main for main, _ in counts[phase])
    more = RANKS[1] - RANKS[0]
    grown = {kind: some[kind] - few[kind] for kind in some if some[kind] != few[kind]}
    assert grown == {kind: n * more for kind, n in PER_RANK[phase].items()}
    assert {kind: many[kind] - some[kind] for kind in grown} == grown


def test_a_report_is_read_once_however_late_the_others_come(tmp_path: Path) -> None:
    """The folder is listed again, more rarely as time goes by; what was read is not read again."""
    staged, reports, taken = tmp_path / "staged", tmp_path / "reports", []
    staged.mkdir()
    reports.mkdir()
    requests = Requests(lambda: threading.current_thread().name)
    flight = Flight(1, Part(staged, 0, Storage()), reports, Storage(), PATIENCE)

    def commit(ranks: list[Report]) -> Saved:
        taken.extend(report.rank for report in ranks)
        raise LookupError("that is all")

    began = time.monotonic()
    with requests.counted():
        flight.begin(40, commit, background=True)
        for rank in range(1, 40):
            content = json.dumps(Report(rank).as_json()).encode()
            Storage().replace(reports / f"{rank}.json", content)
            if rank % 13 == 0:
                time.sleep(0.2)
        flight.wait()
    assert taken == list(range(40))
    asked = requests.of("keepstep-writer")
    assert asked["read"] == 40
    # From a pause of 0.01 s to the longest it is ten times.
    assert asked["list"] < 13 + (time.monotonic() - began) / POLL_SECONDS[1]


def test_what_a_rank_is_told_grows_by_the_files_names(tmp_path: Path) -> None:
    """The best checkpoint is mostly the newest: it is told once."""
    told = []
    for ranks in (8, 16):
        world = World(ranks)
        managers = begin(world, tmp_path / str(ranks))
        world.received.clear()
        world.run(lambda rank: save(managers[rank], 1))  # noqa: B023
        told.append(world.received[ranks - 1])
    assert told[1] - told[0] < 8 * 3 * 130  # three files a rank; that of a collective's flags


def test_an_entry_goes_over_the_wire_as_what_it_is() -> None:
    entry = FileEntry(7, 123456, "0123456789abcdef" * 2)
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_where_a_folder_is_emptied_the_owner_is_looked_up_now_and_then(tmp_path: Path) -> None:
    looks, operations = [], []
    storage = Storage(lambda operation, path: operations.append(operation))
    storage.guard(lambda: looks.append(1))
    for number in range(1000):
        folder = tmp_path / "aside" / ("shards" if number % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.pt").touch()
    storage.remove(tmp_path / "aside", aside=True)
    assert not (tmp_path / "aside").exists()
    assert Counter(operations) == {"remove": 1000, "remove_folder": 2}  # for the crash sweep: all
    assert len(looks) <= 1000 / EMPTIED_AT_ONCE + 4


def test_whoever_loses_the_run_stops_emptying(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number}.pt").touch()
    left = iter(range(2))
    storage = Storage()

    def check() -> None:
        if next(left, None) is None:
            raise LookupError("the run is another's")

    storage.guard(check)
    with pytest.raises(LookupError):
        storage.remove(tmp_path, aside=True)
    assert len(list(tmp_path.iterdir())) == 1000 - 2 * EMPTIED_AT_ONCE


def test_what_cannot_be_removed_keeps_nothing_else(tmp_path: Path) -> None:
    """In whichever thread it was tried, the first error is told."""
    stuck = [tmp_path / f"{number}.pt" for number in (7, 300, 999)]

    def before(operation: str, path: Path) -> None:
        if path in stuck[1:]:
            raise OSError(5, "Input/output error", str(path))

    for number in range(1000):
        (tmp_path / f"{number}.pt").touch()
    stuck[0].unlink()
    stuck[0].mkdir()  # (as root all else can be removed)
    (stuck[0] / "x").mkdir()
    storage = Storage(before)
    with pytest.raises(OSError, match=r"300\.pt") as caught:
        storage.remove(tmp_path, aside=True)
    assert caught.value.errno == 5
    assert sorted(tmp_path.iterdir()) == sorted(stuck[1:])


def test_files_are_removed_where_no_thread_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "aside").mkdir()
    for number in range(100):
        (tmp_path / "aside" / f"{number}.pt").touch()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    Storage().remove(tmp_path / "aside", aside=True)
    assert not list(tmp_path.iterdir())


@given(written=st.integers(1, 40), ranks=st.integers(1, 40))
def test_every_file_is_looked_at_by_a_rank_that_loads_it(written: int, ranks: int) -> None:
    files = {f"shard_{r}": FileEntry(r, 1, "0" * 32) for r in range(written)}
    checkpoint = manifest(1, world_size=written, files=files)
    parts = [part_of(checkpoint, rank, ranks) for rank in range(ranks)]
    assert {name for part in parts for name in part} == files.keys()
    assert all("shard_0" in part for part in parts)
    most = -(-written // ranks) + 2  # the main process's, and one that is cut in two
    assert max(map(len, parts)) <= most
    if written == ranks:
        assert [set(part) for part in parts] == [{"shard_0", f"shard_{r}"} for r in range(ranks)]


def test_a_rank_that_sees_another_disk_stops_all(tmp_path: Path) -> None:
    world = World(4)
    managers = begin(world, tmp_path / "run")
    world.run(lambda rank: save(managers[rank], 1))
    chosen = managers[0].run.checkpoint(1)
    elsewhere = shutil.copytree(chosen.path, tmp_path / "elsewhere" / chosen.path.name)

    def look(rank: int) -> None:
        seen = replace(chosen, path=elsewhere) if rank == 2 else chosen
        collectives.on_all("looking", lambda: check_sight(seen, "sizes"))

    world.run(look)
    (elsewhere / "rng_state_1.pth").unlink()  # which rank 2 does not load
    world.run(look)
    (elsewhere / "rng_state_2.pth").unlink()
    with pytest.raises(SelectionError, match=r"rank 2: .*all nodes share.*rng_state_2.pth is miss"):
        world.run(look)
    shutil.rmtree(elsewhere)
    with pytest.raises(SelectionError, match="rank 2: the checkpoint is not the same"):
        world.run(look)


def test_where_all_ranks_fail_the_first_few_are_told() -> None:
    causes = [Cause(rank, "No space left on device", errno=28) for rank in range(4096)]
    error = SaveError("checkpoint-5 was not saved", causes, 5)
    assert str(error).count("No space left") == SHOWN
    assert str(error).endswith("; and 4,088 more")
    assert len(error.ranks) == 4096
    assert error.disk_full


def test_a_manager_is_told_apart_from_its_neighbors(tmp_path: Path) -> None:
    """The stand-in for the wire brings each rank's own value, and ends all where one fails."""
    world = World(5)
    managers: list[CheckpointManager] = begin(world, tmp_path)

    def fail(rank: int) -> None:
        if rank == 3:
            raise OSError("this rank's alone")
        managers[rank].confirm()

    with pytest.raises(OSError, match="this rank's alone"):
        world.run(fail)
