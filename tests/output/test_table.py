"""Tables keep to a width: a line for each row, and what is left out is worth least."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from keepstep.output.table import MARK, Column, Table, elided
from keepstep.output.terminal import Terminal
from tests.helpers.folders import commit, identify

texts = st.text(max_size=30) | st.sampled_from(
    ["一二三四五六七八九十", "🙂🙂🙂🙂🙂🙂", "e\u0301" * 9]
)
columns = st.builds(
    Column,
    texts,
    st.sampled_from(["left", "right"]),
    worth=st.none() | st.integers(1, 9),
    least=st.none() | st.integers(1, 12),
    elide=st.sampled_from(["end", "middle"]),
)


@given(st.data(), st.lists(columns, min_size=1, max_size=6), st.integers(1, 120), st.booleans())
def test_no_line_is_wider_than_the_terminal(
    data: st.DataObject, of: list[Column], width: int, header: bool
) -> None:
    table = Table(*of, header=header)
    rows = data.draw(st.lists(st.lists(texts, min_size=len(of), max_size=len(of)), max_size=4))
    for row in rows:
        table.add_row(*row)
    lines = table.lines(width)
    assert len(lines) == (len(rows) + header or 1)
    assert all(cell_len(line) <= width for line in lines)
    if table.fits(width):
        assert lines == table.lines()


@given(texts, st.integers(1, 30), st.sampled_from(["end", "middle"]))
def test_a_shortened_text_begins_and_ends_as_it_did(text: str, width: int, elide: str) -> None:
    told = elided(text, width, elide)  # type: ignore[arg-type]
    assert cell_len(told) <= width
    if told != text:
        begin, end = told.split(MARK)[0], told.rpartition(MARK)[2]
        assert text.startswith(begin)
        assert text.endswith(end)


def test_names_lack_their_middle() -> None:
    assert elided("runs/qwen3-8b-lora-of-tuesday", 16, "middle") == "runs/qwe…tuesday"
    assert elided("运行一二三四五六七八", 9, "middle") == "运行…七八"
    assert elided("🙂🙂🙂🙂", 4) == "🙂…"


def example() -> Table:
    table = Table(
        Column("step", "right"), Column("size", "right", worth=1), Column("name", least=8), gap=1
    )
    table.add_row("100", "2.15 GB", "short")
    table.add_row("20", "1 B", "中文的名字很长很长")
    return table


def test_what_is_worth_least_goes_first() -> None:
    assert example().lines() == [
        "step    size name",
        " 100 2.15 GB short",
        "  20     1 B 中文的名字很长很长",
    ]
    assert example().lines(24) == [
        "step    size name",
        " 100 2.15 GB short",
        "  20     1 B 中文的名字…",
    ]
    assert example().lines(16) == ["step name", " 100 short", "  20 中文的名字…"]
    assert max(map(cell_len, example().lines(4))) <= 4


def test_what_is_no_terminal_has_no_margin() -> None:
    file = io.StringIO()
    Terminal(file=file, width=10).table(example())
    assert file.getvalue().splitlines() == example().lines()


LOOK = [sys.executable, "-c", "import keepstep.cli as c; c.command()", "ls"]


def on_a_terminal(command: list[str], columns: int, **environment: str) -> str:
    """What a person would see of it: on a terminal of this width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    given = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    given |= {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=given):
        os.close(theirs)
        told = b""
        try:
            while more := os.read(ours, 65536):
                told += more
        except OSError:  # everybody else has closed it
            pass
    os.close(ours)
    return told.decode()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = identify(tmp_path / "run", limit=3, ranking="metric", metric="eval_loss")
    for step in (10, 20):
        commit(run, step, metrics={"eval_loss": 1 / step})
    return run


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_bold_on_terminals_alone(run: Path, environment: dict[str, str]) -> None:
    seen = on_a_terminal([*LOOK, str(run)], 80, **environment)
    assert ("\x1b[1m" in seen) == (not environment)
    assert ("\x1b" in seen) == (not environment)
    assert "newest, best" in seen


@pytest.mark.parametrize("argument", ["RUN", "--help"])
def test_a_file_gets_no_escapes(run: Path, argument: str) -> None:
    """Also in CI, which sets FORCE_COLOR or GITHUB_ACTIONS."""
    command = [*LOOK, argument.replace("RUN", str(run))]
    forced = {**os.environ, "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=forced, check=True)
    assert "\x1b" not in done.stdout + done.stderr
