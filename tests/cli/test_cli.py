from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from keepstep.cli.look import _verify
from keepstep.cli.main import app
from keepstep.policy.batch import Batch, Dealt
from keepstep.policy.retention import Record
from keepstep.policy.samples import Sample, lines_of
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import commit, identify

runner = CliRunner()
T35, T40 = (f"2026-11-25T05:{minute}:00.000+00:00" for minute in ("00", "02"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    identify(tmp_path, limit=3, ranking="metric", metric="eval_loss")
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5)):
        commit(tmp_path, step, metrics={"eval_loss": loss})
    return tmp_path


def test_which_names_a_few_of_many_older_ones(tmp_path: Path) -> None:
    identify(tmp_path)
    for step in range(1, 1301):
        commit(tmp_path, step)
    told = runner.invoke(app, ["which", str(tmp_path), "latest"]).stdout
    assert told.splitlines()[1:] == ["  not checkpoint-1, 2, 3, 4, 5, and 1,294 more: older"]


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


@pytest.mark.parametrize("flags", [[], ["--json"], ["--verbose"]])
def test_ls_of_a_run_that_saves_meanwhile(
    run: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is told is of one look: a checkpoint that came behind its back was a traceback."""
    records = RunFolder.records

    def slow(self: RunFolder, metric: str | None) -> list[Record]:
        found = records(self, metric)
        commit(run, 40, attempt=2)
        return found

    monkeypatch.setattr(RunFolder, "records", slow)
    told = runner.invoke(app, ["ls", str(run), *flags])
    assert told.exit_code == 0, told.output
    assert "checkpoint-40" not in told.output
    assert len(RunFolder(run).checkpoints()) == 4


def test_ls_tells_jobs(run: Path) -> None:
    facts = {"attempt": 1, "time": "2026-11-25T09:30:51.989+00:00"}
    job = {"job": "17", "nodes": "n[1-2]", "restarts": 2}
    lines = [
        {**facts, "event": "attempt", **job},
        {**facts, "event": "resume", "request": "auto", "step": None},
        {**facts, "event": "end", "outcome": "preempted", "global_step": 30},
    ]
    events = run / ".keepstep/events.jsonl"
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = runner.invoke(app, ["ls", str(run)]).stdout.splitlines()
    title, row = told[-2:]
    assert title.split()[:4] == ["attempt", "began", "(UTC)", "job"]
    assert row.split() == [
        *("1", "2026-11-25", "09:30:51", "17", "2", "n[1-2]", "step", "0", "1"),
        *("preempted", "at", "step", "30"),
    ]
    rows = json.loads(runner.invoke(app, ["ls", str(run), "--json"]).stdout)
    assert rows[0]["job"] == job


def test_check(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: a/b\ndataset_name: c/d\noutput_dir: run\n")
    result = runner.invoke(app, ["check", str(recipe)])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{recipe}: no mistake found\nlooked at: ")
    flags = ["--save_total_limit", "1", "--save_interval_seconds", "0"]
    result = runner.invoke(app, ["check", str(recipe), *flags])
    assert result.exit_code == 2
    assert "the recipe has 2 problems" in result.stdout
    assert "save_total_limit: 1 keeps the newest checkpoint only" in result.stdout
    assert "save_interval_seconds: 0 is not above 0" in result.stdout


def test_check_reckons_with_what_saves_have_cost(run: Path, tmp_path: Path) -> None:
    """`auto` would be 100 minutes, in jobs of two hours; in those of ten there is no word of it."""
    line = {"time": "2026-11-26T12:00:00+00:00", "attempt": 1, "event": "commit", "step": 20}
    line |= {"stall": 60.0, "write": 50.0}
    (run / ".keepstep/events.jsonl").write_text(json.dumps(line) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: a/b\ndataset_name: c/d\noutput_dir: {run}\nsave_strategy: 'no'\n"
        "save_interval_seconds: auto\n"
    )
    told = runner.invoke(app, ["check", str(recipe), "--walltime", "7200"]).stdout
    assert "a save every 6000 s in jobs of 7200 s" in told
    assert "Hint: a higher max_save_overhead, or save_interval_seconds: 720" in told
    told = runner.invoke(app, ["check", str(recipe), "--walltime", "36000"]).stdout
    assert "a save every" not in told


def test_verify_names_what_is_wrong(run: Path) -> None:
    assert runner.invoke(app, ["verify", str(run)]).exit_code == 0
    (run / "checkpoint-20/rng_state_1.pth").unlink()
    result = runner.invoke(app, ["verify", str(run)])
    assert result.exit_code == 1
    assert "checkpoint-20: rng_state_1.pth is missing" in result.stdout
    assert "checkpoint-10: valid" in result.stdout
    assert runner.invoke(app, ["verify", str(run / "checkpoint-30")]).exit_code == 0
    assert runner.invoke(app, ["verify", str(run / "checkpoint-20")]).exit_code == 1


def test_verify_of_a_run_that_prunes_meanwhile(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was listed, and is gone when its files are looked at, is no fault of the run."""
    folder = RunFolder(run)
    listed = folder.checkpoints()
    shutil.rmtree(run / "checkpoint-10")
    _verify(folder, listed, str(run), None, deep=True, as_json=False)
    told = capsys.readouterr().out
    assert "checkpoint-10" not in told
    assert "checkpoint-20: valid" in told
    with pytest.raises(typer.Exit):
        _verify(folder, listed[:1], str(run), "checkpoint-10", deep=True, as_json=False)
    assert "checkpoint-10: it is not there any more" in capsys.readouterr().out


def test_verify_deep_reads_every_byte(run: Path) -> None:
    weights = run / "checkpoint-10/model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert runner.invoke(app, ["verify", str(run)]).exit_code == 0
    result = runner.invoke(app, ["verify", str(run), "--deep", "--json"])
    assert result.exit_code == 1
    assert [name for name, faults in json.loads(result.stdout).items() if faults] == [
        "checkpoint-10"
    ]


def test_what_a_command_does_is_said_in_one_line() -> None:
    """A line end within it would stay one, wherever a terminal wraps."""
    app_commands = [command.callback.__doc__ or "" for command in app.registered_commands]
    assert [text for text in app_commands if "\n" in text.strip()] == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    result = runner.invoke(app, ["ls", str(tmp_path / "nope")])
    assert result.exit_code == 2
    assert "there is no folder" in result.stdout


def test_which_tells_what_each_choice_loses(run: Path) -> None:
    told = runner.invoke(app, ["which", str(run)]).stdout
    assert "auto takes checkpoint-30: eval_loss 1.5000, no step to repeat, 0.5000 worse" in told
    assert (
        "best takes checkpoint-20: eval_loss 1.0000, 10 steps to repeat, the best there is" in told
    )
    (run / "checkpoint-30/rng_state_0.pth").unlink()
    told = runner.invoke(app, ["which", str(run), "auto"]).stdout
    assert "auto takes checkpoint-20" in told
    assert "not checkpoint-30: rng_state_0.pth is missing" in told
    assert (run / "checkpoint-30").is_dir(), "which changes nothing"
    answer = json.loads(runner.invoke(app, ["which", str(run), "10", "--json"]).stdout)[0]
    assert (answer["step"], answer["loses_steps"], answer["loses_metric"]) == (10, 20, 1.0)


def test_which_says_what_cannot_be_had(run: Path) -> None:
    result = runner.invoke(app, ["which", str(run), "15"])
    assert result.exit_code == 1
    assert "15 cannot be had; there are checkpoints at: 30, 20, 10" in result.stdout
    assert runner.invoke(app, ["which", str(run), "sometimes"]).exit_code == 2


def test_which_says_how_so_many_processes_share_out_a_step(run: Path) -> None:
    asked = ["which", str(run), "auto", "--num_processes"]
    assert "what it was is not known" in runner.invoke(app, [*asked, "3"]).stdout
    batch = Batch(6, 1, 2)
    commit(run, 40, dealt=Dealt(batch, batch, 64).as_json())
    three = runner.invoke(app, [*asked, "3"])
    assert three.exit_code == 0
    assert "on 3 processes: 12 rows a step (3 x 4, 1 accumulated)" in three.stdout
    five = runner.invoke(app, [*asked, "5"])
    assert five.exit_code == 1
    assert "launch 1, 2, 3, 4, 6 or 12 processes" in five.stdout
    assert "accept 10 rows a step (5 x 2, 1 accumulated): allow_batch_change: true" in five.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        *(["which", "RUN", "--num_processes", count] for count in ("0", "-1")),
        *(["ls", "RUN", "--mtbf_hours", hours] for hours in ("0", "-3", "nan", "inf")),
        *(["check", "r.yaml", "--walltime", seconds] for seconds in ("0", "nan")),
        ["check", "r.yaml", "--num_processes", "0"],
        ["estimate", "r.yaml", "--num_processes", "0"],
    ],
)
def test_numbers_that_there_cannot_be(run: Path, arguments: list[str]) -> None:
    told = runner.invoke(app, [str(run) if word == "RUN" else word for word in arguments])
    assert told.exit_code == 2
    assert f"Invalid value for '{arguments[2]}'" in told.output


def test_an_estimate_without_a_config_says_what_to_do(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {tmp_path / 'none'}\noutput_dir: {tmp_path / 'run'}\n")
    told = runner.invoke(app, ["estimate", str(recipe)])
    assert told.exit_code == 2
    assert "cannot be had from its config.json" in told.output.replace("\n", " ")
    assert "--model_name_or_path FOLDER" in told.output.replace("\n", " ")


@pytest.mark.parametrize("command", ["ls", "which", "push", "prune", "pin", "save-now", "stop"])
def test_a_checkpoint_is_no_run(run: Path, command: str) -> None:
    """Not an empty one: its run is named."""
    more = ["10"] if command == "pin" else []
    for name in ("checkpoint-10", "best"):
        (run / "best").unlink(missing_ok=True)
        (run / "best").symlink_to("checkpoint-20")
        told = runner.invoke(app, [command, str(run / name), *more])
        assert told.exit_code == 2
        assert f"{name} is a checkpoint: name its run, {run}" in told.output.replace("\n", " ")
        assert not (run / "checkpoint-10/.keepstep").exists()


@pytest.mark.parametrize("place", ["checkpoint-10/model", "checkpoint-99", ".keepstep/model"])
def test_no_export_lies_where_a_run_would_prune_it(run: Path, place: str) -> None:
    told = runner.invoke(app, ["export", str(run / "checkpoint-10"), "--to", str(run / place)])
    assert told.exit_code == 2
    assert f"among the checkpoints of {run}" in told.output.replace("\n", " ")
    assert not (run / place).exists()


def test_an_export_in_no_precision_that_there_is(run: Path) -> None:
    to = run.parent / "made"
    told = runner.invoke(
        app, ["export", str(run / "checkpoint-10"), "--to", str(to), "--dtype", "int8"]
    )
    assert told.exit_code == 2
    assert told.stdout == "keepstep: dtype: int8 is none of bf16, fp16, fp32\n"
    assert not to.exists()


def test_pin_unpin_and_prune(run: Path) -> None:
    identify(run, limit=1, ranking="recency", metric="eval_loss")
    pinned = runner.invoke(app, ["pin", str(run), "10"])
    assert pinned.exit_code == 0
    assert pinned.stdout == "checkpoint-10 is pinned: nothing prunes it before `keepstep unpin`\n"
    assert runner.invoke(app, ["pin", str(run), "11"]).exit_code == 2
    dry = runner.invoke(app, ["prune", str(run), "--dry-run"]).stdout
    assert dry.startswith(
        "would remove checkpoint-20: beyond save_total_limit\nthe run folder took "
    )
    assert (run / "checkpoint-20").is_dir()
    assert runner.invoke(app, ["prune", str(run)]).exit_code == 0
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-30"]
    assert runner.invoke(app, ["prune", str(run)]).stdout == "nothing to prune\n"
    assert runner.invoke(app, ["unpin", str(run), "10"]).exit_code == 0
    assert runner.invoke(app, ["unpin", str(run), "10"]).exit_code == 2
    runner.invoke(app, ["prune", str(run)])
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-30"]


@pytest.mark.parametrize("command", ["pin", "unpin", "rm"])
def test_a_step_may_be_named_as_its_folder_is(run: Path, command: str) -> None:
    identify(run, metric="eval_loss")
    if command == "unpin":
        runner.invoke(app, ["pin", str(run), "10"])
    other = runner.invoke(app, [command, str(run), "best"], env={"COLUMNS": "200"})
    assert other.exit_code == 2
    assert "best is no step: 60, say, or checkpoint-60, as `keepstep ls` has it" in other.output
    assert runner.invoke(app, [command, str(run), "checkpoint-11/"]).exit_code == 2
    assert runner.invoke(app, [command, str(run), "checkpoint-10/"]).exit_code == 0
    assert (run / "checkpoint-10").is_dir() is (command != "rm")


@pytest.mark.parametrize(
    "command",
    [["pin", "20"], ["stop"], ["save-now"], ["prune"], ["rm", "20"], ["ls"], ["verify"], ["push"]],
)
def test_nothing_is_done_through_a_link_in_keepsteps_place(
    run: Path, tmp_path_factory: pytest.TempPathFactory, command: list[str]
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "theirs"
    (run / ".keepstep").rename(elsewhere)
    (run / ".keepstep").symlink_to(elsewhere)
    before = sorted(path.name for path in elsewhere.rglob("*"))
    name, *more = command
    told = runner.invoke(app, [name, str(run), *more])
    assert told.exit_code == 2
    assert f"keepstep: {run}/.keepstep is a link, which is not followed" in told.stdout
    assert sorted(path.name for path in elsewhere.rglob("*")) == before
    one = runner.invoke(app, ["verify", str(run / "checkpoint-20")])
    assert one.exit_code == 2
    assert "is a link" in one.stdout


def test_a_link_in_the_place_of_a_file_is_named(run: Path, tmp_path: Path) -> None:
    (run / ".keepstep/pins").mkdir()
    (run / ".keepstep/pins/20").symlink_to(tmp_path / "new")
    told = runner.invoke(app, ["pin", str(run), "20"])
    assert told.exit_code == 1
    assert f"{run}/.keepstep/pins/20: it is a link, which is not followed" in told.stdout
    assert not (tmp_path / "new").exists()


def test_a_job_that_is_queued_can_be_stopped(tmp_path: Path) -> None:
    """What submit.sh has made, before the first attempt; and until the job has come to its end."""
    job, private = tmp_path / ".keepstep/job", tmp_path / ".keepstep"
    job.mkdir(parents=True)
    (job / "id").write_text("17\n")
    told = runner.invoke(app, ["stop", str(tmp_path)])
    assert told.exit_code == 0, told.stdout
    assert "asked for: job 17 ends before its next attempt; scancel 17 ends it now" in told.stdout
    assert (private / "stop").read_bytes() == b""
    told = runner.invoke(app, ["save-now", str(tmp_path)])
    assert (told.exit_code, (private / "save-now").exists()) == (2, False)
    assert "job 17 is not at work now, there is nothing to save" in told.stdout
    (job / "ended").write_text("75\n")
    told = runner.invoke(app, ["stop", str(tmp_path)])
    assert (told.exit_code, told.stdout) == (
        2,
        f"keepstep: {tmp_path}: no attempt has begun, there is nobody to ask\n",
    )


@pytest.mark.parametrize("kind", ["a link", "a folder"])
def test_nothing_is_asked_for_through_what_lies_in_the_requests_place(
    run: Path, tmp_path: Path, kind: str
) -> None:
    job, stop = run / ".keepstep/job", run / ".keepstep/stop"
    job.mkdir()
    (job / "id").write_text("17\n")
    stop.symlink_to(tmp_path / "theirs") if kind == "a link" else stop.mkdir()
    told = runner.invoke(app, ["stop", str(run)])
    assert told.exit_code == 1
    assert str(stop) in told.stdout
    assert not (tmp_path / "theirs").exists()


def test_ls_shows_branches_and_strangers(run: Path) -> None:
    commit(run, 15, attempt=2, parent=10)
    (run / "checkpoint-99").mkdir()
    told = runner.invoke(app, ["ls", str(run)]).stdout
    assert "attempt 2 from 10" in told
    assert told.count("abandoned branch, not counted") == 2
    assert "checkpoint-99: it has no manifest.json: keepstep did not commit it" in told


def test_ls_verbose_tells_what_saves_cost(run: Path) -> None:
    save = {"stall": 0.05, "wait": 0.0, "copy": 0.1, "write": 0.9, "digest": 0.04, "commit": 0.2}
    save["read_back"] = 0.15
    facts = {"bytes": 2_150_000_000, "gb_per_s": 2.4, "slowest_rank": 1, **save}
    line = {"time": "2026-11-26T12:00:00+00:00", "attempt": 1, "event": "commit"}
    line |= {"step": 20, **facts}
    other = line | {"attempt": 7, "stall": 9.0}  # of a checkpoint that was replaced
    log = run / ".keepstep/events.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in (line, other)))
    told = runner.invoke(app, ["ls", str(run), "--verbose"]).stdout
    assert "0.050  0.000  0.100  0.900   0.040      0.150   0.200  2.400             1" in told
    assert "9.000" not in told
    rows = json.loads(runner.invoke(app, ["ls", str(run), "--json"]).stdout)
    assert [row["save"].get("stall") for row in rows] == [None, 0.05, None]


def test_ls_verbose_suggests_an_interval(run: Path) -> None:
    log = run / ".keepstep/events.jsonl"
    lines = [
        {
            "time": f"2026-11-25T04:{minute}:00.000+00:00",
            "attempt": 1,
            "event": "commit",
            "step": step,
            "bytes": 1,
            "stall": 0.5,
        }
        for step, minute in ((10, "00"), (20, "05"), (30, "10"))
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = runner.invoke(app, ["ls", str(run), "--verbose", "--mtbf_hours", "10"]).stdout
    assert "a step takes 30.00 s, and a failure loses up to 10 steps (300 s)" in told
    # sqrt(2 * 0.5 s * 36,000 s) = 190 s
    assert "one failure in 10 hours a save every 189 s (6 steps) loses least" in told
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (
        run / "checkpoint-20/manifest.json"
    ).unlink()  # as if it were pruned: it was saved all the same
    told = runner.invoke(app, ["ls", str(run), "--verbose"]).stdout
    assert "a step takes 30.00 s, and a failure loses up to 10 steps (300 s)" in told
    later = [{**lines[-1], "attempt": 2, "step": s, "time": t} for s, t in ((35, T35), (40, T40))]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *later, later[-1]]))
    told = runner.invoke(app, ["ls", str(run), "--verbose"]).stdout
    assert "a failure loses up to 5 steps (150 s)" in told, "as the newest attempt saves"
    log.write_text("")
    assert "too few saves" in runner.invoke(app, ["ls", str(run), "--verbose"]).stdout


def test_samples(tmp_path: Path) -> None:
    """Those of the newest evaluation; of a prompt from step to step; nothing in them steers."""
    answers = [
        Sample(step, number, f"ask\n{number}", f"told {step}\x1b[2J", "told 4\x1b[2J")
        for step in (2, 4)
        for number in (1, 2)
    ]
    run = identify(tmp_path / "run")
    assert "no completions yet" in runner.invoke(app, ["samples", str(run)]).stdout
    (run / "samples.jsonl").write_text("\n".join(lines_of(answers, 1, "now")) + "\ntorn")
    told = runner.invoke(app, ["samples", str(run)]).stdout
    assert told.startswith(
        "step 4, prompt 1, matches\n< ask\n< 1\n> told 4\\x1b[2J\nstep 4, prompt 2"
    )
    told = runner.invoke(app, ["samples", str(run), "--number", "2"]).stdout
    assert re.findall(r"^step .+$", told, re.M) == [
        "step 2, prompt 2, differs",
        "step 4, prompt 2, matches",
    ]
    assert (
        "of that step or prompt" in runner.invoke(app, ["samples", str(run), "--step", "3"]).stdout
    )
    (run / "samples.jsonl").unlink()
    (run / "samples.jsonl").mkdir()
    answer = runner.invoke(app, ["samples", str(run)])
    assert answer.exit_code == 2
    assert "samples.jsonl cannot be read: it is a folder, no file" in answer.stdout
