"""What reaches a terminal is data: no markup, no control sequence, whatever a name or reason is."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.output.printable import HIDDEN, printable
from keepstep.output.table import Column, Table
from keepstep.output.terminal import Terminal, bar_text, complain, progress_bar, warnings_as_lines
from keepstep.policy.manifest import FileEntry
from tests.helpers.folders import commit, identify, manifest
from tests.project.test_imports import modules
from tests.recipe.test_config import MINIMAL

HOSTILE = (
    "[/x] [bold]b[/bold] [lr=1e-4] :smile: \x1b]0;t\x07\x1b[2J\x9b31m\r\n\x7f\u202egnp\u2066"
    "\u200b\u2028"
)
SHOWN = (
    r"[/x] [bold]b[/bold] [lr=1e-4] :smile: \x1b]0;t\x07\x1b[2J\x9b31m\r\n\x7f\u202egnp\u2066"
    r"\u200b\u2028"
)
NAME = HOSTILE.replace("/", "|")  # of a file
FILE = "[|x] [bold]b[|bold] :smile: [lr=1e-4]"  # of a file that a manifest may list
runner = CliRunner()


def unseen(text: str) -> list[str]:
    """The characters of an output that a terminal would not show; ends of lines aside."""
    return [c for c in text if c != "\n" and unicodedata.category(c) in HIDDEN]


@given(st.text(st.characters()) | st.just(HOSTILE))
def test_printable(text: str) -> None:
    told = printable(text)
    assert unseen(told) == []
    assert "\n" not in told
    told.encode()
    assert printable(told) == told
    if text.isprintable() and not unseen(text):
        assert told == text


def test_bytes_that_are_no_text() -> None:
    assert printable(os.fsdecode(b"a\xff\xfe")) == r"a\xff\xfe"
    assert printable("\ud800") == r"\ud800"
    assert printable("größer 🙂 中文") == "größer 🙂 中文"


# The ways out: everything else goes through these.
EXEMPT = {"output.terminal"}
RICH = {"cell_len", "BarColumn", "Progress", "TaskID", "TimeRemainingColumn"}
PRINTS = {"print", "print_exc", "print_exception", "print_json", "status", "rule", "secho"}


def ways_out(tree: ast.Module) -> list[str]:
    """What a module prints by itself, or makes of rich that does."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich":
            found += [alias.name for alias in node.names if alias.name not in RICH]
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "rich"]
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        call = ast.unparse(node)
        for_programs = re.match(r"(print|typer\.echo)\((json\.dumps\(|__version__\))", call)
        prints = name in PRINTS or call.startswith("typer.echo") or name in ("Progress", "Console")
        if (prints and not for_programs) or re.match(r"sys\.std(out|err)\.write", call):
            found.append(call)
    return found


def test_there_is_one_way_out() -> None:
    trees = {name: ast.parse(path.read_text()) for name, path in modules().items()}
    found = {name: ways_out(tree) for name, tree in trees.items() if name not in EXEMPT}
    assert {name: calls for name, calls in found.items() if calls} == {}
    assert ways_out(trees["output.terminal"]) != []  # it would be seen


def test_everything_of_a_terminal_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(width=400)
    terminal.tell(HOSTILE)
    terminal.tell_lines(f"one\n{HOSTILE.replace(chr(10), '')}")
    table = Table(Column(HOSTILE))
    table.add_row(HOSTILE)
    terminal.table(table)
    complain(HOSTILE)
    captured = capsys.readouterr()
    assert unseen(captured.out + captured.err) == []
    lines = captured.out.splitlines()
    assert lines[:2] == [SHOWN, "one"]
    assert lines[2] == SHOWN.replace(r"\n", "")
    assert captured.out.count(SHOWN) == 3


def test_bars_and_spinners_are_data_too(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(width=400, force_terminal=True, color_system=None)
    with progress_bar(terminal, HOSTILE, after=0) as progress:
        progress(1, 2)
    with terminal.waiting(HOSTILE, after=0):
        pass
    with terminal.bar(bar_text("{task.description}")) as bar:
        bar.add_task("[/x]", total=1)
    captured = capsys.readouterr()
    assert captured.err.count(SHOWN) >= 2
    out = captured.out + captured.err
    assert "[/x]" in out
    assert not set(unseen(re.sub(r"\x1b\[\??\d*[a-zA-Z]", "", out))) - {"\r"}


def test_warnings_are_data(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("keepstep")
    handlers, propagates = list(logger.handlers), logger.propagate
    try:
        warnings_as_lines()
        logging.getLogger("keepstep.save.saver").warning("%s\nsecond", HOSTILE)
    finally:
        logger.handlers, logger.propagate = handlers, propagates
    assert capsys.readouterr().err == f"{SHOWN}\nsecond\n".replace(r"\n", "\n", 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose folder, files, metric, job, reasons and settings are hostile."""
    folder = tmp_path / NAME
    identify(folder, limit=3, ranking="metric", metric=HOSTILE)
    for step, value in ((10, 2.0), (20, 1.0)):
        commit(
            folder,
            step,
            metrics={HOSTILE: value},
            settings={HOSTILE: HOSTILE},
            versions={HOSTILE: HOSTILE},
            about={"base_model": HOSTILE},
            origin=HOSTILE,
            saved_at=HOSTILE,
        )
    missing = {FILE: FileEntry(0, 1, "0" * 32), "rng_state_1.pth": FileEntry(1, 1, "0" * 32)}
    damaged = manifest(30, files=missing, metrics={HOSTILE: 3.0})
    (commit(folder, 30) / "manifest.json").write_text(damaged.to_json())
    refused = manifest(35, files={NAME: FileEntry(0, 1, "0" * 32)})
    (commit(folder, 35) / "manifest.json").write_text(refused.to_json())
    (folder / "checkpoint-40").mkdir()
    (folder / "checkpoint-40/manifest.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    facts = {"attempt": 1, "time": "2026-11-25T09:30:51.989+00:00"}
    job = {"job": HOSTILE, "nodes": HOSTILE, "restarts": 2}
    lines = [
        {**facts, "event": "attempt", **job},
        {**facts, "event": "resume", "request": "auto", "step": None},
        {**facts, "event": "end", "outcome": HOSTILE, "reason": HOSTILE, "global_step": 30},
    ]
    events = folder / ".keepstep/events.jsonl"
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


COMMANDS = [
    ["ls", "RUN"],
    ["ls", "RUN", "--verbose"],
    ["which", "RUN"],
    ["which", "RUN", "latest"],
    ["which", "RUN", HOSTILE],
    ["which", "RUN", "--num_processes", "3"],
    ["status", "RUN"],
    ["status", "RUN", "--field", HOSTILE],
    ["status", "RUN", "--field", "owner"],
    ["verify", "RUN"],
    ["verify", "RUN", "--deep"],
    ["verify", "RUN/checkpoint-30"],
    ["prune", "RUN"],
    ["prune", "RUN", "--dry-run"],
    ["prune", "RUN", "--quarantine", "--leftovers"],
    ["rm", "RUN", "30"],
    ["pin", "RUN", "7"],
    ["unpin", "RUN", "7"],
    ["stop", "RUN"],
    ["save-now", "RUN/none"],
    ["export", "RUN/checkpoint-30", "--to", "RUN/x"],
    ["export", "RUN/checkpoint-20", "--to", "RUN/x", "--dtype", HOSTILE],
    ["push", "RUN", "--dry-run", "--repo_id", HOSTILE],
    ["push", "RUN", "--card", HOSTILE],
    ["reshard", "RUN/checkpoint-20", "--to", "RUN/x", "--num_processes", "3"],
    ["reshard", "RUN", "--to", "RUN/x", "--num_processes", "3"],
    ["adopt", "RUN", "--into", "RUN/x"],
    ["adopt", "RUN/checkpoint-20", "--into", "RUN/x"],
    ["check", "RUN/recipe.yaml"],
    ["check", "RUN/recipe.yaml", "--config_file", "RUN"],
    ["check", "RUN/none.yaml"],
    ["check", "RUN/recipe.yaml", f"--{HOSTILE}", HOSTILE],
    ["estimate", "RUN/recipe.yaml"],
]


@pytest.mark.parametrize(
    "command",
    COMMANDS,
    ids=lambda c: " ".join(c[:2] + c[3:4])[:40].encode("unicode_escape").decode(),
)
def test_no_command_hands_on_what_steers_a_terminal(run: Path, command: list[str]) -> None:
    recipe = MINIMAL | {"model_name_or_path": f"./{HOSTILE}", "run_name": HOSTILE}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"report_to": "none"}))
    argv = [part.replace("RUN", str(run)) for part in command]
    done = runner.invoke(app, argv)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert unseen(done.output) == []
    if command[:2] == ["verify", "RUN"]:
        assert f"checkpoint-30: {FILE} is missing" in done.output


@pytest.mark.parametrize("command", [["ls"], ["which"], ["verify"]])
def test_programs_are_told_what_is(run: Path, command: list[str]) -> None:
    done = runner.invoke(app, [*command, str(run), "--json"])
    assert done.output.isascii()
    found = json.loads(done.output)
    if command == ["verify"]:
        assert any(FILE in fault for fault in found["checkpoint-30"])
    else:
        assert {row["metric"] for row in found} == {HOSTILE}


def test_square_brackets_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "exp[lr=1e-4]"
    folder.mkdir()
    done = runner.invoke(app, ["ls", str(folder)])
    assert done.output.startswith(f"keepstep: {folder} is empty: no run has begun there\n")


def shell(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [
        sys.executable,
        "-c",
        "from keepstep.cli.main import main; main()",
        *arguments,
    ]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_are_no_text_and_encodings_without_a_character(
    run: Path, encoding: str, tmp_path: Path
) -> None:
    """80 columns wide; a folder whose name is no UTF-8; a stream that cannot show an arrow."""
    folder = os.fsencode(tmp_path) + b"/r\xff\x1b[2J \xe2\x86\x92"
    os.rename(run, folder)
    for command in ("ls", "verify"):
        done = shell(command, folder, PYTHONIOENCODING=encoding, COLUMNS="80")
        assert done.stderr == b""
        assert done.returncode == (0 if command == "ls" else 1)
        assert unseen(done.stdout.decode(encoding)) == []
    done = shell("ls", folder + b"/none", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert rb"r\xff\x1b[2J" in done.stdout
    done = shell("ls", folder, b"--\x1b[2J\xff", PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    assert rb"\x1b[2J\xff" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
