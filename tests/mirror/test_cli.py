"""`keepstep ls | verify | fetch` straight on a mirror: as on a run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from keepstep.cli.main import app
from keepstep.cli.on_mirror import is_address, split
from keepstep.mirror import upload as upload_module
from keepstep.mirror.job import do
from keepstep.mirror.store import Store
from keepstep.mirror.stores import open_store
from keepstep.run_folder.checkpoint import Checkpoint, read_checkpoint
from keepstep.run_folder.evaluations import add_evaluation
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.folders import STATE, commit, identify
from tests.mirror.server import BUCKET, S3Server

POLICY = {"limit": 2, "ranking": "metric", "metric": "eval_loss"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "PART_BYTES", 300)


def keepstep(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def mirror(
    store: Store, run: RunFolder, *steps: int, pinned: tuple[int, ...] = (), **policy: object
) -> None:
    """As a run does it."""
    for step in steps:
        job = {
            "url": store.url,
            "run": str(run.path),
            "owner": None,
            "token": "0123456789ab",
            "frozen": str(run.path / f"checkpoint-{step}"),
            "rate": 0,
            "node": 0,
            "nodes": 1,
            "files": None,
        }
        assert "error" not in do({**job, "pinned": list(pinned), "policy": POLICY | policy})


def change(store: Store, file: str, content: bytes | None, of: str = "checkpoint-8") -> None:
    """Another content for an object, or none."""
    (name,) = [n for n in store.names(of) if n.endswith(f"/{file}")]
    if content is None:
        store.delete([name])
    else:
        store.put(name, content)


def test_the_table_is_that_of_the_folder(store: Store, run: RunFolder) -> None:
    commit(run.path, 12, STATE, metrics={"eval_loss": 0.5})
    commit(run.path, 16, STATE)
    identify(run.path, **POLICY)
    mirror(store, run, 4, 8, 12, 16, pinned=(4,))
    here = json.loads(keepstep("ls", run.path, "--json").stdout)
    told = keepstep("ls", store.url, "--json")
    assert told.exit_code == 0
    there = json.loads(told.stdout)
    assert [row["step"] for row in there] == [4, 12, 16], "8 was pruned there"
    assert {row.pop("mirror") for row in there} == {store.url}
    by_step = {row["step"]: row for row in here}
    assert by_step[4]["keep"] is False
    kept = [(row.pop("keep"), row.pop("reason")) for row in there]
    assert kept == [(True, "pinned"), (True, "best"), (True, "newest, best 2 of 3")]
    for row in there:
        assert row == {name: by_step[row["step"]][name] for name in row}
    table = keepstep("ls", store.url)
    assert table.exit_code == 0
    lines = table.stdout.splitlines()
    assert lines[0].split()[:3] == ["step", "eval_loss", "size"]
    assert [line.split()[0] for line in lines[1:4]] == ["4", "12", "16"]
    assert lines[2].endswith("valid  best")
    assert lines[3].endswith("valid  newest, best 2 of 3")
    assert lines[4].startswith("3 checkpoints, ")
    one = keepstep("ls", f"{store.url}/checkpoint-12/")
    assert [line.split()[0] for line in one.stdout.splitlines()[1:]] == ["12", "1"]
    assert keepstep("ls", f"{store.url}/best").stdout == one.stdout
    missing = keepstep("ls", f"{store.url}/checkpoint-8")
    assert missing.exit_code == 2
    assert "no such checkpoint; there: 4, 12, 16" in missing.output


def test_a_metric_that_came_later_ranks(store: Store, run: RunFolder) -> None:
    mirror(store, run, 4)
    found = run.checkpoint(4)
    add_evaluation(Storage(), found.path, found.manifest, {"eval_law_loss": 0.25}, {})
    mirror(store, run, 8, metric="eval_law_loss")
    rows = json.loads(keepstep("ls", store.url, "--json").stdout)
    assert [(row["value"], row["reason"]) for row in rows] == [(0.25, "best"), (None, "newest")]


def test_a_folder_says_what_is_on_the_mirror_alone(store: Store, run: RunFolder) -> None:
    line = {"time": "2026-11-27T00:00:00.000+00:00", "attempt": 1, "event": "mirror"}
    lines = [{**line, "url": store.url, "step": step} for step in (2, 4)]
    run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = keepstep("ls", run.path).stdout
    assert f"on the mirror alone, by the log: checkpoint-2 (keepstep ls {store.url})" in told
    assert "valid, mirrored" in told.splitlines()[1]
    assert "mirrored" not in told.splitlines()[2]


def test_runs_below_an_address(store: Store, run: RunFolder, tmp_path: Path) -> None:
    above = store.url.rpartition("/")[0]
    mirror(store, run, 4, 8)
    mirror(open_store(f"{above}/a%20b%C3%BC"), run, 4)
    told = keepstep("ls", above)
    assert told.exit_code == 0
    rows = [line.split() for line in told.stdout.splitlines()]
    assert rows[0] == ["run", "checkpoints", "newest", "size", "saved", "(UTC)"]
    assert [(row[0].rpartition("/")[2], row[-6:-4]) for row in rows[1:]] == [
        ("a", ["1", "4"]),
        ("run", ["2", "8"]),
    ]
    as_json = json.loads(keepstep("ls", above, "--json").stdout)
    assert [row["checkpoints"] for row in as_json] == [[4], [4, 8]]
    assert as_json[0]["run"] == f"{above}/a bü"
    assert keepstep("ls", as_json[0]["run"]).exit_code == 0, "as it is told, it is understood"
    assert keepstep("ls", f"{above}/a%20b%C3%BC").exit_code == 0
    several = keepstep("verify", above)
    assert several.exit_code == 2
    assert f"is no run's own address; below it there are {above}/a bü, " in several.output
    change(store, "manifest.json", b"{}")
    assert json.loads(keepstep("ls", above, "--json").stdout)[1]["saved_at"] is None


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_what_is_nowhere(store: Store, tmp_path: Path, command: str) -> None:
    nothing = keepstep(command, f"{store.url}/other")
    assert nothing.exit_code == 2
    assert f"{store.url}/other" in nothing.output or "there is no folder" in nothing.output
    assert not (tmp_path / "other disk/run/other").exists(), "a look makes nothing"
    store.put("notes.txt", b"x")
    assert "is no run on a mirror" in keepstep(command, store.url).output
    for odd in ("s4://x/y", "s3:/x/y", "http://x/y"):
        wrong = keepstep(command, odd)
        assert wrong.exit_code == 2
        assert f"{odd}: a mirror is one of s3://…" in wrong.output or "names no" in wrong.output


def test_a_command_that_takes_no_address() -> None:
    for command in ("which", "status", "prune"):
        told = keepstep(command, "s3://bucket/run")
        assert told.exit_code == 2
        assert "this command looks at folders, not at a mirror" in told.output


def test_addresses() -> None:
    assert is_address("s3://bucket")
    assert is_address("file:///x")
    assert not is_address("runs/mine")
    assert not is_address("./s3:x")
    assert split("s3://b/run/checkpoint-5/") == ("s3://b/run", "checkpoint-5")
    assert split("s3://b/run/best") == ("s3://b/run", "best")
    assert split("s3://checkpoint-5") == ("s3://checkpoint-5", None)
    assert split("s3://b/run") == ("s3://b/run", None)


def test_a_run_that_is_called_best(store: Store, run: RunFolder) -> None:
    mirror(open_store(f"{store.url}/best"), run, 4)
    assert keepstep("ls", f"{store.url}/best").stdout.splitlines()[1].split()[0] == "4"


@pytest.mark.parametrize("deep", [False, True])
def test_verified(store: Store, run: RunFolder, deep: bool) -> None:
    mirror(store, run, 4, 8)
    flags = ["--deep"] if deep else []
    here, there = keepstep("verify", run.path, *flags), keepstep("verify", store.url, *flags)
    assert (there.exit_code, there.stdout) == (0, here.stdout)
    one = keepstep("verify", f"{store.url}/checkpoint-8", *flags)
    assert one.stdout == here.stdout.splitlines()[1] + "\n"
    assert json.loads(keepstep("verify", store.url, *flags, "--json").stdout) == {
        "checkpoint-4": [],
        "checkpoint-8": [],
    }


FIRST, SECOND = "model.safetensors.part-00000", "model.safetensors.part-00001"


def on_disk(run: RunFolder, damage: str) -> None:
    path = run.path / "checkpoint-8/model.safetensors"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-7], "other": b"?" + content[1:]}[damage])


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_damage_has_the_words_of_a_folder(store: Store, run: RunFolder, damage: str) -> None:
    mirror(store, run, 4, 8)
    content = (run.path / "checkpoint-8/model.safetensors").read_bytes()
    change(
        store, FIRST, {"gone": None, "cut": content[:293], "other": b"?" + content[1:300]}[damage]
    )
    on_disk(run, damage)
    for flags in ([], ["--deep"]):
        here, there = keepstep("verify", run.path, *flags), keepstep("verify", store.url, *flags)
        assert (there.exit_code, there.stdout) == (here.exit_code, here.stdout)
    assert there.exit_code == 1
    assert "checkpoint-8: model.safetensors" in there.stdout


def test_damage_of_what_only_a_mirror_has(store: Store, run: RunFolder) -> None:
    mirror(store, run, 4, 8)
    change(store, "receipt-0.json", b'{"parts": 7}')
    told = keepstep("verify", store.url)
    assert told.exit_code == 1
    assert "checkpoint-8: it is no receipt of an upload" in told.stdout
    change(store, "receipt-0.json", None)
    assert "checkpoint-8: it has no receipt" in keepstep("verify", store.url).stdout
    change(store, "manifest.json", b"{}")
    told = keepstep("verify", f"{store.url}/checkpoint-8")
    assert told.exit_code == 1
    assert told.stdout.startswith("checkpoint-8: not a manifest")
    listed = keepstep("ls", store.url)
    assert listed.stdout.startswith("checkpoint-8: not a manifest")
    change(store, "manifest.json", None)
    told = keepstep("verify", store.url)
    assert told.exit_code == 0
    assert "checkpoint-8: on its way, or an upload that was not ended" in told.stdout
    assert keepstep("verify", f"{store.url}/checkpoint-8").exit_code == 2


def test_a_receipt_of_each_machine(store: Store, run: RunFolder) -> None:
    """A checkpoint that two have uploaded is read as one."""
    mirror(store, run, 8)
    (name,) = [n for n in store.names() if n.endswith("receipt-0.json")]
    parts = json.loads(store.get(name))["parts"]
    for number, own in enumerate((parts[::2], parts[1::2])):
        other = name.replace("receipt-0", f"receipt-{number}")
        store.put(other, json.dumps({"parts": own}).encode())
    assert keepstep("verify", store.url, "--deep").exit_code == 0
    store.delete([name])
    assert "is missing" in keepstep("verify", store.url).stdout


def test_brought(store: Store, run: RunFolder, tmp_path: Path) -> None:
    mirror(store, run, 4, 8)
    to = tmp_path / "copy"
    done = keepstep("fetch", f"{store.url}/checkpoint-4", "--to", to)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{to}: step 4, ")
    assert Checkpoint(to, read_checkpoint(run.path / "checkpoint-4").manifest).faults(True) == []
    checked = keepstep("verify", to, "--deep")
    assert checked.exit_code == 0, checked.output
    assert checked.stdout.startswith("copy: valid (")
    listed = keepstep("ls", to)
    assert listed.exit_code == 2
    assert "is one checkpoint, as `keepstep fetch` brings one, and no run" in listed.output
    (to / "scheduler.pt").write_bytes(b"?")
    assert keepstep("verify", to).exit_code == 1
    (to / "manifest.json").write_text("{")
    spoilt = keepstep("verify", to)
    assert spoilt.exit_code == 1
    assert f"{to}: " in spoilt.output
    again = keepstep("fetch", store.url, "--to", to)
    assert again.exit_code == 2
    assert f"{to} exists" in again.output
    assert keepstep("fetch", store.url, "--to", tmp_path / "newest").stdout.count("step 8") == 1
    missing = keepstep("fetch", f"{store.url}/checkpoint-5", "--to", tmp_path / "x")
    assert missing.exit_code == 2
    assert keepstep("fetch", store.url).exit_code == 2, "--to is missing"
    change(store, FIRST, b"?" * 300)
    for damaged in ("wrong bytes", "gone"):
        refused = keepstep("fetch", f"{store.url}/checkpoint-8", "--to", tmp_path / "x")
        assert refused.exit_code == 1, damaged
        assert "model.safetensors" in refused.output
        change(store, FIRST, b"")
    assert sorted(p.name for p in tmp_path.iterdir() if "x" in p.name.split(".")) == []
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("here")
def test_a_store_that_refuses(s3: S3Server, run: RunFolder) -> None:
    store = open_store(f"s3://{BUCKET}/run")
    mirror(store, run, 4)
    gone = keepstep("ls", "s3://nobodys/run")
    assert gone.exit_code == 2
    assert "there is no such bucket, and none is made" in gone.output
    s3.fault("status", status=403, times=-1)
    refused = keepstep("verify", store.url)
    assert refused.exit_code == 2
    assert "403" in refused.output


def test_progress_counts_every_byte(store: Store, run: RunFolder) -> None:
    from keepstep.mirror.view import seen

    mirror(store, run, 4, 8)
    read: list[int] = []
    with seen(store) as there:
        there.progress = read.append
        for checkpoint in there.checkpoints():
            assert there.faults(checkpoint, deep=True) == []
        assert sum(read) == sum(c.manifest.total_bytes for c in there.checkpoints())
    shutil.rmtree(run.path)
