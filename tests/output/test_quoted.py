"""A path in a hint: pasted behind a command, it is that path."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.output.printable import printable, quoted
from tests.cli.test_history import begin, of_runs
from tests.helpers.folders import commit, identify
from tests.project.test_imports import modules

ODD = [
    "my run",
    "it's",
    '"so"',
    "-rf",
    "größer 中文",
    "$HOME",
    "~",
    "a;b",
    "*",
    "a\nb",
    "\x1b[2J\\",
]
COMMAND = re.compile(r"(?<!of )keepstep [a-z-]+ $")


def shells() -> list[list[str]]:
    return [[shell, "-c"] for shell in ("bash", "zsh", "sh") if shutil.which(shell)]


def pasted(text: str, shell: list[str]) -> bytes:
    """What a command is given where this is pasted."""
    code = f"printf '%s\\0' {text}"
    done = subprocess.run([*shell, code.encode()], capture_output=True, check=True)
    (argument,) = done.stdout.split(b"\0")[:-1]
    return argument


@pytest.mark.parametrize("shell", shells(), ids=lambda shell: shell[0])
def test_shells_take_it_for_the_path(shell: list[str]) -> None:
    for path in [*ODD, "runs/mine", os.fsdecode(b"a\xff")]:
        if shell[0] == "sh" and printable(path) != path:
            continue  # it has no $'…'
        text = quoted(path)
        assert printable(text) == text
        wanted = f"./{path}" if path.startswith("-") else path
        assert pasted(text, shell) == os.fsencode(wanted)
    assert quoted("runs/mine") == "runs/mine"  # what needs nothing is left as it is
    assert quoted(Path("s3://b/c".replace("//", "/"))) == "s3:/b/c"


@example("\ud800")  # no file is called so, but a JSON text may be
@given(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12))
def test_all_of_it_is_seen(path: str) -> None:
    text = quoted(path)
    assert printable(text) == text


@pytest.mark.parametrize("name", [name for name in ODD if "\n" not in name])
def test_hints_of_commands_can_be_pasted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = begin(Path(name)).run
    commit(run.path, 10, run_id=run.run_id())
    (run.path / ".keepstep/quarantine/1/checkpoint-5").mkdir(parents=True)
    (run.path / ".keepstep/quarantine/1/checkpoint-5/x").write_text("x")
    told = CliRunner().invoke(app, ["ls", "--", name]).output
    (hint,) = re.findall(r"\((keepstep prune .+ --quarantine)\)$", told, re.M)
    words = hint.removeprefix("keepstep prune ").removesuffix(" --quarantine")
    assert pasted(words, shells()[0]) == os.fsencode(f"./{name}" if name[0] == "-" else name)
    of_runs(Path("runs") / name)
    told = CliRunner().invoke(app, ["ls", f"runs/{name}"]).output
    assert f"Hint: name one: {quoted(f'runs/{name}/a')}\n" in told
    identify(Path("failed") / name)
    told = CliRunner().invoke(app, ["ls", f"failed/{name}/checkpoint-5"]).output
    assert "no folder" in told


def test_every_path_behind_a_command_is_quoted() -> None:
    """In every text of the package that has a command with something filled in."""
    found, seen = [], 0
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.JoinedStr):
                continue
            for before, filled in zip(node.values, node.values[1:], strict=False):
                text = str(before.value) if isinstance(before, ast.Constant) else ""
                if not COMMAND.search(text) or not isinstance(filled, ast.FormattedValue):
                    continue
                seen += 1
                if not ast.unparse(filled.value).startswith("quoted("):
                    found.append((name, ast.unparse(node)))
    assert found == []
    assert seen > 10
