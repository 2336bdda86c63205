"""What a row of the data is: its layout, the roles in it, and what is wrong with it. Pure.

SFTTrainer (trl 1.16) takes the layout of the first row for that of all, gives roles to the chat
template as they stand, and fails in the middle of the preparation where a row is another one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from keepstep.data.columns import alpaca_problem, is_alpaca, turns_of_alpaca
from keepstep.errors import KeepstepError
from keepstep.output.units import counted

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    # What a tool has answered: OpenAI's older API, Hermes, Glaive, LLaMA-Factory.
    **dict.fromkeys(("function", "function_response", "tool_response", "observation"), "tool"),
    # An assistant's turn that calls a tool: its text is the call.
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
CALLS = ("function_call", "tool_call")
FOREIGN = ("from", "value", "function_call")  # keys of a turn that no template knows
TURNS = ("messages", "conversations", "conversation")  # columns with a list of turns, by preference
TOKENS = ("labels", "completion_mask", "assistant_masks")  # one value for each of input_ids
KINDS = ("prompt", "chosen", "rejected", "completion", "messages")  # that SFTTrainer looks for
EXPECTED = "messages, prompt and completion, or instruction and output"


class RowError(KeepstepError, ValueError):
    """A row that cannot be taken as it is."""


@dataclass(frozen=True)
class Layout:
    """What rows are trained on.

    Attributes:
        name: `messages`, `prompt` (and completion), `alpaca`, `text`, or `input_ids` (tokens
            already).
        column: of the turns, or of the text; else the name.
        ignored: columns that SFTTrainer would take for another layout, and that are left out.
    """

    name: str
    column: str
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        several = {"prompt": "prompt and completion", "alpaca": "instruction and output"}
        return several.get(self.name, self.column)


@dataclass(frozen=True)
class Verdict:
    """What was seen of a row.

    Attributes:
        problem: why it cannot be trained on, or nothing.
        foreign: whether its turns have other names than `role`, `content`, and the roles'.
        talks: whether it consists of turns.
        answered: whether one of the turns is the assistant's.
    """

    problem: str = ""
    foreign: bool = False
    talks: bool = False
    answered: bool = False


def layout_of(
    columns: Iterable[str], text_field: str, named: Collection[str] = ()
) -> Layout | None:
    """The layout of rows with these columns, by SFTTrainer's preference, `named` ones before all
    others; None: there is none."""
    names = set(columns)
    if named and (meant := layout_of(named, text_field)) is not None:
        own = set() if meant.name == "alpaca" else columns_of(meant)
        return _but(meant.name, meant.column, names, own)
    if "input_ids" in names:
        return Layout("input_ids", "input_ids")
    if {"prompt", "completion"} <= names:
        found = _but("prompt", "prompt", names, {"prompt", "completion"})
        # SFTTrainer (trl 1.16) ends the text by eos_token, where there is one, not the completion.
        text = {text_field} & (names - {"prompt", "completion"})
        return replace(found, ignored=tuple(sorted({*found.ignored, *text})))
    turns = next((name for name in TURNS if name in names), None)
    if turns is not None:
        found = _but("messages", turns, names, {"messages"})
        others = sorted(names & set(TURNS) - {"messages", turns})
        return replace(found, ignored=(*found.ignored, *others))
    if text_field in names:
        return _but("text", text_field, names, {text_field})
    return _but("alpaca", "instruction", names, set()) if is_alpaca(names) else None


def columns_of(layout: Layout) -> set[str]:
    """The columns that such rows are made into tokens from, once they have the usual names."""
    own = {
        "prompt": {"prompt", "completion"},
        "messages": {"messages"},
        "alpaca": {"prompt", "completion"},
        "text": {layout.column},
        "input_ids": {"input_ids", *TOKENS},
    }
    return own[layout.name] | {"tools", "chat_template_kwargs", "image", "images"}


def _but(name: str, column: str, names: set[str], own: set[str]) -> Layout:
    return Layout(name, column, tuple(sorted(names & set(KINDS) - own)))


def hint_for(row: Mapping[str, Any], text_field: str) -> str:
    """What to do about a row that has no layout."""
    names = set(row)
    for name, value in row.items():
        inner = value[0] if isinstance(value, list) and value else None
        if isinstance(inner, Mapping) and layout_of(inner, text_field):
            return f"the rows are inside of {name}: write them one a line, as JSONL"
    usual = {name.strip().lower(): name for name in names}
    for question in ("instruction", "question", "query", "problem", "input", "prompt", "q"):
        for answer in ("output", "answer", "response", "solution", "completion", "a"):
            if {question, answer} <= usual.keys():
                asked, told = usual[question], usual[answer]
                turns = question == "instruction"  # of user and assistant, in the chat template
                asks, answers = ("instruction", "output") if turns else ("prompt", "completion")
                return f"column_names: {{{asks}: {_quoted(asked)}, {answers}: {_quoted(told)}}}"
    if {"prompt", "chosen"} <= names:
        return "rows of preferences: column_names: {prompt: prompt, completion: chosen}"
    if len(names) == 1 and any(mark in name for name in names for mark in ";\t|"):
        return "is it separated by another character than a comma?"
    shown = next(iter(names)) if len(names) == 1 else "YOURS"
    return f"column_names: {{text: {shown}}}, or likewise {EXPECTED}"


def judge(row: Mapping[str, Any], layout: Layout) -> Verdict:
    """Look at one row."""
    if layout.name == "text":
        return Verdict(_text_problem(row.get(layout.column), layout.column))
    if layout.name == "messages":
        verdict = _judge_turns(row.get(layout.column), layout.column, row.get("system"))
        return _with_tools(verdict, row.get("tools"))
    if layout.name == "alpaca":
        return Verdict(alpaca_problem(row), foreign=True, talks=True, answered=True)
    if layout.name == "prompt":
        verdict = _judge_pair(row.get("prompt"), row.get("completion"))
        return _with_tools(verdict, row.get("tools")) if verdict.talks else verdict
    return Verdict(_token_problem(row))


def _token_problem(row: Mapping[str, Any]) -> str:
    tokens = row.get("input_ids")
    if not isinstance(tokens, (list, tuple)) or not tokens:
        return "input_ids is empty"
    for name in TOKENS:
        values = row.get(name)
        if name in row and (not isinstance(values, (list, tuple)) or len(values) != len(tokens)):
            count = len(values) if isinstance(values, (list, tuple)) else _told(values)
            return f"{name} is not as long as input_ids: {count} instead of {len(tokens)}"
    return ""


def _text_problem(value: Any, column: str) -> str:
    if isinstance(value, str):
        return ""
    return f"{column} is {_told(value)}, not text"


def _judge_pair(prompt: Any, completion: Any) -> Verdict:
    if not isinstance(prompt, list):
        return Verdict(_text_problem(prompt, "prompt") or _text_problem(completion, "completion"))
    before, after = (_judge_turns(prompt, "prompt"), _judge_turns(completion, "completion"))
    return Verdict(
        before.problem or after.problem, before.foreign or after.foreign, True, after.answered
    )


def _judge_turns(turns: Any, column: str, system: Any = None) -> Verdict:
    if not isinstance(turns, list):
        return Verdict(f"{column} is {_told(turns)}, not a list of turns")
    if not turns:
        return Verdict(f"{column} is empty")
    foreign, answered = column in TURNS[1:] or bool(system), False
    for number, turn in enumerate(turns, 1):
        try:
            taken = message(turn)
        except RowError as error:
            return Verdict(f"{column}, turn {number}: {error}")
        foreign |= turn.get("role") not in ROLES or any(turn.get(key) for key in FOREIGN)
        answered |= taken["role"] == "assistant"
    return Verdict("", foreign, True, answered)


def _with_tools(verdict: Verdict, tools: Any) -> Verdict:
    """SFTTrainer reads a text as JSON."""
    if verdict.problem or not isinstance(tools, str):
        return verdict
    if not tools.strip():
        return replace(verdict, foreign=True)
    try:
        json.loads(tools)
    except ValueError:
        return replace(verdict, problem=f"tools is not JSON: {_told(tools)}")
    return verdict


def message(turn: Any) -> dict[str, Any]:
    """A turn as chat templates know it: `role`, `content`, and what else it has.

    Raises:
        RowError: it says nothing, or who says it is not known.
    """
    if not isinstance(turn, Mapping):
        raise RowError(f"{_told(turn)} is no turn with a role and content")
    # A file's rows all have the columns of any of them: what a turn has not is null there.
    rest = {name: value for name, value in turn.items() if value is not None}
    role = rest.pop("role", None) or rest.pop("from", None)
    if role is None:
        raise RowError(f"no role in {{{', '.join(map(str, turn))}}}; wanted: role and content")
    name = str(role).strip().lower()
    known = role if role in ROLES else OTHER_NAMES.get(name, name)
    if known not in ROLES:
        raise RowError(f"the role {role!r} is none of: {', '.join(ROLES)} (human, gpt, …)")
    content = rest.pop("content", None)
    content = rest.pop("value", None) if content is None else content
    if name in CALLS:
        return {"role": known, "content": "", "tool_calls": _calls(content), **rest}
    if isinstance(rest.get("function_call"), Mapping):  # OpenAI's older way
        rest["tool_calls"] = _calls(rest.pop("function_call"))
    if content is None and not (known == "assistant" and rest.get("tool_calls")):
        raise RowError(f"a turn of {known} without content")
    if content is not None and not isinstance(content, (str, list)):
        raise RowError(f"its content is {_told(content)}, not text")
    return {"role": known} | ({} if content is None else {"content": content}) | rest


def _calls(content: Any) -> list[dict[str, Any]]:
    """The calls that a `function_call` turn holds, as JSON: one, or a list of them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise RowError(f"a call of a tool that is not JSON: {_told(content)}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and call.get("name") for call in calls):
        raise RowError(f"a call of a tool without a name: {_told(content)}")
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments") or {}},
        }
        for call in calls
    ]


def converted(row: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The columns of turns of a row that `judge` calls foreign, by the names that templates know.

    Raises:
        RowError: it cannot be trained on.
    """
    problem = judge(row, layout).problem
    if problem:
        raise RowError(problem)
    if layout.name == "alpaca":
        return turns_of_alpaca(row)
    tools = row.get("tools")
    rest = {"tools": None} if isinstance(tools, str) and not tools.strip() else {}
    if layout.name == "prompt":
        both = ("prompt", "completion")
        return {name: [message(turn) for turn in row[name]] for name in both} | rest
    messages = [message(turn) for turn in row[layout.column]]
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": str(system)})
    return {"messages": messages} | rest


def _quoted(name: str) -> str:
    """A column's name in a mapping of YAML."""
    return name if name.isidentifier() else json.dumps(name, ensure_ascii=False)


def _told(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"


@dataclass(frozen=True)
class Count:
    """What became of rows when they were made into tokens.

    Attributes:
        rows: in the data.
        used: that are trained on, or evaluated.
        cut: of those, the ones that are longer than `max_length`: the rest of them is lost.
        longest: row, in tokens, as it is used.
        packed: rows that the used ones were packed into; None: they were not.
    """

    rows: int
    used: int
    cut: int
    longest: int
    packed: int | None = None

    @property
    def dropped(self) -> int:
        return self.rows - self.used

    def __str__(self) -> str:
        text = f"{counted(self.rows, 'row')}, {self.used:,} used, "
        text += f"{self.cut:,} cut, {self.dropped:,} dropped"
        return text if self.packed is None else f"{text}, packed into {self.packed:,}"


def line(what: str, source: str, count: str, width: int = 80) -> str:
    """`what: source: count` in one line; of a long source, the end is shown."""
    room = width - len(f"{what}: : {count}")
    if len(source) > room:
        source = f"…{source[len(source) - max(1, room - 1) :]}"
    return f"{what}: {source}: {count}"
