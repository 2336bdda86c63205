"""Lines within the width of a terminal: folded at spaces, never in a word or a command. Pure."""

from __future__ import annotations

import re

from rich.cells import cell_len

NARROWEST = 40  # columns; a narrower terminal folds for itself
ARGUMENT = r"(?:\$?'(?:[^'\\]|\\.)*'|\"[^\"]*\"|[^\s'\"`])+"  # as a shell has it
# Pasted from two lines, a command would be two: what is in `…`, and what begins like one.
UNITS = re.compile(
    rf"\(?`[^`]*`\S*|\(?(?:cd {ARGUMENT} && )?keepstep [a-z][a-z-]+ {ARGUMENT}"
    rf"(?: --[\w-]+(?: (?!--|\(){ARGUMENT})?)*\S*|(?:\$?'[^']*'(?:\"'\"'[^']*')*|\S)\S*"
)
LABEL = re.compile(r"(?:Hint: |keepstep: |- |\| |[<>] )?")


def folded(text: str, width: int, hang: int | None = None) -> list[str]:
    """A line as several; what is longer than the width in one piece stays whole.

    Args:
        hang: how far all but the first are indented; None: behind what the first begins with.
    """
    if cell_len(text) <= width:
        return [text]
    indent = len(text) - len(text.lstrip(" "))
    if hang is None:
        label = LABEL.match(text, indent)
        hang = indent + min(len(label[0] if label else "") or 2, 6)
    lines, line, end = [], "", 0
    for unit in UNITS.finditer(text):
        gap = text[end : unit.start()]
        end = unit.end()
        if line.strip() and cell_len(line + gap + unit[0]) > width:
            lines.append(line)
            line, gap = "", " " * hang
        line += gap + unit[0]
    return [*lines, line]
