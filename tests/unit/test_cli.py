from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli import app
from tests.helpers.folders import commit, identify

runner = CliRunner()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    identify(tmp_path, limit=3, ranking="metric", metric="eval_loss")
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5)):
        commit(tmp_path, step, metrics={"eval_loss": loss})
    return tmp_path


def test_ls(run: Path) -> None:
    result = runner.invoke(app, ["ls", str(run)])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["step", "eval_loss", "size"]
    assert [line.split()[0] for line in lines[1:4]] == ["10", "20", "30"]
    assert lines[2].rstrip().endswith("best")
    assert lines[3].rstrip().endswith("newest, best 2 of 3")
    assert lines[4].startswith("3 checkpoints, ")


def test_ls_json(run: Path) -> None:
    rows = json.loads(runner.invoke(app, ["ls", str(run), "--json"]).stdout)
    assert [(row["step"], row["value"], row["keep"]) for row in rows] == [
        (10, 2.0, True),
        (20, 1.0, True),
        (30, 1.5, True),
    ]


def test_verify_names_what_is_wrong(run: Path) -> None:
    assert runner.invoke(app, ["verify", str(run)]).exit_code == 0
    (run / "checkpoint-20/rng_state_1.pth").unlink()
    result = runner.invoke(app, ["verify", str(run)])
    assert result.exit_code == 1
    assert "checkpoint-20: rng_state_1.pth is missing" in result.stdout
    assert "checkpoint-10: valid" in result.stdout
    assert runner.invoke(app, ["verify", str(run / "checkpoint-30")]).exit_code == 0
    assert runner.invoke(app, ["verify", str(run / "checkpoint-20")]).exit_code == 1


def test_verify_deep_reads_every_byte(run: Path) -> None:
    weights = run / "checkpoint-10/model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert runner.invoke(app, ["verify", str(run)]).exit_code == 0
    result = runner.invoke(app, ["verify", str(run), "--deep", "--json"])
    assert result.exit_code == 1
    assert [name for name, faults in json.loads(result.stdout).items() if faults] == [
        "checkpoint-10"
    ]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    result = runner.invoke(app, ["ls", str(tmp_path / "nope")])
    assert result.exit_code == 2
    assert "there is no folder" in result.stdout
