"""What a run tells of itself while it is killed and launched again, by real processes."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.cli.status import status_of
from keepstep.run_folder.launched import changed, launched_of
from keepstep.run_folder.progress import goodput_of, reached_of
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import events
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv
from tests.helpers.waiting import PATIENCE
from tests.helpers.webhook import webhook


def metrics(run: RunFolder) -> dict[str, float]:
    families = text_string_to_metric_families(run.metrics.read_text())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_a_run_of_kills(ranks: Ranks, demo: Path, workspace: Path) -> None:
    """Killed with steps that are not saved, then on one process; all its time is accounted for."""
    run = RunFolder(workspace / "kills")
    every = {"save_steps": 30, "eval_steps": 30, "eval_on_start": True}
    command = argv(demo, run.path, max_steps=100_000, **every)
    killed = ranks.start(command)
    killed.wait_for("saved checkpoint-30")
    deadline = time.monotonic() + PATIENCE
    while True:  # until the heartbeat has told of steps that are not saved
        seen, saved = reached_of(run), run.latest()
        if seen is not None and saved is not None and seen.step > saved.step:
            killed.kill(signal.SIGSTOP)  # and no save arrives between this look and the kill
            time.sleep(0.2)
            seen, saved = reached_of(run), run.latest()
            if seen is not None and saved is not None and seen.step > saved.step:
                break
            killed.kill(signal.SIGCONT)
        assert time.monotonic() < deadline
    at_work = status_of(run)
    assert (at_work.state, at_work.planned) == ("running", 100_000)
    assert at_work.reached is not None
    assert at_work.reached >= seen.step
    assert metrics(run)["keepstep_up"] == 1
    killed.kill(signal.SIGKILL)
    killed.wait()
    alone = goodput_of(run)
    assert alone.repeated > 0  # nobody has launched it again: what is not saved is lost
    step = run.checkpoints()[-1].step
    secret = {"HF_TOKEN": "hf_" + "s3cret" * 5, "KEEPSTEP_COMMAND": f"x --hub_token {'a' * 20}"}
    more = ["--max_steps", str(step + 30), "--logging_steps", "1"]
    with webhook() as hook:
        secret |= {"KEEPSTEP_NOTIFY_URL": hook.url, "no_proxy": "127.0.0.1"}
        again = ranks.run([*command, *more], processes=1, env=secret)
        (body,) = hook.got
    assert (body["event"], body["step"], body["attempt"]) == ("finished", step + 30, 2)
    first = re.search(rf"step +{step + 1}/\d+  loss .*", again.output)
    assert first is not None
    assert re.search(r"  [\d,.]+ tokens/s  (?:\d+ min )?\d+ s left$", first.group())
    ended = metrics(run)
    assert (ended["keepstep_up"], ended["keepstep_exit_status"]) == (0, 0)
    assert ended["keepstep_step"] == ended["keepstep_checkpoint_step"] == step + 30
    assert "keepstep_tokens_per_second" not in ended  # it has none any more
    assert status_of(run).reached == step + 30

    (heard,) = events(run, "heard")
    assert heard["of"] == 1
    assert heard["step"] >= seen.step
    found = goodput_of(run)
    assert sum(found.parts.values()) == found.wall
    lacking = [name for name, part in found.parts.items() if part == 0 and name != "unknown"]
    assert lacking == []
    assert found.unknown < 0.1 * found.wall
    told = CliRunner().invoke(app, ["goodput", str(run.path), "--json"])
    assert round(sum(json.loads(told.stdout)["percent"].values()), 6) == 100
    listed = CliRunner().invoke(app, ["ls", str(run.path)]).stdout
    assert f"goodput: {found.told()}" in " ".join(listed.split())

    kept = launched_of(run)
    assert [of.hosts for of in kept.values()] == [{socket.gethostname(): n} for n in (2, 1)]
    assert kept[2].command == "x --hub_token ***"
    assert kept[1].data["training"] == str(demo / "data/train.jsonl")
    assert changed(kept[1].recipe, kept[2].recipe)["max_steps"] == (100_000, step + 30)
    said = CliRunner().invoke(app, ["log", str(run.path), "--said", "--attempt", "1"]).stdout
    assert "attempt 1, 2 x ZeRO-3" in said
    assert "saved checkpoint-30" in said
    assert "\r" not in said
    said = CliRunner().invoke(app, ["log", str(run.path), "--said"]).stdout
    assert f"Finished: {step + 30} steps." in said
    written = b"".join(p.read_bytes() for p in run.private.rglob("*") if p.is_file())
    assert b"s3cret" not in written
    assert b"a" * 20 not in written
    shown = CliRunner().invoke(app, ["show", str(run.path)]).stdout
    assert f"attempt 1: began {kept[1].time[:10]}" in shown
    assert f"max_steps: 100000 → {step + 30}" in shown


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_told_of_by_one_that_is_left(
    ranks: Ranks, demo: Path, workspace: Path, rank: int
) -> None:
    run = RunFolder(workspace / f"died-{rank}")
    with webhook() as hook:
        env = {"KEEPSTEP_NOTIFY_URL": hook.url, "no_proxy": "127.0.0.1"}
        started = ranks.start(argv(demo, run.path, max_steps=100_000), env=env, processes=3)
        started.wait_for("saved checkpoint-4")
        started.kill(signal.SIGKILL, ranks=[rank])
        codes = started.wait()
        assert sorted(codes) == [-9, 70, 70]
        (body,) = hook.got
    assert (body["event"], body["attempt"]) == ("rank_died", 1)
    assert re.search(rf"rank {rank} on \S+ died: the process is gone", body["text"])
    assert hook.url not in started.output
    assert b"s3cret-path" not in b"".join(
        path.read_bytes() for path in run.private.rglob("*") if path.is_file()
    )
