"""Columns by the names that people gave them: what `column_names` says, and Alpaca's. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

ALPACA = ("instruction", "input", "output", "system", "history")  # the first and the third: always
OURS = (
    *("messages", "prompt", "completion", "text", "tools", *ALPACA, "input_ids", "labels"),
    *("image", "images"),
)


def is_alpaca(columns: Collection[str]) -> bool:
    """Whether rows have an instruction and its output, as Alpaca's (and LLaMA-Factory's) have."""
    return {"instruction", "output"} <= set(columns)


def alpaca_problem(row: Mapping[str, Any]) -> str:
    """What is wrong with such a row, or nothing."""
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str):
            return f"{name} is no text"
    for name in ("input", "system"):
        if not isinstance(row.get(name), (str, type(None))):
            return f"{name} is no text"
    for turn in row.get("history") or ():
        pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not pair or not all(isinstance(text, str) for text in turn):
            return "history is no list of pairs: what the user said, what the answer was"
    if not (row["instruction"] + (row.get("input") or "")).strip():
        return "instruction and input are empty"
    return ""


def turns_of_alpaca(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Such a row as turns: what the model is asked, `input` below the instruction, and the answer,
    which the loss is taken of."""
    turns = [("system", row["system"])] if row.get("system") else []
    for question, answer in row.get("history") or ():
        turns += [("user", question), ("assistant", answer)]
    asked = [text for text in (row["instruction"], row.get("input")) if text and text.strip()]
    turns.append(("user", "\n\n".join(asked)))
    return {
        "prompt": [{"role": role, "content": text} for role, text in turns],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def renaming(names: Mapping[str, str], columns: Collection[str], what: str) -> dict[str, str]:
    """The column of these rows → its name for keepstep; nothing where all have these already.

    Args:
        names: what the recipe says: a name for keepstep → the column.
        columns: that the rows have.
        what: rows, for the error.

    Raises:
        ValueError: some columns are not there.
    """
    missing = [column for column in names.values() if column not in columns]
    if not missing:
        return {column: name for name, column in names.items()}
    if len(missing) == len(names) and set(names) <= set(columns):
        return {}
    raise ValueError(
        f"column_names: the {what} data has no column {', '.join(missing)}, "
        f"but {', '.join(sorted(columns))}"
    )


def wrong_names(names: Any, text_field: str) -> str:
    """What is wrong with a recipe's `column_names`, or nothing."""
    if not isinstance(names, Mapping) or not names:
        return "it maps names that keepstep knows to yours"
    known = list(dict.fromkeys((*OURS, text_field)))
    for name, column in names.items():
        if name not in known:
            return f"{name!r} is none of {', '.join(known)}"
        if not isinstance(column, str) or not column:
            return f"{name}: {column!r} is no name of a column"
    if len(set(names.values())) < len(names):
        return "one column has two names"
    return ""
