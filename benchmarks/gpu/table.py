"""The table that all parts add to, row by row: Markdown for people, JSON lines for programs.

A part that is cut short leaves the rows that it had. Nothing is rewritten.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("what", "measured", "goal", "reached", "note")
COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt}


@dataclass(frozen=True)
class Goal:
    """What a number should be: `Goal("<=", 1.1)`."""

    relation: str
    bound: float

    def holds(self, value: float) -> bool:
        return bool(COMPARE[self.relation](value, self.bound))

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: was looked at.
        value: the number, None where there is none: not run, skipped.
        unit: of it.
        goal: None: there is none, the number stands for itself.
        note: how it was measured, its range, or why there is none.
        failed: something is wrong, whatever the number.
    """

    what: str
    value: float | None
    unit: str = ""
    goal: Goal | None = None
    note: str = ""
    failed: bool = False

    @property
    def reached(self) -> str:
        if self.failed:
            return "FAILED"
        if self.goal is None or self.value is None:
            return ""
        return "yes" if self.goal.holds(self.value) else "NO"

    def markdown(self) -> str:
        measured = "" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        goal = "" if self.goal is None else f"{self.goal} {self.unit}".strip()
        return _line(self.what, measured, goal, self.reached, self.note)


class Table:
    """One part's rows, added to `gpu.md` and `gpu.jsonl` of a folder (or of another `name`).

    Attributes:
        rows: how many it has.
        failed: the rows of what went wrong. (A goal that is not reached is a finding.)
    """

    def __init__(
        self, folder: Path, part: str, machine: Mapping[str, Any], name: str = "gpu"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._markdown, self._json = folder / f"{name}.md", folder / f"{name}.jsonl"
        self.part, self.machine = part, dict(machine)
        self.rows = 0
        self.failed: list[Row] = []
        told = ", ".join(f"{name} {value}" for name, value in machine.items())
        head = f"\n## {part}\n\n{told}\n\n{_line(*COLUMNS)}\n{_line(*['---'] * len(COLUMNS))}\n"
        _add(self._markdown, head)
        print(head, end="", flush=True)

    def add(self, row: Row) -> None:
        """Write it down at once."""
        self.rows += 1
        if row.failed:
            self.failed.append(row)
        line = row.markdown() + "\n"
        _add(self._markdown, line)
        _add(self._json, json.dumps(self._as_json(row)) + "\n")
        print(line, end="", flush=True)

    def _as_json(self, row: Row) -> dict[str, Any]:
        goal = None if row.goal is None else str(row.goal)
        values = asdict(row) | {"goal": goal, "reached": row.reached or None}
        return {"part": self.part, **self.machine, **values}


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"


def _add(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
