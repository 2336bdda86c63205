"""`keepstep report`: of what it is made, where it is written, and what it says where it cannot."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.cli.report import facts_of
from keepstep.run_folder.reader import RunFolder
from tests.cli.test_history import failed
from tests.cli.test_status import begin
from tests.helpers.folders import commit, identify

runner = CliRunner()
LOG = [{"step": 5, "loss": 3.0, "epoch": 0.5}, {"step": 10, "eval_loss": 2.0}, "torn", {"loss": 1}]


def run_report(*arguments: object) -> tuple[int, str]:
    done = runner.invoke(app, ["report", *map(str, arguments)])
    return done.exit_code, " ".join(done.stdout.split())


def a_run(run: Path) -> Path:
    identify(run)
    for step in (10, 20):
        (commit(run, step) / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return run


def test_a_report_of_a_run(tmp_path: Path) -> None:
    run, out = a_run(tmp_path / "run <b>"), tmp_path / "report.html"
    status, said = run_report(run, "--out", out)
    assert status == 0
    assert f"written: {out}" in said
    first = out.read_text()
    assert "run &lt;b&gt;" in first
    assert "Training loss" in first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "run <b>"]
    assert run_report(run, run, a_run(tmp_path / "other"), "--out", out)[0] == 0  # an earlier one
    assert "2 runs side by side" in out.read_text()


def test_without_a_name_it_is_report_html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed(tmp_path / "run")
    assert run_report("run")[0] == 0
    text = (tmp_path / "report.html").read_text()
    assert "failed; 1 attempt" in text
    assert "ValueError: no such column" in text
    assert "There is nothing to draw yet" in text
    assert "Qwen/Qwen3-0.6B" in text


def test_into_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """stdout is the page, as in the file; what is told stands on stderr, errors too."""
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path / "größer")
    done = runner.invoke(app, ["report", str(run), "--out", "-"])
    assert done.exit_code == 0
    assert done.stdout.startswith("<!doctype html>")
    assert done.stdout.rstrip().endswith("</html>")
    assert "größer" in done.stdout
    assert done.stderr.startswith(f"{run}: its end is not known at step 20")
    assert "written" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["größer"]
    wrong = runner.invoke(app, ["report", str(tmp_path / "nowhere"), "--out", "-"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "there is no folder" in wrong.stderr


def test_a_reader_that_goes_away_is_no_error_of_the_report(tmp_path: Path) -> None:
    run, command = a_run(tmp_path / "run"), "from keepstep.cli import command; command()"
    code = '"$0" -c "$1" report "$2" --out - 2>"$3" | head -c 10; exit "${PIPESTATUS[0]}"'
    given = [sys.executable, command, run, tmp_path / "told"]
    done = subprocess.run(["bash", "-c", code, *map(str, given)], capture_output=True)
    assert len(done.stdout) == 10
    assert "Traceback" not in (tmp_path / "told").read_text()
    assert done.returncode in (0, 1, 141)


def test_of_a_run_at_work(tmp_path: Path) -> None:
    begin(tmp_path / "run")  # by this process, which is there
    status, said = run_report(tmp_path / "run", "--out", tmp_path / "r.html")
    assert status == 0
    assert "at work; 1 attempt" in said


def test_what_is_no_run(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    stock = tmp_path / "stock/checkpoint-10"
    stock.mkdir(parents=True)
    (stock / "trainer_state.json").write_text("{}")
    for name, answer in {
        "empty": "is empty: no run has begun there",
        "stock": "a stock Trainer has written checkpoint-10",
        "nowhere": "there is no folder",
        "s3://bucket/run": "this command looks at folders, not at a mirror",
    }.items():
        path = name if "://" in name else tmp_path / name
        status, said = run_report(path, "--out", out)
        assert status == 2
        assert answer in said
    assert not out.exists()


def test_nothing_else_is_replaced(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    mine, link = tmp_path / "mine.html", tmp_path / "link.html"
    mine.write_text("<p>mine")
    link.symlink_to(mine)
    for out, answer in {
        mine: "is there, and is no report of keepstep",
        link: "is no file that could be replaced",
        tmp_path: "is no file that could be replaced",
        tmp_path / "no/r.html": "there is no folder",
        run / ".keepstep/r.html": "is its own",
        run / "checkpoint-10/r.html": "is its own",
    }.items():
        status, said = run_report(run, "--out", out)
        assert status == 2
        assert answer in said
    assert mine.read_text() == "<p>mine"
    assert run_report(run, "--out", run / "report.html")[0] == 0


@pytest.mark.parametrize("state", ["{", "[]", "null", '{"log_history": {"a": 1}}', "[" * 100_000])
def test_curves_that_cannot_be_read_are_left_out(tmp_path: Path, state: str) -> None:
    run = a_run(tmp_path / "run")
    (run / "checkpoint-20/trainer_state.json").write_text(state)
    assert facts_of(RunFolder(run), "run").history == []
    assert run_report(run, "--out", tmp_path / "r.html")[0] == 0


def test_the_line_about_the_end_is_torn(tmp_path: Path) -> None:
    """status.json tells the same end: nothing says that it was killed; and that a line is lost is
    told wherever the log is summed up."""
    run, out = tmp_path / "run", tmp_path / "r.html"
    failed(run)
    log = run / ".keepstep" / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines)[:-20])
    status, said = run_report(run, "--out", out)
    assert status == 0
    lost = f"events.jsonl: 1 of {len(lines)} lines is damaged, and passed by"
    assert lost in said
    assert lost in out.read_text()
    assert "failed; 1 attempt" in said
    assert "kill" not in said
    shown = runner.invoke(app, ["show", str(run)]).stdout
    assert "no word of its end" not in shown
    goodput = " ".join(runner.invoke(app, ["goodput", str(run)]).stdout.split())
    assert f"{lost}: what they told is missing here" in goodput
    as_json = runner.invoke(app, ["goodput", str(run), "--json"]).stdout
    assert json.loads(as_json)["damaged_lines"] == 1


def test_of_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The title is the run's name, not a dot."""
    run = a_run(tmp_path / "mine")
    monkeypatch.chdir(run)
    assert run_report(".", "--out", tmp_path / "r.html")[0] == 0
    assert f"<h1>{run}</h1>" in (tmp_path / "r.html").read_text()


def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was named is told, not the one that was to be renamed to it."""
    run, out = a_run(tmp_path / "run"), tmp_path / "r.html"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        done = runner.invoke(app, ["report", str(run), "--out", str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 1
    assert f"{out}: file too large" in done.output.replace("\n", "")
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
