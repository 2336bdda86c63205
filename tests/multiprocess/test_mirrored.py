"""The machine is lost with its disk: the same command carries on from the mirror."""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv
from tests.mirror.server import BUCKET, S3Server


@pytest.fixture
def s3() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


def is_away(run: Path) -> None:
    """The disk is gone, with all that was on it."""
    while run.exists():
        shutil.rmtree(run, ignore_errors=True)


@pytest.mark.parametrize(
    ("strategy", "processes", "kind"),
    cases(
        [("cpu_zero3", 2, "s3"), ("ddp", 1, "file"), ("cpu_zero2", 2, "file")],
        long=[("ddp", 1, "file"), ("cpu_zero2", 2, "file")],
    ),
)
def test_lost_with_its_disk(
    ranks: Ranks,
    demo: Path,
    tmp_path: Path,
    s3: S3Server,
    strategy: str,
    processes: int,
    kind: str,
) -> None:
    """Bit for bit; the run is the same one, and what is kept there is what is kept here."""
    how: dict[str, Any] = {"strategy": strategy, "processes": processes}
    mirror = f"s3://{BUCKET}/runs" if kind == "s3" else (tmp_path / "mirror").as_uri()
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    fields = {"max_steps": 40, "save_total_limit": 2, "keep_ranking": "recency"}
    ranks.run(argv(demo, straight, **fields), **how)
    command = argv(demo, broken, mirror=mirror, **fields)
    run = ranks.start(command, env=s3.environment(), **how)
    run.wait_for("mirrored checkpoint-")
    run.kill(signal.SIGKILL)
    run.wait()
    first = RunFolder(broken).run_id()
    is_away(broken)
    again = ranks.run(command, env=s3.environment(), **how)
    assert re.search(r"mirror: checkpoint-\d+ brought from ", again.output)
    assert "carrying on from checkpoint-" in again.output
    assert final_digests(broken, 40) == final_digests(straight, 40)
    assert RunFolder(broken).run_id() == first
    assert [a.number for a in RunFolder(broken).attempts()] == [1, 2]
    told = CliRunner().invoke(app, ["ls", str(broken)]).stdout
    assert "valid, mirrored" in told
    is_away(broken)
    once_more = ranks.run(command, env=s3.environment(), **how)
    assert "there is nothing to train" in once_more.output
    assert final_digests(broken, 40) == final_digests(straight, 40)
    if kind == "s3":
        there = {name.split("/")[2] for name in s3.names("runs/broken/checkpoint-")}
        assert there >= {"checkpoint-40"}
        assert len(there) <= 2


@pytest.mark.long
def test_lost_at_random_moments(ranks: Ranks, demo: Path, tmp_path: Path, s3: S3Server) -> None:
    """Again and again, on one process and on two: never the beginning once something is there, and
    never behind what was on the mirror."""
    chance, run_folder = random.Random(20), tmp_path / "run"
    fields: dict[str, Any] = {"max_steps": 400, "save_steps": 3, "eval_steps": 50}
    fields |= {"mirror": f"s3://{BUCKET}/runs", "keep_ranking": "recency", "save_total_limit": 2}
    newest = 0
    for _ in range(30):
        processes = chance.choice([1, 2])
        run = ranks.start(
            argv(demo, run_folder, **fields),
            env=s3.environment(),
            strategy="cpu_zero3",
            processes=processes,
        )
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


def test_two_machines_on_one_mirror(ranks: Ranks, demo: Path, tmp_path: Path, s3: S3Server) -> None:
    """The newest has it; the other ends at its next copy, and leaves nothing there."""
    how: dict[str, Any] = {"strategy": "ddp", "processes": 1, "env": s3.environment()}
    fields: dict[str, Any] = {"mirror": f"s3://{BUCKET}/runs", "max_steps": 2000}
    first = ranks.start(argv(demo, tmp_path / "one/run", **fields), **how)
    first.wait_for("mirrored checkpoint-4")
    second = ranks.start(argv(demo, tmp_path / "two/run", **fields), **how)
    second.wait_for("carrying on from checkpoint-")
    assert first.wait(60) == [70]
    assert "the run belongs to another machine there" in first.output
    second.wait_for("mirrored checkpoint-")
    second.kill(signal.SIGTERM)
    assert second.wait(60) == [75]
    owners = {name.split("/")[3].split("-")[0] for name in s3.names("runs/run/checkpoint-")}
    assert "000002" in owners
