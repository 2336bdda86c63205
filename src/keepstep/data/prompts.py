"""Prompts that a model is to answer at every evaluation: a file with one a line.

- `.txt`: each line is what a user says: a turn, where the model has a chat template, else a text
  that is gone on with.
- `.jsonl`: rows as those of the data: `messages` without their last turn where that is the
  assistant's, `prompt`, Alpaca's `instruction` and `input`, `text`. As there, a prompt that is a
  text is gone on with as it is, and turns go through the chat template. The answer that stands in
  the row, or in `reference`, is what the model's is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepstep.data.rows import converted, judge, layout_of

KINDS = (".txt", ".jsonl")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: that it goes on with; None: there are turns.
        turns: of a conversation, by the names that chat templates know.
        is_said: the text is what a user says: a turn, where there is a chat template.
        options: what else the chat template is given: tools, and a row's `chat_template_kwargs`.
        reference: the answer that is to be compared; None: none.
    """

    text: str | None = None
    turns: Sequence[Mapping[str, Any]] = ()
    is_said: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None

    @property
    def shown(self) -> str:
        """As people read it."""
        if self.text is not None:
            return self.text
        if len(self.turns) == 1:
            return _words(self.turns[0])
        return "\n".join(f"{turn['role']}: {_words(turn)}" for turn in self.turns)

    def as_turns(self) -> Prompt:
        """What a user says as a turn; all else as it is."""
        if not self.is_said or self.text is None:
            return self
        return Prompt(turns=[{"role": "user", "content": self.text}])


def read_prompts(path: Path, text_field: str = "text") -> list[Prompt]:
    """
    Raises:
        ValueError: the file cannot be read so, or there is no prompt in it; the line is named.
    """
    if path.suffix not in KINDS:
        raise ValueError(f"{path.name} is neither of {' and '.join(KINDS)}")
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_said(line) if path.suffix == ".txt" else _of_json(line, text_field))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path.name} has no prompt")
    return found


def _said(line: str) -> Prompt:
    return Prompt(text=line.strip(), is_said=True)


def _of_json(line: str, text_field: str) -> Prompt:
    row = json.loads(line)
    if isinstance(row, str) and row.strip():
        return _said(row)
    if not isinstance(row, dict):
        raise ValueError("it is neither a row nor a text")
    reference = row.pop("reference", None)
    if reference is not None and not isinstance(reference, str):
        raise ValueError("reference is no text")
    prompt = _of_row(row, text_field)
    if prompt.text is not None and not prompt.text.strip():
        raise ValueError("it is empty")
    return prompt if reference is None else _with(prompt, reference)


def _with(prompt: Prompt, reference: str | None) -> Prompt:
    return Prompt(prompt.text, prompt.turns, prompt.is_said, prompt.options, reference)


def _of_row(row: dict[str, Any], text_field: str) -> Prompt:
    answered = {"completion", "output"} & row.keys()
    if "prompt" in row and "completion" not in row:
        empty = [{"role": "assistant", "content": ""}]
        row["completion"] = "" if isinstance(row["prompt"], str) else empty
    if "instruction" in row and "output" not in row:
        row["output"] = ""
    layout = layout_of(row, text_field)
    if layout is None or layout.name == "input_ids":
        raise ValueError(f"no prompt is in it, but {', '.join(map(str, row)) or 'nothing'}")
    verdict = judge(row, layout)
    if verdict.problem:
        raise ValueError(verdict.problem)
    if layout.name == "text":
        return Prompt(text=row[layout.column])
    if layout.name == "prompt" and not verdict.talks:
        return Prompt(text=row["prompt"], reference=row["completion"] if answered else None)
    taken = converted(row, layout)
    options = _options(row | taken)
    if layout.name == "messages":
        turns, answer = _apart(taken["messages"])
        return Prompt(turns=turns, options=options, reference=answer)
    answer = _answer(taken["completion"]) if answered else None
    return Prompt(turns=taken["prompt"], options=options, reference=answer)


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    found = dict(row.get("chat_template_kwargs") or {})
    return found | (
        {"tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else {}
    )


def _apart(turns: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], str | None]:
    """What is asked, and the assistant's last turn, if it has the last word."""
    if turns[-1]["role"] != "assistant":
        return turns, None
    if len(turns) == 1:
        raise ValueError("its only turn is the assistant's")
    return turns[:-1], _answer(turns[-1:])


def _answer(turns: Sequence[Mapping[str, Any]]) -> str | None:
    """An answer in one turn of text; None of another."""
    content = turns[0].get("content") if len(turns) == 1 else None
    return content if isinstance(content, str) and content.strip() else None


def _words(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
