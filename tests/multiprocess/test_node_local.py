"""A run folder on each machine's own disk: a machine is lost with it, and the run carries on."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.manifest import MANIFEST_NAME, WHOLE_NAME, Manifest
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.place import read_place
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv
from tests.mirror.server import BUCKET, S3Server

STOPPED = PROGRAMS / "stopped.py"


def obstacle() -> str | None:
    """Why no process here can have a mount of its own; None: it can."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ctypes.CDLL(None).unshare(0x20000) == 0 else 1)
    return "no mounts of one's own: not root" if os.waitpid(pid, 0)[1] else None


pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """The disks of machines, and where each sees its own."""
    for name in ("0", "1", "2", "3", "here"):
        (tmp_path / f"disks/{name}").mkdir(parents=True)
    return tmp_path / "disks"


def names(run: Path, step: int) -> set[str]:
    """The files of a checkpoint on one machine's disk."""
    folder = run / f"checkpoint-{step}"
    return {path.name for path in folder.rglob("*") if path.is_file()}


def damage(file: Path) -> None:
    """One bit in the middle is another."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def is_gathered(name: str, strategy: str) -> bool:
    """Whether this file is laid out by `save_pretrained`: the main process has gathered it."""
    return strategy == "cpu_zero3" and name in ("model.safetensors", "weights_layout.json")


def whole_digests(run: Path, step: int, strategy: str) -> dict[str, str]:
    """As `final_digests`, of all machines' parts."""
    folder = run / f"checkpoint-{step}"
    whole = folder / WHOLE_NAME
    text = (whole if whole.exists() else folder / MANIFEST_NAME).read_text()
    files = Manifest.from_json(text).files
    del files["trainer_state.json"]
    return {n: e.xxh3_128 for n, e in files.items() if not is_gathered(n, strategy)}


@pytest.mark.parametrize(
    ("strategy", "lost"),
    cases(
        [("cpu_zero3", 1), ("cpu_zero2", 0), ("ddp", 1), ("cpu_zero3", 0), ("cpu_zero2", 1)],
        long=[("cpu_zero2", 0), ("ddp", 1), ("cpu_zero3", 0), ("cpu_zero2", 1)],
    ),
)
def test_a_machine_is_lost_with_its_disk(
    ranks: Ranks, demo: Path, tmp_path: Path, s3: S3Server, disks: Path, strategy: str, lost: int
) -> None:
    """Bit for bit, whichever it is; each had its part alone."""
    straight = tmp_path / "straight"
    fields: dict[str, Any] = {"max_steps": 40, "save_total_limit": 2, "keep_ranking": "recency"}
    ranks.run(argv(demo, straight, **fields), strategy=strategy)
    how: dict[str, Any] = {"strategy": strategy, "nodes": 2, "disks": disks}
    how |= {"env": s3.environment()}
    mirror = {"mirror": f"s3://{BUCKET}/runs", "node_local": True}
    command = argv(demo, disks / "here/run", **fields, **mirror)
    run = ranks.killed(command, 10, "mirrored", **how)
    assert "mirrored checkpoint-" in run.output
    step = RunFolder(disks / "0/run").checkpoints()[-1].step
    parts = [names(disks / f"{node}/run", step) for node in (0, 1)]
    assert "rng_state_0.pth" in parts[0] - parts[1]
    assert "rng_state_1.pth" in parts[1] - parts[0]
    shutil.rmtree(disks / str(lost))
    (disks / str(lost)).mkdir()
    again = ranks.run(command, **how)
    assert re.search(r"carrying on from checkpoint-\d+", again.output)
    assert whole_digests(disks / "0/run", 40, strategy) == {
        name: digest
        for name, digest in final_digests(straight, 40).items()
        if not is_gathered(name, strategy)
    }
    assert len(RunFolder(disks / "1/run").checkpoints()) <= 2
    there = {name.split("/")[2] for name in s3.names("runs/run/checkpoint-")}
    assert "checkpoint-40" in there
    assert len(there) <= 2
    once_more = ranks.run(command, **how)
    assert "there is nothing to train" in once_more.output


@pytest.mark.parametrize(
    ("strategy", "lost"),
    cases([("cpu_zero3", 0), ("cpu_zero3", 1), ("ddp", 0)], long=[("cpu_zero3", 1), ("ddp", 0)]),
)
def test_a_machine_is_lost_with_the_best(
    ranks: Ranks, demo: Path, tmp_path: Path, disks: Path, strategy: str, lost: int
) -> None:
    """It is not the newest, and the run ends with it all the same, whole where the main process is
    though its own disk was lost."""
    mirror = {"mirror": (tmp_path / "mirror").as_uri(), "node_local": True}
    fields: dict[str, Any] = {"max_steps": 60, "save_total_limit": 2, **mirror}
    fields |= {"greater_is_better": True, "load_best_model_at_end": True}
    how: dict[str, Any] = {"strategy": strategy, "nodes": 2, "disks": disks}
    command = argv(demo, disks / "here/run", **fields)
    run = ranks.killed(command, 14, "mirrored", **how)
    assert re.search(r"mirrored checkpoint-(8|\d\d)", run.output)
    before = whole_digests(disks / "0/run", 4, strategy)
    shutil.rmtree(disks / str(lost))
    (disks / str(lost)).mkdir()
    again = ranks.run(command, **how)
    assert ("checkpoint-4 (the best) brought" in again.output) == (lost == 0)
    found = RunFolder(disks / "0/run")
    assert [c.step for c in found.checkpoints()] == [4, 60]
    assert found.best().step == 4
    assert whole_digests(disks / "0/run", 4, strategy) == before
    exported = CliRunner().invoke(
        app, ["export", str(disks / "0/run/best"), "--to", str(tmp_path / "model")]
    )
    assert exported.exit_code == 0, exported.output


@pytest.mark.parametrize(
    "strategy", cases(["cpu_zero3", "cpu_zero2", "ddp"], long=["cpu_zero2", "ddp"])
)
def test_no_machine_is_lost(
    ranks: Ranks, demo: Path, tmp_path: Path, disks: Path, strategy: str
) -> None:
    """What they have together is gone on from, though the mirror never got it; the best one is
    loaded at the end; and weights can be made of the shards on the mirror."""
    straight, away = tmp_path / "straight", tmp_path / "away"
    fields: dict[str, Any] = {"max_steps": 16, "load_best_model_at_end": True}
    fields |= {"save_weights": "never"} if strategy == "cpu_zero3" else {}
    ranks.run(argv(demo, straight, **fields), strategy=strategy)
    mirror = {"mirror": away.as_uri(), "node_local": True, "mirror_min_seconds": 3600}
    command = argv(demo, disks / "here/run", **fields, **mirror)
    how: dict[str, Any] = {"strategy": strategy, "disks": disks}
    ranks.killed(command, 13, nodes=2, **how)
    shutil.rmtree(away)
    again = ranks.run(command, nodes=2, **how)
    found = re.search(r"carrying on from checkpoint-(\d+)", again.output)
    assert found
    assert int(found[1]) >= 8
    made = [tmp_path / "made-here", tmp_path / "made-there"]
    for place, folder in zip([str(straight), f"{away.as_uri()}/run"], made, strict=True):
        done = CliRunner().invoke(app, ["export", f"{place}/checkpoint-16", "--to", str(folder)])
        assert done.exit_code == 0, done.output
    assert digest_of(made[0] / "model.safetensors") == digest_of(made[1] / "model.safetensors")
    assert whole_digests(disks / "0/run", 16, strategy) == {
        name: digest
        for name, digest in final_digests(straight, 16).items()
        if not is_gathered(name, strategy)
    }


def test_the_first_machine_is_new(ranks: Ranks, demo: Path, tmp_path: Path, disks: Path) -> None:
    """What another one has whole is gone on from, log and all, though the mirror has nothing; what
    is whole nowhere is told of, and the run begins anew only if somebody says so."""
    fields: dict[str, Any] = {"max_steps": 400, "eval_steps": 400, "save_steps": 2}
    fields |= {"keep_ranking": "recency", "save_total_limit": 1, "node_local": True}
    commands = [
        argv(demo, disks / "here/run", mirror=(tmp_path / f"mirror-{n}").as_uri(), **fields)
        for n in range(3)
    ]
    how: dict[str, Any] = {"strategy": "cpu_zero2", "disks": disks}
    run = ranks.start(commands[0], processes=1, **how)
    run.wait_for("saved checkpoint-4")
    run.kill(signal.SIGKILL)
    run.wait()
    before = RunFolder(disks / "0/run")
    run_id, newest = before.run_id(), before.checkpoints()[-1].step
    (disks / "1").rmdir()
    (disks / "0").rename(disks / "1")
    (disks / "0").mkdir()
    run = ranks.start(commands[1], nodes=2, **how)
    run.wait_for(f"carrying on from checkpoint-{newest}\\b")
    run.wait_for(f"saved checkpoint-{newest + 4}")
    run.kill(signal.SIGKILL)
    run.wait()
    now = RunFolder(disks / "0/run")
    assert now.run_id() == run_id
    assert [attempt.number for attempt in now.attempts()] == [1, 2]
    assert {event["attempt"] for event in now.commits()} == {1, 2}
    place = read_place(RunFolder(disks / "1/run"))
    assert place is not None
    assert place.mirror == (tmp_path / "mirror-1/run").as_uri()
    shutil.rmtree(disks / "0/run")
    run = ranks.start(commands[2], nodes=2, **how)
    assert run.wait() == [2, 2]
    assert re.search(
        r"there is a part of checkpoint-\d+ on \S+ \(machine 1\); the rest is lost", run.output
    )
    assert "resume_from_checkpoint: never" in run.output
    run = ranks.start([*commands[2], "--resume_from_checkpoint", "never"], nodes=2, **how)
    run.wait_for("saved checkpoint-2")
    run.kill(signal.SIGKILL)
    run.wait()


@pytest.mark.long
def test_the_mirror_is_away_at_the_start(
    ranks: Ranks, demo: Path, tmp_path: Path, disks: Path
) -> None:
    """What the machines have together is enough; who owns the mirror is found out later, once for
    all of them, and it is caught up with."""
    mirror, gone = tmp_path / "mirror", tmp_path / "gone"
    fields: dict[str, Any] = {"max_steps": 24, "mirror": mirror.as_uri(), "node_local": True}
    command = argv(demo, disks / "here/run", **fields)
    how: dict[str, Any] = {"strategy": "cpu_zero2", "nodes": 2, "disks": disks}
    run = ranks.start(command, **how)
    run.wait_for("saved checkpoint-4")
    run.kill(signal.SIGKILL)
    run.wait()
    mirror.rename(gone)
    mirror.write_text("no folder")
    run = ranks.start(command, **how)
    run.wait_for("The run goes on from its folder")
    run.wait_for("carrying on from checkpoint-")
    mirror.unlink()
    gone.rename(mirror)
    assert run.wait() == [0, 0]
    there = [path.parent.name for path in mirror.glob("run/checkpoint-24/*/manifest.json")]
    assert [name[:6] for name in there] == ["000002"]


def test_each_machine_sends_what_it_has_written(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Also where all see one folder."""
    straight, run_folder = tmp_path / "straight", tmp_path / "run"
    ranks.run(argv(demo, straight, max_steps=16))
    mirror = tmp_path / "mirror"
    command = argv(demo, run_folder, max_steps=16, mirror=mirror.as_uri())
    run = ranks.killed(command, 10, "mirrored", nodes=2)
    assert "mirrored checkpoint-" in run.output
    for receipt, other in ((0, 1), (1, 0)):
        told = next(mirror.glob(f"run/checkpoint-*/*/receipt-{receipt}.json")).read_text()
        assert f"rng_state_{receipt}.pth" in told
        assert f"rng_state_{other}.pth" not in told
    shutil.rmtree(run_folder)
    again = ranks.run(command, nodes=2)
    assert re.search(r"mirror: checkpoint-\d+ brought from", again.output)
    assert final_digests(run_folder, 16) == final_digests(straight, 16)
    assert not any((run_folder / ".keepstep/mirror").glob("checkpoint-*"))
    assert len(list(mirror.glob("run/checkpoint-16/*/receipt-?.json"))) == 2


@pytest.mark.long
def test_a_part_is_damaged(ranks: Ranks, demo: Path, tmp_path: Path, disks: Path) -> None:
    """Then what is on the mirror is taken, and nothing of the newer one."""
    mirror = {"mirror": (tmp_path / "mirror").as_uri(), "node_local": True}
    command = argv(demo, disks / "here/run", max_steps=60, **mirror)
    how: dict[str, Any] = {"strategy": "cpu_zero2", "nodes": 2, "disks": disks}
    run = ranks.start(command, **how)
    run.wait_for("mirrored checkpoint-")
    run.kill(signal.SIGKILL)
    run.wait()
    newest = RunFolder(disks / "1/run").checkpoints()[-1]
    shard = next(newest.path.rglob("*optim_states.pt"))
    damage(shard)
    again = ranks.run(command, **how)
    assert f"this machine's part of checkpoint-{newest.step}" in again.output
    assert re.search(r"carrying on from checkpoint-(\d+)", again.output)


@pytest.mark.long
@pytest.mark.parametrize("gone", ["manifest.json", "rng_state_1.pth"])
def test_what_is_removed_from_the_mirror(
    ranks: Ranks, demo: Path, tmp_path: Path, disks: Path, gone: str
) -> None:
    """Of the best, in mid-run: each machine sends its part again, by the end at the latest."""
    away = tmp_path / "mirror"
    fields: dict[str, Any] = {"max_steps": 24, "save_steps": 2, "eval_steps": 2}
    fields |= {"save_total_limit": 2, "keep_ranking": "metric", "greater_is_better": True}
    fields |= {"mirror": away.as_uri(), "node_local": True}
    run = ranks.start(
        argv(demo, disks / "here/run", **fields), strategy="cpu_zero2", nodes=2, disks=disks
    )
    run.wait_for("mirrored checkpoint-2:")
    run.wait_for(r"mirrored checkpoint-([46]|\d\d)")
    (file,) = (away / "run/checkpoint-2").glob(f"*/{gone}")
    file.unlink()
    assert run.wait() == [0, 0]
    assert "objects of checkpoint-2 are gone there" in run.output
    checked = CliRunner().invoke(app, ["verify", f"{away.as_uri()}/run", "--deep"])
    assert checked.exit_code == 0, checked.output
    assert "checkpoint-2: valid" in checked.output


@pytest.mark.parametrize("where", cases([1, 0], long=[0]))
def test_a_part_is_damaged_that_the_mirror_has(
    ranks: Ranks, demo: Path, tmp_path: Path, disks: Path, where: int
) -> None:
    """On whichever machine, it is fetched once more before it is loaded."""
    mirror = {"mirror": (tmp_path / "mirror").as_uri(), "node_local": True}
    command = argv(demo, disks / "here/run", max_steps=8, keep_ranking="recency", **mirror)
    how: dict[str, Any] = {"strategy": "cpu_zero2", "nodes": 2, "disks": disks}
    ranks.run(command, **how)
    newest = RunFolder(disks / f"{where}/run").checkpoints()[-1]
    damage(next(newest.path.rglob("*optim_states.pt")))
    again = ranks.run(command, **how)
    assert "this machine's part of checkpoint-8" in again.output
    assert "carrying on from checkpoint-8" in again.output
    assert RunFolder(disks / f"{where}/run").checkpoints()[-1].faults(deep=True) == []


def test_the_store_refuses_one_machine(ranks: Ranks, demo: Path, s3: S3Server, disks: Path) -> None:
    """What it says is told, while the run goes on and at its end, which does not wait for a part
    that will never come."""
    refused = "receipt-1|rng_state_1"
    s3.fault("status", method="PUT", path=refused, times=-1, status=403, message="AccessDenied")
    mirror = {"mirror": f"s3://{BUCKET}/runs", "node_local": True, "deadline": "2100-01-01T00:00Z"}
    how: dict[str, Any] = {"strategy": "cpu_zero2", "nodes": 2, "disks": disks}
    command = argv(demo, disks / "here/run", max_steps=100_000, save_total_limit=2, **mirror)
    run = ranks.start(command, env=s3.environment(), **how)
    why = rf"on {re.escape(socket.gethostname())} \(machine 1\): s3://bucket/runs/run: .*"
    run.wait_for(rf"Not mirrored: checkpoint-\d+: {why}\n    Hint: .*\n    Tried again in ")
    run.kill(signal.SIGTERM)
    assert run.wait() == [75, 75]
    assert re.search(rf"Not mirrored: checkpoint-\d+ is not on the mirror: {why}", run.output)
    assert "Hint: the run, launched again, sends what is to be there" in run.output


def test_on_other_machines(
    ranks: Ranks, still_demo: Path, tmp_path: Path, s3: S3Server, disks: Path
) -> None:
    """Two machines, then one that has seen nothing, then four: the same losses, to rounding."""
    straight = tmp_path / "straight"
    fields: dict[str, Any] = {"max_steps": 24, "keep_ranking": "recency"}
    ranks.run(argv(still_demo, straight, **fields), strategy="cpu_zero3")
    mirror = {"mirror": f"s3://{BUCKET}/runs", "node_local": True}
    command = argv(still_demo, disks / "here/run", **fields, **mirror)
    how: dict[str, Any] = {"strategy": "cpu_zero3", "disks": disks, "env": s3.environment()}
    stopped = ["forward@5", "0", "SIGTERM", *command]
    run = ranks.start(stopped, nodes=2, script=STOPPED, **how)
    assert run.wait() == [75, 75]  # what it has saved then is on the mirror
    for node in (0, 1):
        shutil.rmtree(disks / f"{node}/run")
    stopped[0] = "forward@9"
    run = ranks.start(stopped, processes=1, script=STOPPED, **how)
    assert run.wait() == [75]
    assert "resharded checkpoint-" in run.output
    last = ranks.run(command, nodes=4, processes=4, **how)
    assert "1 x ZeRO-3 → 4 x ZeRO-3" in last.output
    assert "damaged" not in last.output
    measured = [RunFolder(folder).checkpoints()[-1] for folder in (straight, disks / "0/run")]
    assert [checkpoint.step for checkpoint in measured] == [24, 24]
    before, now = (checkpoint.metrics["eval_loss"] for checkpoint in measured)
    assert now == pytest.approx(before, rel=1e-3)
    parts = [names(disks / f"{node}/run", 24) for node in range(4)]
    assert all(f"rng_state_{node}.pth" in part for node, part in enumerate(parts))


def test_on_fewer_machines(ranks: Ranks, demo: Path, disks: Path) -> None:
    """The second of two reads beyond what the third and the fourth have written."""
    away = {"mirror": (disks / "mirror").as_uri(), "node_local": True}
    command = argv(demo, disks / "here/run", max_steps=8, save_steps=2, eval_steps=2, **away)
    how: dict[str, Any] = {"strategy": "cpu_zero2", "disks": disks}
    stopped = ["forward@2", "0", "SIGTERM", *command]
    run = ranks.start(stopped, nodes=4, processes=4, script=STOPPED, **how)
    assert set(run.wait()) == {75}
    last = ranks.run(command, nodes=2, processes=2, **how)
    assert "4 x ZeRO-2 → 2 x ZeRO-2" in last.output
    assert "Finished: 8 steps" in last.output


def test_machines_that_see_one_folder(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Each would take the others' files for its own: refused, before anything is trained."""
    mirror = {"mirror": (tmp_path / "mirror").as_uri(), "node_local": True}
    run = ranks.start(argv(demo, tmp_path / "run", **mirror), nodes=2)
    assert run.wait() == [2, 2]
    assert "is not each machine's own" in run.output


def test_disks_apart_that_nobody_has_told_of(
    ranks: Ranks, demo: Path, disks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ranks.start(argv(demo, disks / "here/run"), nodes=2, disks=disks)
    assert run.wait() == [2, 2]
    assert "is not shared" in run.output
    assert "node_local: true" in run.output


@pytest.mark.long
def test_killed_at_random_moments(ranks: Ranks, demo: Path, tmp_path: Path, disks: Path) -> None:
    """One machine's ranks before the other's; and a machine's disk may go with it. Never behind
    what all had saved together, or what was on the mirror where a disk went."""
    chance, lost = random.Random(7), False
    fields: dict[str, Any] = {"max_steps": 4000, "save_steps": 2, "eval_steps": 400}
    fields |= {"keep_ranking": "recency", "save_total_limit": 2, "node_local": True}
    command = argv(demo, disks / "here/run", mirror=(tmp_path / "mirror").as_uri(), **fields)
    saved = mirrored = 0
    for _ in range(20):
        run = ranks.start(command, nodes=2, disks=disks, strategy="cpu_zero2")
        if saved:
            found = run.wait_for(r"carrying on from checkpoint-(\d+)")
            assert int(found[1]) >= (mirrored if lost else saved)
            saved = int(found[1])
        else:
            run.wait_for("mirrored checkpoint-")
        time.sleep(chance.uniform(1, 4))
        run.kill(signal.SIGKILL, [chance.choice([0, 1])])
        time.sleep(chance.uniform(0, 0.5))
        run.kill(signal.SIGKILL)
        run.wait()
        saved = max([saved, *map(int, re.findall(r"saved checkpoint-(\d+)", run.output))])
        mirrored = max([mirrored, *map(int, re.findall(r"mirrored checkpoint-(\d+)", run.output))])
        lost = chance.choice([True, False])
        if lost:
            shutil.rmtree(disks / f"{chance.choice([0, 1])}/run")
    assert saved > 20


@pytest.mark.long
def test_one_machines_disk_is_full(ranks: Ranks, demo: Path, tmp_path: Path, disks: Path) -> None:
    """Room is made on all of them; what cannot be saved is told, and costs nothing else."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", disks / "1"], check=True)
    try:
        mirror = {"mirror": (tmp_path / "mirror").as_uri(), "node_local": True}
        fields: dict[str, Any] = {"max_steps": 24, "save_total_limit": 3, **mirror}
        command = argv(demo, disks / "here/run", keep_ranking="recency", **fields)
        run = ranks.run(command, nodes=2, disks=disks, strategy="cpu_zero2")
        assert "was not saved: rank 1: OSError: [Errno 28]" in run.output
        assert "it is tried once more" in run.output
        newest = [RunFolder(disks / f"{node}/run").checkpoints()[-1] for node in (0, 1)]
        assert [checkpoint.step for checkpoint in newest] == [24, 24]
        assert [checkpoint.faults(deep=True) for checkpoint in newest] == [[], []]
    finally:
        subprocess.run(["umount", disks / "1"], check=True)


def test_machines_with_two_mirrors(ranks: Ranks, demo: Path, tmp_path: Path, disks: Path) -> None:
    """A variable that one of them lacks, or has another value of: refused, with both places."""
    script = tmp_path / "main.py"
    script.write_text(
        "import os, sys\n"
        "from keepstep import train\n"
        "os.environ['KEEPSTEP_MIRROR'] += os.environ['GROUP_RANK']\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    mirror = (tmp_path / "mirror").as_uri()
    command = argv(demo, disks / "here/run", node_local=True)
    how: dict[str, Any] = {"nodes": 2, "disks": disks, "script": script}
    run = ranks.start(command, env={"KEEPSTEP_MIRROR": mirror}, **how)
    assert run.wait() == [2, 2], run.output
    assert f"mirror: it differs between machines: {mirror}0/run" in run.output
    assert f"{mirror}1/run" in run.output
    assert not list(tmp_path.glob("mirror*"))
