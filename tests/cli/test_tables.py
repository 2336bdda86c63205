"""What `keepstep ls` shows in a terminal of 80 columns, whatever stands in the log."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from keepstep.cli.tables import (
    attempt_table,
    checkpoint_table,
    pace_hint,
    save_hint,
    save_table,
    short_figure,
)
from keepstep.output.terminal import Terminal
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import commit, identify

SAVE: dict[str, Any] = {"attempt": 1, "event": "commit", "bytes": 2_150_000_000, "gb_per_s": 2.4}
SAVE |= {"stall": 0.05, "wait": 12.34, "copy": 0.1, "write": 123.9, "digest": 0.04}
SAVE |= {"read_back": 0.15, "commit": 0.2, "slowest_rank": 1}
HUGE = 10**20
TITLES = ["(UTC)", "state", "kept", "because"]
END = {"attempt": 1, "event": "end", "outcome": "x" * 5000, "global_step": HUGE}


def run_of(folder: Path, metric: str, *more: dict[str, Any]) -> RunFolder:
    identify(folder, limit=3, ranking="metric", metric=metric)
    for step in (100_000, 200_000, 300_000):
        commit(folder, step, metrics={metric: 1 + 1 / step})
    lines = [{**SAVE, "step": step} for step in (100_000, 300_000)]
    lines[1]["time"] = "2026-11-25T04:20:00.000+00:00"
    text = (json.dumps({"time": "2026-11-25T04:00:00.000+00:00"} | a) for a in (*lines, *more))
    (folder / ".keepstep/events.jsonl").write_text("".join(f"{line}\n" for line in text))
    return RunFolder(folder)


def shown(make: Any, run: RunFolder, width: int, is_terminal: bool = True) -> list[str]:
    file = io.StringIO()
    terminal = Terminal(file=file, force_terminal=is_terminal, width=width, color_system=None)
    terminal.table_that_fits(partial(make, run))
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("metric", ["eval_loss", "eval_mean_token_accuracy"])
def test_checkpoints_take_a_line_each(tmp_path: Path, metric: str) -> None:
    run = run_of(tmp_path, metric)
    wide, narrow = shown(checkpoint_table, run, 200), shown(checkpoint_table, run, 80)
    assert wide[0].split()[:5] == ["step", metric, "size", "written", "by"]
    assert wide[0].endswith("lineage    state  kept because")
    named = metric if metric == "eval_loss" else "metric"
    assert narrow[0].split() == ["step", named, "size", "written", "by", "saved", *TITLES]
    assert len(narrow) == len(wide) == 4
    assert narrow[3].endswith("2026-11-21 05:00  valid  newest, best")
    assert all(len(line) <= 80 and "…" not in line for line in narrow)
    assert shown(checkpoint_table, run, 200, is_terminal=False) == wide


def test_a_narrow_terminal_shows_what_is_worth_most(tmp_path: Path) -> None:
    run = run_of(tmp_path, "eval_loss")
    (tmp_path / "checkpoint-200000/rng_state_1.pth").unlink()
    narrow = shown(checkpoint_table, run, 40)
    assert narrow[0].split() == ["step", "eval_loss", "state"]
    assert narrow[2].endswith("rng_state_1.pth is m…")
    for width in range(1, 200):
        for table in (checkpoint_table, save_table, attempt_table):
            lines = shown(table, run, width)
            assert all(len(line) <= width for line in lines)
            assert len(lines) == len(table(run).lines())


def test_saves_are_readable(tmp_path: Path) -> None:
    absurd = SAVE | {"step": 200_000, "stall": 1e300, "bytes": 10**24}
    run = run_of(tmp_path, "eval_loss", absurd | {"slowest_rank": HUGE})
    narrow, wide = shown(save_table, run, 80), shown(save_table, run, 200)
    numbers = "2.15 GB   0.05 12.3 0.10   124   0.04      0.15   0.20 2.40"
    assert narrow[1].split() == ["100000", *numbers.split(), "1"]
    assert [len(line.split()) for line in narrow[1:]] == [12, 12, 12]
    assert all(len(line) <= 80 and "…" not in line for line in narrow)
    assert wide[1].split()[3:6] == ["0.050", "12.340", "0.100"]
    assert max(map(len, wide)) < 120
    assert "a save stops training for 0.050 s" in save_hint(run, 24)


def test_why_it_was_saved_and_the_pace_of_auto(tmp_path: Path) -> None:
    pace = {"step": 300_000, "why": "interval", "interval": 12.34, "overhead": 0.00987}
    run = run_of(tmp_path, "eval_loss", SAVE | pace)
    narrow, wide = shown(save_table, run, 80), shown(save_table, run, 200)
    assert [line.split()[-1] for line in narrow[1:]] == ["1", "interval"]
    assert wide[2].endswith("interval")
    assert all(len(line) <= 80 for line in narrow)
    hint = pace_hint(run, 24)
    assert hint is not None
    assert "at last 12.3 s from one save to the next" in hint
    assert "stood still for saves for 0.99 % of the attempt's time" in hint
    assert "Hint" not in hint
    assert pace_hint(RunFolder(tmp_path / "nothing"), 24) is None


def test_saves_that_are_rarer_than_loses_least(tmp_path: Path) -> None:
    """Stalls of a minute, of 1 % of the time, and a failure every hour: sqrt(2 * 60 * 3600) = 657 s
    would lose less; but a disk that is at work for ten minutes cannot do better."""
    cost = {"stall": 60.0, "wait": 0.0, "write": 1.0}
    pace = {"step": 300_000, "interval": 6000.0, "overhead": 0.01}
    hint = pace_hint(run_of(tmp_path / "a", "eval_loss", *3 * [SAVE | cost | pace]), 1)
    assert hint is not None
    assert hint.endswith(
        "Hint: a higher max_save_overhead, or a lower save_min_seconds, loses less."
    )
    hint = pace_hint(run_of(tmp_path / "a", "eval_loss", *3 * [SAVE | cost | pace]), 240)
    assert hint is not None
    assert "Hint" not in hint, "failures are rare"
    slow = cost | {"write": 600.0}
    hint = pace_hint(run_of(tmp_path / "b", "eval_loss", *3 * [SAVE | slow | pace]), 1)
    assert hint is not None
    assert "Hint" not in hint


def test_saves_of_one_moment_or_of_less_than_no_time(tmp_path: Path) -> None:
    run = run_of(tmp_path, "eval_loss", SAVE | {"step": 200_000, "stall": -5.0})
    run.events.write_text(run.events.read_text().replace("04:20", "04:00"))
    assert "too few saves" in save_hint(RunFolder(tmp_path), 24)


@pytest.mark.parametrize("job", [{}, {"job": "17", "nodes": "n[1-2]" * 500, "restarts": HUGE}])
def test_attempts_are_readable(tmp_path: Path, job: dict[str, Any]) -> None:
    run = run_of(tmp_path, "eval_loss", {"attempt": 1, "event": "attempt", **job}, END)
    for width in (80, 200):
        table = shown(attempt_table, run, width)
        assert len(table) < 8
        assert all(len(line) <= width for line in table)
        assert "1e+20" in " ".join(table)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((0, "0.00"), (9.994, "9.99"), (12.34, "12.3"), (123.4, "123")),
        *((99999, "99999"), (1e5, "1e+05"), (-1e300, "-1e+300")),
    ],
)
def test_short_figures(value: float, expected: str) -> None:
    assert short_figure(value) == expected
