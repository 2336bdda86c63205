"""The report of a run that met everything: two kills, a resize, a branch, and a push."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from tests.helpers.browser import browser
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv
from tests.hub.client import Client
from tests.hub.peer import HubPeer
from tests.hub.runs import REPO
from tests.hub.test_publish import FIELDS, environment
from tests.report.looks import look_at

STEPS = 120


@pytest.mark.long
def test_a_run_that_met_everything(
    ranks: Ranks, demo: Path, hub: HubPeer, client: Client, tmp_path: Path
) -> None:
    run, prompts = tmp_path / "night", tmp_path / "prompts.jsonl"
    asked = [{"role": "user", "content": "What is <b>2 + 3</b>?"}]
    prompts.write_text(json.dumps({"messages": asked}) + "\n")
    fields = FIELDS | {
        **{"max_steps": STEPS, "save_steps": 10, "eval_steps": 10, "logging_steps": 1},
        **{"sample_prompts": prompts, "sample_max_new_tokens": 8, "learning_rate": 6e-3},
    }
    command = argv(demo, run, **fields)
    for saved in (20, 50):  # two kills; the second attempt is of one process: a resize
        killed = ranks.start(command, processes=2 if saved == 20 else 1, env=environment(client))
        killed.wait_for(f"saved checkpoint-{saved}")
        killed.kill(signal.SIGKILL)
        killed.wait()
    branch = ["--resume_from_checkpoint", "30", "--learning_rate", "4e-3", "--allow_drift"]
    ranks.run([*command, *branch, "learning_rate"], env=environment(client))
    assert hub.history(REPO)[0].title.startswith("Step ")
    report = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(report)])
    assert done.exit_code == 0
    told = " ".join(done.stdout.split())
    assert f"finished at step {STEPS}; best at step" in told
    assert "3 attempts, 2 kills" in told
    with browser(tmp_path / "profile") as page:
        look_at(page, report, tmp_path)
        said = page.ask("document.body.innerText")
        marks = page.ask("[...document.querySelectorAll('.legend li')].map(e => e.innerText)")
    for text in ("is resharded for 1 x", "a branch that was left", "learning_rate", REPO):
        assert text in said
    assert {"best", "published", "pruned", "saved on it", "killed"} <= {m[2:] for m in marks}
    assert "What is <b>2 + 3</b>?" in said
