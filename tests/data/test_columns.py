"""Columns by other names: Alpaca's, and those of `column_names`."""

from __future__ import annotations

from typing import Any

import pytest

from keepstep.data.columns import alpaca_problem, is_alpaca, renaming, turns_of_alpaca, wrong_names
from keepstep.data.rows import converted, judge, layout_of

ROW = {"instruction": "Translate.", "input": "chat", "output": "cat"}


def test_alpaca_rows_become_turns() -> None:
    assert is_alpaca(ROW)
    assert turns_of_alpaca(ROW) == {
        "prompt": [{"role": "user", "content": "Translate.\n\nchat"}],
        "completion": [{"role": "assistant", "content": "cat"}],
    }
    for nothing in ({"input": ""}, {"input": None}, {"input": "  "}):
        assert turns_of_alpaca(ROW | nothing)["prompt"][0]["content"] == "Translate."
    told = turns_of_alpaca(ROW | {"system": "Be brief.", "history": [["Hi", "Hello"]]})["prompt"]
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output": None}, "output is no text"),
        ({"instruction": 3}, "instruction is no text"),
        ({"input": ["a"]}, "input is no text"),
        ({"history": [["only one"]]}, "history is no list of pairs"),
        ({"history": [["q", None]]}, "history is no list of pairs"),
        ({"instruction": " ", "input": ""}, "instruction and input are empty"),
    ],
)
def test_alpaca_rows_that_cannot_be_used(changes: dict[str, Any], told: str) -> None:
    assert alpaca_problem(ROW) == ""
    assert told in alpaca_problem(ROW | changes)


def test_their_layout() -> None:
    layout = layout_of(ROW, "text")
    assert layout is not None
    assert (layout.name, str(layout)) == ("alpaca", "instruction and output")
    assert judge(ROW, layout).foreign
    assert converted(ROW, layout) == turns_of_alpaca(ROW)


def test_named_columns_come_before_all_others() -> None:
    layout = layout_of([*ROW, "text", "prompt"], "text", ["instruction", "output"])
    assert layout is not None
    assert (layout.name, layout.ignored) == ("alpaca", ("prompt",))
    layout = layout_of(["text", "messages"], "text", ["text"])
    assert layout is not None
    assert (layout.name, layout.ignored) == ("text", ("messages",))
    layout = layout_of(["tools", "messages"], "text", ["tools"])  # no layout by itself
    assert layout is not None
    assert layout.name == "messages"


def test_which_columns_get_which_names() -> None:
    names = {"prompt": "question", "completion": "answer"}
    assert renaming(names, {"question", "answer", "id"}, "training") == {
        "question": "prompt",
        "answer": "completion",
    }
    assert renaming(names, {"prompt", "completion"}, "evaluation") == {}
    with pytest.raises(ValueError, match="the training data has no column answer, but question"):
        renaming(names, {"question"}, "training")
    with pytest.raises(ValueError, match="no column question, answer, but body"):
        renaming(names, {"body"}, "training")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"prompt": "question", "completion": "answer"}, ""),
        ({"body": "text"}, ""),  # dataset_text_field
        ({}, "it maps names"),
        ({"question": "prompt"}, "'question' is none of messages, prompt"),
        ({"prompt": "q", "completion": "q"}, "one column has two names"),
        ({"prompt": 3}, "prompt: 3 is no name of a column"),
        ({"prompt": ""}, "is no name of a column"),
    ],
)
def test_names_that_a_recipe_may_give(names: Any, told: str) -> None:
    assert told in wrong_names(names, "body")
    assert bool(told) == bool(wrong_names(names, "body"))
