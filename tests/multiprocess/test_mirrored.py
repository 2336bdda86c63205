"""The machine is lost with its disk: the same command carries on from the mirror."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.manifest import MANIFEST_NAME
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv
from tests.hub.client import Client
from tests.hub.peer import HubPeer
from tests.hub.test_publish import environment
from tests.mirror.server import BUCKET, S3Server


@dataclass(frozen=True)
class Place:
    """Where runs are mirrored.

    Attributes:
        url: below which each has a folder.
        environment: of who may write there.
        names: of all objects there now.
        program: the main job, as it is run there.
    """

    url: str
    environment: dict[str, str]
    names: Callable[[], Iterable[str]]
    program: Path | None = None

    def checkpoints(self, run: str) -> set[str]:
        below = f"runs/{run}/checkpoint-"
        return {name.split("/")[2] for name in self.names() if name.startswith(below)}


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Of the kind that a test asks for."""
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        yield Place(f"s3://{BUCKET}/runs", s3.environment(), s3.names)
    elif request.param == "file":
        disk = tmp_path / "mirror"
        names = lambda: [str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file()]  # noqa: E731
        yield Place(f"{disk.as_uri()}/runs", {}, names)
    else:
        with HubPeer(tmp_path / "hub") as peer:
            bucket = peer.create_bucket("tester/bucket")
            theirs = environment(Client(peer, tmp_path / "user", "xet"))
            url, program = "hf://buckets/tester/bucket/runs", PROGRAMS / "of_the_hub.py"
            yield Place(url, theirs, lambda: bucket.files, program)


def is_away(run: Path) -> None:
    """The disk is gone, with all that was on it."""
    while run.exists():
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.parametrize(
    ("strategy", "processes", "place"),
    cases(
        [
            *[("cpu_zero3", 2, "s3"), ("ddp", 1, "file"), ("cpu_zero2", 2, "file")],
            *[("ddp", 1, "hf"), ("cpu_zero3", 2, "hf")],
        ],
        long=[("ddp", 1, "file"), ("cpu_zero2", 2, "file"), ("cpu_zero3", 2, "hf")],
    ),
    indirect=["place"],
)
def test_lost_with_its_disk(
    ranks: Ranks,
    demo: Path,
    tmp_path: Path,
    place: Place,
    strategy: str,
    processes: int,
) -> None:
    """Bit for bit; the run is the same one, and what is kept there is what is kept here."""
    how: dict[str, Any] = {"strategy": strategy, "processes": processes}
    there: dict[str, Any] = {"env": place.environment, "script": place.program}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    fields = {"max_steps": 40, "save_total_limit": 2, "keep_ranking": "recency"}
    ranks.run(argv(demo, straight, **fields), **there, **how)
    command = argv(demo, broken, mirror=place.url, **fields)
    run = ranks.killed(command, 10, "mirrored", env=place.environment, **how)
    assert "mirrored checkpoint-" in run.output
    first = RunFolder(broken).run_id()
    is_away(broken)
    again = ranks.run(command, **there, **how)
    assert re.search(r"mirror: checkpoint-\d+ brought from ", again.output)
    assert "carrying on from checkpoint-" in again.output
    assert final_digests(broken, 40) == final_digests(straight, 40)
    assert RunFolder(broken).run_id() == first
    assert [a.number for a in RunFolder(broken).attempts()] == [1, 2]
    told = CliRunner().invoke(app, ["ls", str(broken)]).stdout
    assert "valid, mirrored" in told
    is_away(broken)
    once_more = ranks.run(command, **there, **how)
    assert "there is nothing to train" in once_more.output
    assert final_digests(broken, 40) == final_digests(straight, 40)
    assert place.checkpoints("broken") >= {"checkpoint-40"}
    assert len(place.checkpoints("broken")) <= 2
    tokens = [value for name, value in place.environment.items() if "TOKEN" in name]
    for path in [p for p in (tmp_path / "broken").rglob("*") if p.is_file()]:
        assert not any(token.encode() in path.read_bytes() for token in tokens), path


def test_damaged_here_and_not_there(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """It is brought once more, where it is the only one, too."""
    how: dict[str, Any] = {"strategy": "ddp", "processes": 1}
    fields: dict[str, Any] = {"max_steps": 8, "save_total_limit": 1, "keep_ranking": "recency"}
    command = argv(demo, tmp_path / "run", mirror=(tmp_path / "mirror").as_uri(), **fields)
    ranks.run(command, **how)
    (last,) = RunFolder(tmp_path / "run").checkpoints()
    (last.path / "optimizer.pt").write_bytes(b"x" * last.manifest.files["optimizer.pt"].bytes)
    again = ranks.run(command, **how)
    assert "checkpoint-8 was damaged here, and is brought once more: optimizer.pt" in again.output
    assert last.faults(deep=True) == []
    for text in ("{", None):  # its manifest: the checkpoint is none, and its folder is in the way
        manifest = last.path / MANIFEST_NAME
        manifest.unlink() if text is None else manifest.write_text(text)
        again = ranks.run(command, **how)
        assert "mirror: checkpoint-8 brought from" in again.output
        assert last.faults(deep=True) == []


@pytest.mark.long
@pytest.mark.parametrize("same", [True, False])
def test_lost_at_random_moments(
    ranks: Ranks, demo: Path, tmp_path: Path, s3: S3Server, same: bool
) -> None:
    """Thirty times, always on two processes, or on one and on two: never the beginning once
    something is there, never behind what was on the mirror; and on as many processes the end is
    that of a run to which nothing has happened."""
    chance, run_folder = random.Random(20), tmp_path / "run"
    fields: dict[str, Any] = {"max_steps": 400, "save_steps": 3, "eval_steps": 50}
    fields |= {"keep_ranking": "recency", "save_total_limit": 2}
    command = argv(demo, run_folder, mirror=f"s3://{BUCKET}/runs", **fields)
    how: dict[str, Any] = {"env": s3.environment(), "strategy": "cpu_zero3"}
    newest = 0
    for _ in range(30):
        run = ranks.start(command, processes=2 if same else chance.choice([1, 2]), **how)
        if newest:
            brought = run.wait_for(r"carrying on from checkpoint-(\d+)")
            assert int(brought[1]) >= newest
        else:
            run.wait_for("mirrored checkpoint-")
        time.sleep(chance.uniform(0, 3))
        run.kill(signal.SIGKILL)
        run.wait()
        mirrored = re.findall(r"mirrored checkpoint-(\d+)", run.output)
        newest = max([newest, *map(int, mirrored)])
        is_away(run_folder)
    assert newest > 30
    if same:
        ranks.run(command, **how)
        straight = tmp_path / "straight"
        ranks.run(argv(demo, straight, **fields), strategy="cpu_zero3")
        assert final_digests(run_folder, 400) == final_digests(straight, 400)


def test_a_mirror_that_is_away(ranks: Ranks, demo: Path, tmp_path: Path, s3: S3Server) -> None:
    """With nothing on the disk, nothing begins anew; with something, the run goes on from it, and
    the mirror catches up; a wrong bucket is told before anything is trained."""
    how: dict[str, Any] = {"strategy": "ddp", "processes": 1}
    folder = tmp_path / "run"
    command = argv(demo, folder, mirror=f"s3://{BUCKET}/runs")
    s3.fault("status", status=403, times=-1)
    run = ranks.start(command, env=s3.environment(), **how)
    assert run.wait() == [2]
    assert "mirror: s3://bucket/runs/run: " in run.output
    s3.clear_faults()
    nowhere = argv(demo, folder, mirror="s3://nobodys/runs")
    run = ranks.start(nowhere, env=s3.environment(), **how)
    assert run.wait() == [2]
    assert "there is no such bucket, and none is made" in run.output
    ranks.run(argv(demo, folder, max_steps=4), **how)
    ranks.run(command, env=s3.environment(), **how)
    assert "checkpoint-12" in {n.split("/")[2] for n in s3.names("runs/run/checkpoint-")}


@pytest.mark.parametrize("place", cases(["s3", "hf"], long=["hf"]), indirect=True)
def test_two_machines_on_one_mirror(ranks: Ranks, demo: Path, tmp_path: Path, place: Place) -> None:
    """The newest has it; the other ends at its next copy, and leaves nothing there."""
    how: dict[str, Any] = {"strategy": "ddp", "processes": 1, "env": place.environment}
    how |= {"script": place.program}
    fields: dict[str, Any] = {"mirror": place.url, "max_steps": 20_000}
    first = ranks.start(argv(demo, tmp_path / "one/run", **fields), **how)
    first.wait_for("mirrored checkpoint-4")
    second = ranks.start(argv(demo, tmp_path / "two/run", **fields), **how)
    second.wait_for("carrying on from checkpoint-")
    assert first.wait() == [70]
    assert "the run belongs to another machine there" in first.output
    status = json.loads((tmp_path / "one/run/.keepstep/status.json").read_text())
    assert "the run belongs to another machine there" in status["reason"], "it was not killed"
    second.wait_for("mirrored checkpoint-")
    second.kill(signal.SIGTERM)
    assert second.wait() == [75]
    below = "runs/run/checkpoint-"
    owners = {n.split("/")[3].split("-")[0] for n in place.names() if n.startswith(below)}
    assert "000002" in owners
