"""Runs of two processes that publish: the best one, once, whatever the Hub does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.evaluate import evaluate_apart
from tests.helpers.ranks import PROGRAMS, ROOT, Ranks
from tests.helpers.recipes import argv
from tests.helpers.waiting import PATIENCE, wait_for
from tests.hub.client import Client
from tests.hub.peer import READ_TOKEN, WRITE_TOKEN, HubPeer
from tests.hub.runs import REPO
from tests.hub.test_peer import UPLOAD
from tests.hub.test_push import CARD, COMMIT, theirs, titles

SHIM = ROOT / "tests/rank_programs/shimmed.py"
# One process for both: most of its time goes into imports.
CHECK = """
import json, os, sys
from typer.testing import CliRunner
from keepstep.cli.main import app

told = []
for token in sys.argv[1:3]:
    os.environ["HF_TOKEN"] = token
    done = CliRunner().invoke(app, ["check", *sys.argv[3:]])
    told.append((done.exit_code, done.stdout))
print(json.dumps(told))
"""
FIELDS = {"push_to_hub": True, "hub_model_id": REPO, "publish_min_seconds": 0, "card": CARD}


def environment(client: Client) -> dict[str, str]:
    """What the ranks' own environment lacks."""
    wanted = client.environment() | {"HF_HUB_OFFLINE": "0"}
    return {name: value for name, value in wanted.items() if os.environ.get(name) != value}


def losses(run: Path) -> dict[int, float]:
    """Step → evaluation loss, of every checkpoint that was ever committed."""
    events = [json.loads(line) for line in (run / ".keepstep/events.jsonl").open()]
    return {e["step"]: e["metrics"]["eval_loss"] for e in events if e["event"] == "commit"}


def measured(hub: HubPeer, demo: Path, folder: Path) -> dict[int, float]:
    """Step that a commit's title names → loss of its weights, to a stranger who downloads it."""
    places = {}
    for commit in hub.history(REPO)[:-1]:
        place = folder / commit.oid
        for path in hub.files(REPO, commit.oid):
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(hub.read(REPO, path, commit.oid))
        (step,) = re.findall(r"^Step (\d+):", commit.title)
        assert json.loads((place / "training/best.json").read_text())["global_step"] == int(step)
        places[int(step)] = place
    found = evaluate_apart(demo / "data/eval.jsonl", places.values())
    return {step: found[place] for step, place in places.items()}


def test_a_script_publishes(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path
) -> None:
    """Two lines, and `push_to_hub` in the config: the best one, and once."""
    fields = FIELDS | {"eval_strategy": "steps", "eval_steps": 4, "push_to_hub": True}
    command = [str(tmp_path / "run"), str(demo), json.dumps(fields)]
    how: Any = {"script": PROGRAMS / "two_lines.py", "strategy": "ddp", "processes": 1}
    ranks.run(command, env=environment(client), **how)
    found = losses(tmp_path / "run")
    best = min(found, key=found.__getitem__)
    assert titles(hub)[0] == f"Step {best}: eval_loss {found[best]:.4f}"
    before = titles(hub)
    again = ranks.run(command, env=environment(client), **how)
    assert "there is nothing to train" in again.output
    assert titles(hub) == before


def test_every_improvement(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path
) -> None:
    """One commit each: an evaluation waits here for the push before it, so that none is too soon
    for the next; and what is saved in the foreground is offered at once."""
    command = argv(demo, tmp_path / "run", **FIELDS, async_save="off")
    run = ranks.run(["published", *command], script=SHIM, env=environment(client))
    expected = losses(tmp_path / "run")
    assert titles(hub) == [
        *(f"Step {step}: eval_loss {expected[step]:.4f}" for step in (12, 8, 4)),
        "initial commit",
    ]
    assert measured(hub, demo, tmp_path) == pytest.approx(expected, abs=2e-4)
    assert len(hub.requests(path="whoami")) == 1, "by the main process alone"
    assert f"Published: {REPO}, step 12, commit {hub.history(REPO)[0].oid[:8]}" in run.output
    assert WRITE_TOKEN not in run.output
    assert hub.find_bytes(WRITE_TOKEN.encode()) == []
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes()


def test_the_best_is_not_the_last(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path
) -> None:
    """The highest loss is called the best: it is the first."""
    fields = {"greater_is_better": True, "save_total_limit": 2}
    ranks.run(argv(demo, tmp_path / "run", **FIELDS, **fields), env=environment(client))
    expected = losses(tmp_path / "run")
    assert titles(hub) == [f"Step 4: eval_loss {expected[4]:.4f}", "initial commit"]
    weights = (tmp_path / "run/checkpoint-4/model.safetensors").read_bytes()
    assert hub.read(REPO, "model.safetensors") == weights


@pytest.mark.parametrize("required", [False, True])
def test_a_hub_that_hangs(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path, required: bool
) -> None:
    """Training does not wait for it; the end does, for so long, or until somebody has enough of it;
    and later it is made good."""
    if required:  # or it is away at the start, and asks for an hour's patience later
        hub.fault("status", path="whoami", status=503, times=-1)
        headers = {"Retry-After": "3600"}
        fault = hub.fault("status", path=COMMIT, status=429, headers=headers, times=-1)
    else:
        fault = hub.fault("hang", path=COMMIT, times=-1)
    seconds = 6 if required else 2 * PATIENCE
    fields = {"publish_timeout_seconds": seconds, "hub_require": required}
    command = argv(demo, tmp_path / "run", **FIELDS, **fields)
    run = ranks.start(command, env=environment(client))
    told = f"Training has finished; step 12 is on its way to {REPO}, for {seconds:.0f} s at most"
    run.wait_for(told)
    if not required:
        wait_for(lambda: fault.hits)
        run.kill(signal.SIGINT, ranks=[0])
    codes = run.wait()  # in less than the Hub is waited for without that
    assert codes == ([70, 0] if required else [0, 0])
    assert ("the Hub cannot be reached now (" in run.output) == required
    assert "Ctrl-C ends this wait alone: the run stays finished, and " in run.output
    reason = r"the Hub did not answer to the end within 6 s|.*; there was no time for another"
    if not required:
        reason = r"the wait for the Hub was ended on request \(SIGINT\)"
    assert re.search(rf"Not published: ({reason})\n", run.output), run.output
    assert f"`keepstep push {tmp_path}/run` finishes it" in run.output
    status = json.loads((tmp_path / "run/.keepstep/status.json").read_text())
    assert (status["outcome"], status["exit"]) == ("finished", 70 if required else 0)
    if REPO in hub.store.repos or not required:  # else the six seconds were over before it was made
        assert titles(hub) == ["initial commit"]

    hub.clear_faults()
    done = subprocess.run(
        [Path(sys.executable).parent / "keepstep", "push", tmp_path / "run"],
        env=client.environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith(f"{REPO}: published, step 12")
    assert len(titles(hub)) == 2


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_" + "x" * 34, REPO, "401: the token is not accepted"),
        (READ_TOKEN, REPO, "403: the token may not write there"),
        (WRITE_TOKEN, "strangers/demo", "403: the token may not write there"),
    ],
    ids=["unknown token", "read token", "foreign name"],
)
def test_found_before_the_first_step(
    ranks: Ranks,
    demo: Path,
    hub: HubPeer,
    client: Client,
    tmp_path: Path,
    token: str,
    name: str,
    message: str,
) -> None:
    command = argv(demo, tmp_path / "run", **FIELDS | {"hub_model_id": name})
    run = ranks.start(command, env=environment(client) | {"HF_TOKEN": token})
    assert run.wait() == [2, 2]
    assert run.output.count("push_to_hub: ") == 1
    assert f"  - push_to_hub: {name}: {message}" in run.output
    assert token not in run.output
    assert not (tmp_path / "run").exists()
    assert hub.store.repos == {}


def test_refused_in_mid_run(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path
) -> None:
    hub.fault("status", path=COMMIT, status=403, times=-1)
    run = ranks.run(argv(demo, tmp_path / "run", **FIELDS), env=environment(client))
    assert f"Not published: {REPO}: 403: the token may not write there" in run.output
    folder = RunFolder(tmp_path / "run")
    assert [c.step for c in folder.checkpoints()] == [4, 8, 12]
    assert all(folder.faults(checkpoint, deep=True) == [] for checkpoint in folder.checkpoints())


def test_pruned_while_it_is_pushed(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path
) -> None:
    """Before the upload of step 4 is through, step 8 is better, and takes its place."""
    slow = hub.fault("delay", path=UPLOAD, seconds=PATIENCE)
    fields = {"max_steps": 16, "save_total_limit": 1, "keep_ranking": "recency"}
    command = argv(demo, tmp_path / "run", **FIELDS, **fields)
    run = ranks.start(["evaluates", *command], script=SHIM, env=environment(client))
    wait_for(lambda: slow.hits)
    run.wait_for("saved checkpoint-8: .* pruned 4")
    assert titles(hub) == ["initial commit"]
    run.kill(signal.SIGSTOP)  # the push is a process of its own, and arrives while the run waits
    slow.end()
    until = time.monotonic() + PATIENCE
    while not titles(hub)[0].startswith("Step 4"):
        assert time.monotonic() < until, "the push never arrived"
        time.sleep(0.05)
    run.kill(signal.SIGCONT)
    assert run.wait() == [0, 0]
    expected = losses(tmp_path / "run")
    found = measured(hub, demo, tmp_path)
    assert 4 in found
    assert found == pytest.approx({step: expected[step] for step in found}, abs=2e-4)
    assert [p.name for p in (tmp_path / "run/.keepstep/publish").iterdir() if p.is_dir()] == []


def test_a_better_one_is_there(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path
) -> None:
    """Carrying on, the run knows what is on the Hub, and does not go back behind it."""
    command: dict[str, Any] = {"max_steps": 8, **FIELDS}
    ranks.run(argv(demo, tmp_path / "run", **command), env=environment(client))
    assert titles(hub)[0].startswith("Step 8")
    hub.commit(REPO, theirs(RunFolder(tmp_path / "run")))
    command["max_steps"] = 12
    run = ranks.run(argv(demo, tmp_path / "run", **command), env=environment(client))
    assert f"{REPO} has step 99 (eval_loss 0.1000); only a better one takes its place" in run.output
    assert f"Not published to {REPO}: step 99 of run other (eval_loss 0.1000) is" in run.output
    assert titles(hub)[0] == "By hand"


def test_stopped_is_not_published(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path
) -> None:
    """Step 4 is on its way when the stop comes, and stays at home; carried on, the best goes."""
    fault = hub.fault("hang", path=COMMIT)
    # Saved in the foreground, step 4 is offered at once.
    seconds = 2 * PATIENCE
    fields = FIELDS | {"async_save": "off", "publish_timeout_seconds": seconds}
    command = argv(demo, tmp_path / "run", **fields)
    stopped = ranks.start(["evaluates", *command], script=SHIM, env=environment(client))
    stopped.wait_for("evaluation of step 8 begins")
    stopped.kill(signal.SIGSTOP)  # the push is a process of its own, and comes so far meanwhile
    wait_for(lambda: fault.hits)
    stopped.kill(signal.SIGTERM)
    stopped.kill(signal.SIGCONT)
    assert stopped.wait() == [75, 75], "the push is not waited for"
    assert titles(hub) == ["initial commit"]
    ranks.run(command, env=environment(client))
    assert titles(hub)[0].startswith("Step 12")
    assert titles(hub)[-1] == "initial commit"


def test_check_asks_the_hub(demo: Path, hub: HubPeer, client: Client, tmp_path: Path) -> None:
    """`keepstep check`: a token that may not write, and one that may."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}\n")
    flags = argv(demo, tmp_path / "run", **FIELDS)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, WRITE_TOKEN, READ_TOKEN, str(recipe), *flags],
        env=client.environment(WRITE_TOKEN),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    good, (code, output) = json.loads(done.stdout.splitlines()[-1])
    assert good[0] == 0
    assert good[1].startswith(f"{recipe}: no mistake found\n")
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if "push_to_hub: " in line]
    assert line.endswith("[hub]")
