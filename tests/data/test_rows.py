"""One row: its layout, its turns by any of their names, and what is said of one that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from keepstep.data.rows import Count, RowError, converted, hint_for, judge, layout_of, line
from keepstep.recipe.data_files import builder_of, is_data_file

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = '{"name": "clock", "arguments": {"zone": "UTC"}}'


def seen(row: dict[str, Any]) -> Any:
    layout = layout_of(row, "text")
    assert layout is not None
    return judge(row, layout)


def taken(row: dict[str, Any]) -> dict[str, Any]:
    layout = layout_of(row, "text")
    assert layout is not None
    assert judge(row, layout).foreign
    return converted(row, layout)


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("a.jsonl", "json"),
        ("chat.txt.jsonl", "json"),
        ("chat.jsonl.txt", "text"),
        ("v1.5.parquet", "parquet"),
        ("a.csv.gz", "csv"),
        ("A.JSONL", "json"),
        ("a.jsonl.bak", "json"),
        ("a.xlsx", None),
        ("jsonl", None),
    ],
)
def test_the_last_known_suffix_decides(name: str, builder: str | None) -> None:
    assert builder_of(name) == builder


@pytest.mark.parametrize(
    ("name", "is_file"),
    [
        ("data/train.jsonl", True),
        ("train.json.zst", True),
        ("x.PARQUET", True),
        ("owner/data", False),
        ("owner/data-v1.5", False),
        ("a.gz", False),
    ],
)
def test_which_names_are_files(name: str, is_file: bool) -> None:
    assert is_data_file(name) == is_file


@pytest.mark.parametrize(
    ("columns", "layout", "ignored"),
    [
        (["messages"], "messages", ()),
        (["conversations", "id"], "conversations", ()),
        (["prompt", "completion", "messages"], "prompt and completion", ("messages",)),
        (["prompt", "prompt_id", "messages"], "messages", ("prompt",)),  # as in UltraChat
        (["text", "prompt"], "text", ("prompt",)),
        (["messages", "text"], "messages", ()),
        (["messages", "conversations"], "messages", ("conversations",)),
        (["input_ids", "text"], "input_ids", ()),
    ],
)
def test_layouts(columns: list[str], layout: str, ignored: tuple[str, ...]) -> None:
    found = layout_of(columns, "text")
    assert (str(found), found and found.ignored) == (layout, ignored)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"data": [{"text": "a"}]}, "the rows are inside of data: write them one a line"),
        (["question", "answer"], "column_names: {prompt: question, completion: answer}"),
        (["prompt", "chosen", "rejected"], "column_names: {prompt: prompt, completion: chosen}"),
        (["text;label"], "separated by another character than a comma?"),
        (["story"], "column_names: {text: story}, or likewise messages, prompt and"),
    ],
)
def test_what_to_do_about_other_columns(row: dict[str, Any] | list[str], hint: str) -> None:
    assert layout_of(row, "text") is None
    assert hint in hint_for(row if isinstance(row, dict) else dict.fromkeys(row), "text")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("Human", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("function_response", "tool"),
        ("observation", "tool"),
    ],
)
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_roles_by_other_names(name: str, role: str, keys: tuple[str, str]) -> None:
    turns = [dict(zip(keys, (name, "x"), strict=True)), dict(zip(keys, ("gpt", "y"), strict=True))]
    for column in ("conversations", "messages", "conversation"):
        assert taken({column: turns})["messages"] == [
            {"role": role, "content": "x"},
            {"role": "assistant", "content": "y"},
        ]


def test_a_call_of_a_tool_becomes_one() -> None:
    turns = [
        {"from": "human", "value": "What time is it?"},
        {"from": "function_call", "value": CALL},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "Noon.", "weight": None},
    ]
    call, answer, last = taken({"conversations": turns, "system": "Be brief."})["messages"][2:]
    function = {"name": "clock", "arguments": {"zone": "UTC"}}
    assert call["tool_calls"] == [{"type": "function", "function": function}]
    assert (call["role"], answer["role"]) == ("assistant", "tool")
    assert last == {"role": "assistant", "content": "Noon."}


def test_the_older_way_to_call() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    answer = {"role": "function", "name": "f", "content": "1"}
    found = taken({"messages": [USER, call, answer, ANSWER]})["messages"]
    function = {"name": "f", "arguments": "{}"}
    assert found[1] == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert found[2] == {"role": "tool", "name": "f", "content": "1"}


def test_a_system_text_beside_the_turns_comes_first() -> None:
    row = {"conversations": [{"from": "human", "value": "q"}], "system": "Be brief.", "tools": ""}
    found = taken(row)
    assert found["messages"][0] == {"role": "system", "content": "Be brief."}
    assert found["tools"] is None  # which SFTTrainer would read as JSON


def test_rows_as_templates_know_them_stay() -> None:
    tool = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    for row in (
        {"messages": [USER, ANSWER]},
        {"messages": [parts, tool, {"role": "tool", "content": "1"}, ANSWER], "tools": "[]"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "q", "completion": "a"},
        {"text": ""},
        {"input_ids": [1]},
    ):
        verdict = seen(row)
        assert (verdict.problem, verdict.foreign) == ("", False)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": None}, "text is null, not text"),
        ({"text": 7}, "text is 7, not text"),
        ({"text": ["a"]}, 'text is ["a"], not text'),
        ({"prompt": "q", "completion": None}, "completion is null, not text"),
        ({"prompt": 1, "completion": "a"}, "prompt is 1, not text"),
        ({"prompt": [USER], "completion": "a"}, 'completion is "a", not a list of turns'),
        ({"prompt": [], "completion": [ANSWER]}, "prompt is empty"),
        ({"messages": []}, "messages is empty"),
        ({"messages": None}, "messages is null, not a list of turns"),
        ({"messages": '[{"role": "user"}]'}, "not a list of turns"),
        ({"messages": ["q", "a"]}, 'messages, turn 1: "q" is no turn with a role and content'),
        ({"messages": [{"user": "q"}]}, "messages, turn 1: no role in {user}"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            "turn 2: a turn of assistant without content",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "turn 1: its content is 3, not text"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "turn 1: the role 'narrator' is none of: system, developer, user, assistant, tool",
        ),
        ({"conversations": [{"from": "function_call", "value": "now"}]}, "a tool that is not JSON"),
        ({"conversations": [{"from": "tool_call", "value": "{}"}]}, "a tool without a name"),
        ({"messages": [USER, ANSWER], "tools": "[clock]"}, "tools is not JSON"),
        ({"input_ids": []}, "input_ids is empty"),
        (
            {"input_ids": [1, 2], "labels": [1]},
            "labels is not as long as input_ids: 1 instead of 2",
        ),
        ({"input_ids": [1], "labels": 3}, "labels is not as long as input_ids: 3 instead of 1"),
    ],
)
def test_what_is_wrong_with_a_row(row: dict[str, Any], problem: str) -> None:
    assert problem in seen(row).problem
    layout = layout_of(row, "text")
    if layout is not None and layout.name == "messages":
        with pytest.raises(RowError):
            converted(row, layout)


def test_the_line_at_the_start_fits() -> None:
    count = str(Count(1_000_000, 999_000, 12_345, 512))
    told = line("training", "/a/very/long/path/" * 5 + "train.jsonl", count)
    assert len(told) == 80
    assert told.endswith("train.jsonl: 1,000,000 rows, 999,000 used, 12,345 cut, 1,000 dropped")
    assert "packed into 7" in str(Count(10, 10, 0, 8, packed=7))


def test_a_text_beside_prompt_and_completion_is_left_out() -> None:
    """SFTTrainer would end the text by the token that ends a completion."""
    layout = layout_of(["prompt", "completion", "text"], "text")
    assert layout is not None
    assert (layout.name, layout.ignored) == ("prompt", ("text",))
    layout = layout_of(["prompt", "completion", "text"], "body")
    assert layout is not None
    assert layout.ignored == ()


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (["Question", "Answer"], "{prompt: Question, completion: Answer}"),
        (["instruction", "response"], "{instruction: instruction, output: response}"),
        (["Query", "the output"], ""),
        (["q", " Answer "], '{prompt: q, completion: " Answer "}'),
    ],
)
def test_what_to_do_about_other_names(columns: list[str], hint: str) -> None:
    told = hint_for(dict.fromkeys(columns, "x"), "text")
    assert hint in told
    assert told.startswith("column_names: {")
