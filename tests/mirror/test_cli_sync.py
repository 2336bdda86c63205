"""`keepstep sync`: a mirror up to date by hand, and nobody deposed without a word."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from keepstep.cli.main import app
from keepstep.mirror import sync as sync_module
from keepstep.mirror.job import do
from keepstep.mirror.listing import look
from keepstep.mirror.owners import DeposedError, claim
from keepstep.mirror.store import Store
from keepstep.mirror.stores import open_store
from keepstep.mirror.sync import Sync
from keepstep.mirror.view import seen
from keepstep.output.progress import Tell
from keepstep.policy.manifest import MANIFEST_NAME, WHOLE_NAME
from keepstep.policy.mirrored import RETENTION, history_in, read_retention, what_to_send
from keepstep.policy.retention import Policy, Record
from keepstep.run_folder.checkpoint import Checkpoint, read_checkpoint
from keepstep.run_folder.evaluations import add_evaluation
from keepstep.run_folder.ownership import _process
from keepstep.run_folder.parts import part_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.folders import STATE, commit, identify
from tests.helpers.ranks import ROOT
from tests.helpers.waiting import PATIENCE, wait_for
from tests.mirror.server import BUCKET, S3Server
from tests.mirror.test_copies import crashes

TOKEN = "0123456789ab"
POLICY = {"limit": 2, "ranking": "metric", "metric": "eval_loss"}


def keepstep(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def sync(run: RunFolder, store: Store, *flags: str) -> Result:
    return keepstep("sync", run.path, "--mirror", store.url.rpartition("/")[0], *flags)


def steps(store: Store) -> list[int]:
    return sorted(look(store).found)


def ended(run: RunFolder) -> None:
    """Its attempt owned it, and has told of its end."""
    run.owner_file.write_text(f"{TOKEN} nowhere 17 boot.1\n")
    run.status.write_text('{"outcome": "finished", "exit": 0, "owner": "0123456789ab"}')


def mirrored(run: RunFolder, store: Store, step: int, limit: int = 2) -> None:
    """As its attempt does it."""
    job: dict[str, Any] = {
        "url": store.url,
        "run": str(run.path),
        "owner": None,
        "token": TOKEN,
        "rate": 0,
        "node": 0,
        "files": None,
        "nodes": 1,
    }
    job |= {"frozen": str(run.path / f"checkpoint-{step}"), "pinned": []}
    assert "error" not in do({**job, "policy": {**POLICY, "limit": limit}})


@pytest.fixture
def four(run: RunFolder) -> RunFolder:
    """With checkpoints 4, 8, 12, 16, of which 4 is the worst, and 12 the best."""
    identify(run.path, **POLICY)
    commit(run.path, 12, STATE, metrics={"eval_loss": 0.5})
    commit(run.path, 16, STATE)
    ended(run)
    return run


def test_all_that_is_kept_there_and_nothing_twice(four: RunFolder, store: Store) -> None:
    mirrored(four, store, 4)
    mirrored(four, store, 8)
    done = sync(four, store)
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        *("checkpoint-16", "checkpoint-12", "checkpoint-4", "checkpoint-8"),
    ]
    assert steps(store) == [12, 16]
    assert keepstep("verify", store.url, "--deep").exit_code == 0
    before = store.names()
    again = sync(four, store)
    assert again.stdout == f"{store.url} is up to date\n"
    assert store.names() == before
    told = keepstep("ls", four.path).stdout.splitlines()
    assert ["mirrored" in line for line in told[1:5]] == [False, False, True, True]
    assert keepstep("sync", four.path).stdout == again.stdout, "where it was mirrored is known"


def test_what_somebody_has_removed_there_is_sent_again(four: RunFolder, store: Store) -> None:
    """A manifest alone is no checkpoint: by `sync`, and by an attempt that begins again."""
    mirrored(four, store, 4)
    assert sync(four, store).exit_code == 0
    for mend in (lambda: sync(four, store), lambda: mirrored(four, store, 12)):
        (name,) = [n for n in store.names() if re.search(r"checkpoint-12/.*/model", n)]
        store.delete([name])
        assert keepstep("verify", store.url).exit_code == 1
        done = mend()
        assert done is None or done.stdout.startswith("checkpoint-12: "), done.output
        assert keepstep("verify", store.url, "--deep").exit_code == 0
        assert steps(store) == [12, 16]


def test_a_mirror_that_keeps_more_goes_on_doing_so(four: RunFolder, store: Store) -> None:
    mirrored(four, store, 4, limit=3)
    assert sync(four, store).exit_code == 0
    assert steps(store) == [8, 12, 16]
    names = store.names()
    policy, _ = read_retention(store.get(history_in(names)[RETENTION]).decode())
    assert policy.limit == 3


def test_metrics_that_came_later(four: RunFolder, store: Store, tmp_path: Path) -> None:
    """After a loss the best one is the same."""
    identify(four.path, limit=2, ranking="metric", metric="eval_law_loss")
    assert sync(four, store).exit_code == 0
    assert steps(store) == [12, 16]
    for step, value in ((12, 0.25), (16, 0.5)):
        found = four.checkpoint(step)
        add_evaluation(Storage(), found.path, found.manifest, {"eval_law_loss": value}, {})
    done = sync(four, store)
    assert done.stdout.splitlines()[0] == "checkpoint-12: its newer metrics are on the mirror now"
    rows = json.loads(keepstep("ls", store.url, "--json").stdout)
    assert [(row["step"], row["value"], row["reason"]) for row in rows] == [
        (12, 0.25, "best"),
        (16, 0.5, "newest, best 2 of 2"),
    ]
    assert keepstep("fetch", f"{store.url}/best", "--to", tmp_path / "best").exit_code == 0
    assert "eval_law_loss" in (tmp_path / "best/evaluations.json").read_text()


def alive(run: RunFolder) -> None:
    """This process is its attempt."""
    run.owner_file.write_text(f"{TOKEN} {_process(os.getpid())}\n")
    run.status.unlink(missing_ok=True)
    line = {"time": "2026-11-27T00:00:00.000+00:00", "attempt": 1, "event": "attempt"}
    run.events.write_text(json.dumps(line) + "\n")


def test_a_run_at_work_keeps_its_mirror(four: RunFolder, store: Store) -> None:
    mirrored(four, store, 4)
    alive(four)
    found = four.checkpoint(4)
    add_evaluation(Storage(), found.path, found.manifest, {"eval_law_loss": 0.25}, {})
    owners = store.names("owners")
    for flags in ((), ("--take_over",)):
        refused = sync(four, store, *flags)
        assert refused.exit_code == 1
        assert "is at work, and copies its checkpoints itself" in refused.output
    assert store.names("owners") == owners
    assert steps(store) == [4]
    assert "eval_law_loss" in keepstep("ls", store.url, "--json").stdout or "0.25" in str(
        look(store).found[4].evaluated
    ), "metrics depose nobody"
    mirrored(four, store, 16)  # it goes on as if nothing had been


def test_a_run_at_work_is_copied_to_another_place(four: RunFolder, store: Store) -> None:
    alive(four)
    done = sync(four, store)
    assert done.exit_code == 0, done.output
    assert steps(store) == [12, 16]


def test_another_machines_run_is_not_taken(four: RunFolder, store: Store) -> None:
    mirrored(four, store, 4)
    other = claim(store, "ffffffffffff")
    refused = sync(four, store)
    assert refused.exit_code == 1
    assert (
        f"the run was last carried on by another machine (owner {other.number})" in refused.output
    )
    assert "Not sent: checkpoint-16, checkpoint-12" in refused.output
    assert "--take_over" in refused.output
    assert steps(store) == [4]
    assert sync(four, store, "--take_over").exit_code == 0
    assert steps(store) == [12, 16]
    assert sync(four, store).exit_code == 0, "it was by hand: nobody is deposed"


def test_a_run_that_may_be_at_work_elsewhere(four: RunFolder, store: Store) -> None:
    mirrored(four, store, 4)
    alive(four)
    four.owner_file.write_text(f"{TOKEN} elsewhere 17 boot.1\n")
    refused = sync(four, store)
    assert refused.exit_code == 1
    assert "may be at work on another machine" in refused.output
    assert sync(four, store, "--take_over").exit_code == 0


def test_who_comes_in_between_keeps_the_run(four: RunFolder, store: Store) -> None:
    """Another machine claims it between the look and the claim; or while it is sent."""
    mirrored(four, store, 4)
    work = Sync(four, store)
    claim(store, "ffffffffffff")
    with pytest.raises(DeposedError, match="another machine has just taken the run"):
        list(work.send(_sending))
    assert steps(store) == [4]
    work = Sync(four, store)

    @contextmanager
    def taking(checkpoint: Checkpoint) -> Iterator[Tell]:
        claim(store, "eeeeeeeeeeee")
        yield lambda done, total: None

    with pytest.raises(DeposedError):
        list(work.send(taking))
    assert steps(store) == [4]


def _sending(checkpoint: Checkpoint) -> AbstractContextManager[Tell]:
    return nullcontext(lambda done, total: None)


def test_a_damaged_checkpoint_does_not_keep_the_others(four: RunFolder, store: Store) -> None:
    (four.path / "checkpoint-16/model.safetensors").write_bytes(b"?" * 560)
    done = sync(four, store)
    assert done.exit_code == 1
    assert "checkpoint-16: not sent: " in done.output
    assert steps(store) == [12]


def test_one_machines_part_is_not_sent(four: RunFolder, store: Store) -> None:
    mirrored(four, store, 12)
    for step in (12, 16):
        folder = four.path / f"checkpoint-{step}"
        part, whole = part_of(read_checkpoint(folder).manifest, ["rng_state_1.pth"])
        (folder / WHOLE_NAME).write_bytes(whole)
        (folder / MANIFEST_NAME).write_text(part.to_json())
    owners = store.names("owners")
    done = sync(four, store)
    assert done.exit_code == 1
    assert "checkpoint-16: not sent: this machine has a part of it alone" in done.output
    assert "checkpoint-12" not in done.output, "it is there"
    assert (steps(store), store.names("owners")) == ([12], owners)


def test_a_step_that_a_branch_has_saved_again(four: RunFolder, store: Store) -> None:
    assert sync(four, store).exit_code == 0
    shutil.rmtree(four.path / "checkpoint-16")
    commit(four.path, 16, STATE, attempt=2, parent=8)
    assert sync(four, store).exit_code == 0
    assert look(store).found[16].manifest.attempt == 2


def test_what_cannot_be_synced(
    four: RunFolder, store: Store, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.delenv("KEEPSTEP_MIRROR", raising=False)
    unknown = keepstep("sync", four.path)
    assert unknown.exit_code == 2
    assert "no mirror is known" in unknown.output
    monkeypatch.setenv("KEEPSTEP_MIRROR", store.url.rpartition("/")[0])
    assert keepstep("sync", four.path).exit_code == 0
    own = keepstep("sync", four.path, "--mirror", store.url)
    assert own.stdout == f"{store.url} is up to date\n", "the run's own address is understood, too"
    assert keepstep("sync", four.path, "--mirror", "runs").exit_code == 2
    empty = identify(tmp_path / "empty")
    assert keepstep("sync", empty).exit_code == 2
    other = tmp_path / "elsewhere/run"
    identify(other)
    (other / ".keepstep/run.json").write_text('{"run_id": "ffffffffffff", "policy": {}}')
    commit(other, 4, run_id="ffffffffffff")
    refused = sync(RunFolder(other), store)
    assert refused.exit_code == 2
    assert "holds run 0123456789ab" in refused.output


def test_what_is_sent_is_what_would_be_kept() -> None:
    records = [Record(4, 0.1), Record(8, 0.9), Record(12, 0.5), Record(16, 0.8, abandoned=True)]
    best = Policy(limit=2, ranking="metric", metric="m")
    assert what_to_send(records, best, {4, 8, 12, 16}, set()) == ([12, 4], [])
    assert what_to_send(records, best, {12}, {4, 8}) == ([12], [8])
    assert what_to_send(records, Policy(), {4, 8, 12}, set()) == ([12, 8, 4], [])
    assert sync_module.BY_HAND


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_nobody_waits_for_a_store_that_hangs(four: RunFolder, s3: S3Server, method: str) -> None:
    """Ctrl-C ends it while it lists, and while it sends."""
    fault = s3.fault("hang", method=method, path="" if method == "GET" else "model", times=-1)
    code = "from keepstep.cli import command; command()"
    command = [sys.executable, "-c", code, "sync", str(four.path), "--mirror", f"s3://{BUCKET}/x"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        try:
            wait_for(lambda: fault.hits, child)
            child.send_signal(signal.SIGINT)
            assert child.wait(PATIENCE) == 130
        finally:
            child.kill()
    s3.clear_faults()
    assert not [name for name in s3.names("x") if name.endswith("/manifest.json")]


@pytest.mark.long  # as the sweep of test_copies, of which the default suite has one
def test_a_crash_at_every_operation(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there stays whole, what was there is not lost, and the next one ends what was
    begun."""
    monkeypatch.setattr("keepstep.mirror.upload.AT_ONCE", 1)  # in one order
    ended(run)
    place = tmp_path / "mirror"
    before = open_store(f"{place.as_uri()}/run")
    mirrored(run, before, 4, limit=1)
    found = run.checkpoint(4)
    add_evaluation(Storage(), found.path, found.manifest, {"eval_law_loss": 0.25}, {})
    shutil.copytree(place, tmp_path / "as it was")

    def again(store: Any) -> None:
        work = Sync(run, store)
        work.send_metrics()
        list(work.send(_sending))

    count = 0
    for _ in crashes(again, before.url):
        count += 1
        run.events.write_text("")
        store = open_store(before.url)
        there = look(store).found
        assert there.keys() & {4, 8}
        with seen(store) as view:
            assert [view.faults(c, deep=True) for c in view.checkpoints()] == [[] for _ in there]
        if sync(run, store).exit_code:
            pytest.fail("what was begun cannot be ended")
        assert steps(store) == [8]
        assert {n.split("/")[0] for n in store.names() if n[0] == "c"} == {"checkpoint-8"}
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "as it was", place)
    assert count > 40
