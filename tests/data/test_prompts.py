"""A file of prompts: texts and rows, what is asked, and what the answer is compared with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keepstep.data.prompts import Prompt, read_prompts
from keepstep.preflight.validate import validate
from keepstep.recipe.parse import parse_recipe
from tests.recipe.test_config import flags

ASK, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def read(folder: Path, row: Any) -> Prompt:
    (folder / "p.jsonl").write_text(f"{json.dumps(row)}\n\n")
    (prompt,) = read_prompts(folder / "p.jsonl")
    return prompt


@pytest.mark.parametrize(
    ("row", "turns", "reference"),
    [
        ({"messages": [SYSTEM, ASK, ANSWER]}, [SYSTEM, ASK], "4"),
        ({"messages": [ASK]}, [ASK], None),
        ({"messages": [ASK], "reference": "four"}, [ASK], "four"),
        ({"messages": [ASK, ANSWER], "reference": "four"}, [ASK], "four"),
        ({"messages": [ASK, ANSWER, ASK]}, [ASK, ANSWER, ASK], None),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            [ASK],
            "4",
        ),
        ({"prompt": [ASK]}, [ASK], None),
        ({"prompt": [ASK], "completion": [ANSWER]}, [ASK], "4"),
        ({"instruction": "2+2?", "output": "4"}, [ASK], "4"),
        ({"instruction": "2+2?"}, [ASK], None),
        ({"instruction": "add", "input": "2, 2"}, [ASK | {"content": "add\n\n2, 2"}], None),
    ],
)
def test_turns(
    tmp_path: Path, row: dict, turns: list[dict[str, str]], reference: str | None
) -> None:
    prompt = read(tmp_path, row)
    assert (prompt.text, list(prompt.turns), prompt.reference) == (None, turns, reference)
    assert prompt.as_turns() == prompt


@pytest.mark.parametrize(
    ("row", "text", "reference", "is_said"),
    [
        ({"prompt": "2+2="}, "2+2=", None, False),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=", "4", False),
        ({"text": " once "}, " once ", None, False),
        ({"text": "once", "reference": "upon"}, "once", "upon", False),
        ("2+2?", "2+2?", None, True),
    ],
)
def test_texts(tmp_path: Path, row: Any, text: str, reference: str | None, is_said: bool) -> None:
    """A row's is gone on with, as it would be trained on; what is said becomes a turn."""
    prompt = read(tmp_path, row)
    assert (prompt.text, prompt.reference, prompt.is_said) == (text, reference, is_said)
    assert list(prompt.as_turns().turns) == ([ASK] if is_said else [])


def test_tools_and_lines(tmp_path: Path) -> None:
    given = {"messages": [ASK], "tools": TOOLS, "chat_template_kwargs": {"thinking": False}}
    assert read(tmp_path, given).options == {"tools": TOOLS, "thinking": False}
    assert read(tmp_path, {"messages": [ASK], "tools": json.dumps(TOOLS)}).options["tools"] == TOOLS
    assert read(tmp_path, "a\u2028b").text == "a\u2028b", "it ends no line"
    (tmp_path / "q.jsonl").write_text('{"prompt": "a\u2028b"}\r\n', encoding="utf-8", newline="")
    assert [p.text for p in read_prompts(tmp_path / "q.jsonl")] == ["a\u2028b"]
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeff one\r\n\r\n  two\n".encode())
    assert [(p.text, p.is_said) for p in read_prompts(file)] == [("one", True), ("two", True)]
    assert read(tmp_path, {"messages": [SYSTEM, ASK]}).shown == "system: be brief\nuser: 2+2?"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "p.jsonl has no prompt"),
        ("{", "p.jsonl, line 1: "),
        ('\n{"prompt": "a"}\n3', "p.jsonl, line 3: it is neither a row nor a text"),
        ('{"question": "a"}', "no prompt is in it, but question"),
        ("{}", "no prompt is in it, but nothing"),
        ('" "', "it is neither a row nor a text"),
        ("[" * 100000, "line 1: "),
        ('{"prompt": 3}', "line 1: prompt is 3, not text"),
        ('{"prompt": " "}', "it is empty"),
        ('{"prompt": "a", "reference": 4}', "reference is no text"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "assistant", "content": "4"}]}', "its only turn is the assistant"),
        ('{"messages": [{"role": "nobody", "content": "4"}]}', "the role 'nobody' is none of"),
        ('{"input_ids": [1]}', "no prompt is in it"),
    ],
)
def test_what_is_no_prompt(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(told)):
        read_prompts(tmp_path / "p.jsonl")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    for name, told in {
        "absent.txt": "there is no ",
        "p.csv": "p.csv is neither of .txt and .jsonl",
        "p.txt": "p.txt cannot be read: ",
    }.items():
        with pytest.raises(ValueError, match=re.escape(told)):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, []),
        ({"metric_for_best_model": "eval_sample_exact_match"}, []),
        ({"sample_prompts": "absent.txt"}, ["sample_prompts: there is no absent.txt"]),
        ({"sample_max_new_tokens": 0}, ["sample_max_new_tokens: 0 is not above 0"]),
        ({"sample_temperature": -1}, ["sample_temperature: -1 is below 0"]),
        (
            {"eval_strategy": "no", "keep_ranking": "recency"},
            ["eval_strategy: no makes none"],
        ),
        (
            {"metric_for_best_model": "eval_loss + eval_sample_exact_match"},
            ["of one more is better, of another less"],
        ),
        (
            {"metric_for_best_model": "sample_exact_match", "sample_prompts": "{}/without.txt"},
            ["no prompt of ", "without.txt has a reference"],
        ),
        (
            {"metric_for_best_model": "sample_exact_match", "sample_prompts": None},
            ["sample_exact_match is nothing that the evaluation gives"],
        ),
    ],
)
def test_before_anything_is_loaded(tmp_path: Path, fields: dict, told: list[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    (tmp_path / "without.txt").write_text("a\n")
    given = {"sample_prompts": f"{tmp_path}/p.jsonl"} | fields
    given = {n: str(v).format(tmp_path) for n, v in given.items() if v is not None}
    found = "\n".join(map(str, validate(parse_recipe(flags(**given)))))
    assert bool(found) == bool(told), found
    assert all(text in found for text in told), found
