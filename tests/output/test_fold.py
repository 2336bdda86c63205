"""Lines on a terminal: within its width, in whole words and whole commands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from keepstep.output.fold import UNITS, folded
from keepstep.output.printable import quoted

WORDS = st.lists(st.text("abc中'`(:-", min_size=1, max_size=12), min_size=1, max_size=20)


@given(WORDS, st.integers(0, 6), st.integers(40, 80))
def test_nothing_is_lost_and_nothing_is_too_long(words: list[str], indent: int, width: int) -> None:
    text = " " * indent + " ".join(words)
    lines = folded(text, width)
    assert [unit[0] for line in lines for unit in UNITS.finditer(line)] == [
        unit[0] for unit in UNITS.finditer(text)
    ]
    for line in lines:
        assert cell_len(line) <= width or len(UNITS.findall(line)) == 1


def test_what_has_room_is_left_as_it_is() -> None:
    assert folded("a   b  ", 40) == ["a   b  "]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "keepstep: a run of many words is told in lines",
            ["keepstep: a run of many words is told in", "      lines"],
        ),
        (
            "    Hint: a run of many words is told in lines",
            ["    Hint: a run of many words is told in", "          lines"],
        ),
        ("  reason: a run of many words is told so", ["  reason: a run of many words is told so"]),
        ("  reason: 中文 a run of many words told", ["  reason: 中文 a run of many words told"]),
        (
            "  reason: 中文 中文 run of many words told",
            ["  reason: 中文 中文 run of many words", "    told"],
        ),
    ],
)
def test_where_lines_begin(text: str, lines: list[str]) -> None:
    assert folded(text, 40) == lines


@pytest.mark.parametrize(
    "command",
    [
        f"keepstep adopt {quoted('my runs/it is')} --into NEW_RUN",
        "keepstep log " + quoted("it's a run") + " --said",
        f"cd {quoted('my runs')} && keepstep launch recipe.yaml",
        "`keepstep rm RUN STEP… --force`",
        f"'{'a b ' * 4}'",
    ],
)
def test_a_command_is_in_one_line(command: str) -> None:
    """From two it would be pasted as two."""
    told = f"    Hint: of what there is, here is {command} (and a word)"
    lines = folded(told, 50)
    assert len(lines) > 1
    assert any(command in line for line in lines)


def test_columns_keep_their_place() -> None:
    begin = "2026-11-28 05:30:27    1  "
    lines = folded(begin + "saved checkpoint-20: 14 MB in 0.07 s", 50, hang=len(begin))
    assert lines == [f"{begin}saved checkpoint-20: 14", f"{' ' * 26}MB in 0.07 s"]
