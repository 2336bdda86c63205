"""What a folder is, and what a run was: six answers where there is nothing to list, and `show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.output.environment import hidden, is_secret
from keepstep.policy.retention import Policy
from keepstep.run_folder.launched import Launched, changed, launched_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from tests.helpers.folders import commit, identify

LOOKS = ("ls", "which", "verify")
runner = CliRunner()


def launched(attempt: int, **changes: object) -> Launched:
    values: dict[str, object] = {
        "attempt": attempt,
        "time": "2026-11-27T05:00:00.000+00:00",
        "command": "keepstep launch recipe.yaml",
        "directory": "/home/me/my runs",
        "model": "Qwen/Qwen3-0.6B",
        "data": {"training": "data/train.jsonl"},
        "recipe": {"learning_rate": 0.001, "max_steps": 100},
        "hosts": {"node1": 4},
        "hardware": "CPU",
        "versions": {"keepstep": "0.2.0"},
        "code": {"commit": "ab12" * 10, "changed": "2"},
        **changes,
    }
    return Launched(**values)  # type: ignore[arg-type]


def begin(run: Path, **changes: object) -> RunWriter:
    writer = RunWriter(RunFolder(run), Policy(), Storage())
    writer.start()
    writer.keep_launched(launched(writer.attempt, **changes))
    return writer


def failed(run: Path) -> None:
    status = {"reason": "ValueError: no such\ncolumn", "global_step": None, "best_step": None}
    begin(run).end({"outcome": "failed", **status, "exit": 70})


def damaged(run: Path) -> None:
    identify(run)
    for step in (10, 20):
        manifest = commit(run, step) / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"attempt": 1', '"attempt": 2'))


def of_stock(run: Path) -> None:
    for step in (500, 1000):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}/trainer_state.json").write_text("{}")


def of_runs(run: Path) -> None:
    for name in ("b", "a"):
        identify(run / name)


def told(command: str, run: Path) -> tuple[int, str]:
    done = runner.invoke(app, [command, str(run)])
    return done.exit_code, done.output.replace(str(run), "RUN")


@pytest.mark.parametrize(
    ("make", "ls", "which", "verify"),
    [
        (
            *(failed, "RUN: no checkpoint is committed yet: failed (attempt 1, exit status 70)"),
            *("auto takes the beginning", "RUN: no checkpoint is committed yet: failed"),
        ),
        (lambda run: run.mkdir(), *["keepstep: RUN is empty: no run has begun there"] * 3),
        (of_runs, *["keepstep: RUN is a folder of runs: a, b\n    Hint: name one: RUN/a"] * 3),
        (
            of_stock,
            *[
                "keepstep: RUN is no run of keepstep: a stock Trainer has written checkpoint-500, "
                "checkpoint-1000\n    Hint: keepstep adopt RUN/checkpoint-1000 --into NEW_RUN"
            ]
            * 3,
        ),
        (
            *(damaged, "RUN: none of 2 checkpoints can be taken; each says why"),
            *("auto: 2 checkpoints exist and none is valid", "checkpoint-10: "),
        ),
    ],
    ids=["failed", "empty", "of runs", "stock", "damaged"],
)
def test_where_nothing_is_listed_it_is_said_why(
    tmp_path: Path, make: object, ls: str, which: str, verify: str
) -> None:
    run = tmp_path / "run"
    make(run)  # type: ignore[operator]
    for command, text in zip(LOOKS, (ls, which, verify), strict=True):
        status, output = told(command, run)
        assert text in output, command
        no_run = text.startswith("keepstep: ")
        fine = make is failed and command == "ls"
        assert status == (2 if no_run else 0 if fine else 1), (command, output)
    assert make is not failed or "reason: ValueError: no such column" in told("ls", run)[1]


def test_a_checkpoints_path(tmp_path: Path) -> None:
    place = commit(identify(tmp_path), 10)
    for command in ("ls", "which"):
        assert f"is a checkpoint: name its run, {tmp_path}" in told(command, place)[1]
    assert told("verify", place)[1].startswith("checkpoint-10: valid")


def test_show_tells_what_it_was_and_the_way_on(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    writer.record("resume", request="auto", step=None)
    other = {"learning_rate": 0.002, "max_steps": 100, "new_field": 1}
    writer = begin(tmp_path, recipe=other, command="accelerate launch x.py --a 'b c'")
    writer.record("resume", request="auto", step=None)
    reason = {"reason": "SIGTERM to rank 0", "global_step": 7, "best_step": None}
    writer.end({"outcome": "preempted", **reason, "exit": 75})
    status, output = told("show", tmp_path)
    assert status == 0
    lines = output.splitlines()
    assert lines[0] == "RUN: preempted at step 7 (attempt 2, exit status 75)"
    for line in (
        "  which means:  somebody or something asked for a stop; the state is saved",
        "  reason:       SIGTERM to rank 0",
        "  model:        Qwen/Qwen3-0.6B",
        "  data:         training: data/train.jsonl",
        "  hosts:        node1 (4 processes); CPU",
        "  code:         commit ab12ab12ab12, and 2 files that differ from it",
        "  learning_rate: 0.001 → 0.002",
    ):
        assert line in lines
    assert not any("new_field" in line for line in lines)
    assert lines[-2:] == [
        "the way on:",
        "  cd '/home/me/my runs' && accelerate launch x.py --a 'b c'",
    ]
    shown = json.loads(runner.invoke(app, ["show", str(tmp_path), "--json"]).stdout)
    assert shown["attempts"][1]["changed"] == {"learning_rate": [0.001, 0.002]}
    assert shown["attempts"][1]["launched"]["recipe"] == other


def test_what_it_said(tmp_path: Path) -> None:
    """The last lines of one that failed, in `show`; all of it in `log --said`."""
    begin(tmp_path)
    writer = begin(tmp_path)
    folder = RunFolder(tmp_path)
    for number, words in ((1, "first\n"), (2, "one\n\x1b[2Jtwo\n" + "x\n" * 11)):
        (folder.launched / f"{number}.log").write_text(words)
    (folder.launched / "2.node-1.log").write_text("[rank 8] there\n")
    assert "    | " in told("show", tmp_path)[1]  # no word of its end, and nobody is there
    facts = {"reason": "x", "global_step": None, "best_step": None}
    writer.end({"outcome": "failed", **facts, "exit": 70})
    lines = told("show", tmp_path)[1].splitlines()
    assert "  it said:      keepstep log RUN --said (.keepstep/launched/2.log)" in lines
    assert next(line for line in lines if "    | " in line) == "    | \\x1b[2Jtwo"
    said = runner.invoke(app, ["log", str(tmp_path), "--said"]).stdout.splitlines()
    assert said[:2] == ["one", "\\x1b[2Jtwo"]
    assert said[-2:] == ["[.keepstep/launched/2.node-1.log]", "[rank 8] there"]
    first = runner.invoke(app, ["log", str(tmp_path), "--said", "--attempt", "1", "--json"]).stdout
    assert json.loads(first) == {"attempt": 1, "file": ".keepstep/launched/1.log", "text": "first"}
    assert runner.invoke(app, ["log", str(tmp_path), "--said", "--attempt", "9"]).exit_code == 2
    assert runner.invoke(app, ["log", str(tmp_path), "--said", "--follow"]).exit_code == 2
    only = runner.invoke(app, ["log", str(tmp_path), "--attempt", "1"]).stdout.splitlines()
    assert [line.split()[2] for line in only] == ["1"]
    writer.end({"outcome": "finished", **facts, "reason": None, "exit": 0})
    assert "    | " not in told("show", tmp_path)[1]


def test_a_recipe_that_is_wrong_is_no_way_on_as_it_is(tmp_path: Path) -> None:
    writer = begin(tmp_path)
    writer.record("resume", request="auto", step=None)
    facts = {"reason": "seed: 0 → 9", "global_step": None, "best_step": None}
    writer.end({"outcome": "failed", **facts, "exit": 2}, spent={"startup": 3.0})
    lines = told("show", tmp_path)[1].splitlines()
    assert "the way on, once that is mended:" in lines
    (story,) = [line for line in lines if line.startswith("attempt 1: ")]
    assert story.endswith(", failed (exit status 2), 0 saved")


def test_a_run_that_was_adopted_and_not_launched(tmp_path: Path) -> None:
    commit(identify(tmp_path), 10, attempt=0, origin="a stock Trainer's checkpoint")
    status, output = told("show", tmp_path)
    assert status == 0
    assert output.splitlines()[0] == "RUN: no attempt has begun"
    assert "attempt 0" not in output
    assert told("log", tmp_path) == (
        *(0, "RUN: nothing is written down: there is no events.jsonl\n"),
    )
    assert told("goodput", tmp_path) == (0, "RUN: no attempt has begun\n")


@pytest.mark.parametrize("instead", ["", "{", '{"attempt": 1}', "[" * 9999])
def test_what_cannot_be_believed_of_a_launch_is_not_told(tmp_path: Path, instead: str) -> None:
    begin(tmp_path)
    file = RunFolder(tmp_path).launched / "1.json"
    assert list(launched_of(RunFolder(tmp_path))) == [1]
    file.write_text(instead)
    (file.parent / "x.json").write_text("{}")
    file.with_name("2.json").symlink_to(file)
    assert launched_of(RunFolder(tmp_path)) == {}
    assert told("show", tmp_path)[0] == 0


def test_a_field_that_one_version_lacks_has_not_changed() -> None:
    assert changed({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {"b": (2, 3)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--hub_token abc --eos_token <s>", "--hub_token *** --eos_token <s>"),
        ("--hub-token=abc x", "--hub-token=*** x"),
        ("s3://me:pass@host/b", "s3://me:***@host/b"),
        ("use hf_abcdefghijklmnop now", "use *** now"),
        ("key is topsecret1", "key is ***"),
        ("--sample_max_new_tokens 64", "--sample_max_new_tokens 64"),
    ],
)
def test_no_secret_is_written_down(text: str, expected: str) -> None:
    assert hidden(text, {"WANDB_API_KEY": "topsecret1", "PATH": "/usr/bin"}) == expected


@pytest.mark.parametrize("name", ["hub_token", "api-key", "aws_secret_access_key", "password"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
