"""Rows as they were loaded, looked at one by one, and given the names that SFTTrainer knows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import datasets
import pyarrow.compute as compute

from keepstep import __version__
from keepstep.data.columns import ALPACA, is_alpaca, renaming
from keepstep.data.common import STREAM_SAMPLE, Rows, is_stream, problem
from keepstep.data.read import unusable
from keepstep.data.rows import TOKENS, Layout, Verdict, converted, hint_for, judge, layout_of
from keepstep.output.units import counted
from keepstep.recipe.config import ConfigError, DataConfig, KeepstepConfig, Problem

T = TypeVar("T")
TURNS = datasets.List(datasets.Json())  # of tools' calls, no two have the same fields
NOT_ANSWERED = "no turn is the assistant's"


@dataclass(frozen=True)
class Part:
    """Rows for one purpose.

    Attributes:
        rows: a datasets.Dataset, or an IterableDataset when they are streamed.
        source: where they come from, as people are told.
        layout: what is trained on of each.
        renamed: how its columns or roles were understood, where they have other names than
            `SFTTrainer` knows, and how a mixture is made up; else empty.
    """

    rows: Rows
    source: str
    layout: Layout
    renamed: str = ""

    @property
    def streamed(self) -> bool:
        return is_stream(self.rows)


def taken(
    what: str,
    rows: Rows,
    source: str,
    data: DataConfig,
    training: KeepstepConfig,
    warnings: list[Problem],
) -> Part:
    """The rows with their layout, each of them looked at, and by the names that TRL knows.

    Raises:
        ConfigError: there are none, or some of them cannot be used.
    """
    first = reading(source, lambda: next(iter(rows), None))
    if first is None:
        raise ConfigError([problem(f"the {what} data has no rows ({source})")])
    names, found = data.column_names or {}, {}
    if names:
        try:
            found = renaming(names, first, what)
        except ValueError as error:
            raise ConfigError([problem(str(error))]) from error
        rows = _renamed(rows, found, first)
        first = reading(source, lambda: next(iter(rows)))
    layout = layout_of(first, training.dataset_text_field, names)
    if layout is not None and layout.name == "text" and not names and is_alpaca(first):
        told = f"the {what} data has both instruction and output, and {layout}"
        hint = "{instruction: instruction, output: output}"
        raise ConfigError(
            [problem(told, f"column_names: {hint}, or {{{layout}: {layout}}} for the text")]
        )
    if layout is None:
        told = f"the {what} data has no column to train on, but {', '.join(sorted(first))}"
        hint = hint_for(first, training.dataset_text_field)
        if names:
            hint = "column_names: both of prompt and completion, or of instruction and output"
        raise ConfigError([problem(told, hint)])
    _check_loss(what, layout, judge(first, layout), training)
    as_they_are = (training.dataset_kwargs or {}).get("skip_prepare_dataset")
    if as_they_are and layout.name != "input_ids":
        told = f"dataset_kwargs: skip_prepare_dataset: the {what} data has {layout}, not input_ids"
        raise ConfigError([problem(told, "leave it out: the rows are made into tokens")])
    if layout.ignored:
        told = f"the {what} data: {layout} is trained on; left out: {', '.join(layout.ignored)}"
        warnings.append(replace(problem(told), severity="warning"))
        rows = rows.remove_columns(list(layout.ignored))
    foreign = _check_rows(what, rows, source, layout, training, warnings)
    if foreign:
        rows = _converted(rows, layout, first)
    return Part(rows, source, layout, _how(layout, first, found, foreign))


def _renamed(rows: Rows, names: Mapping[str, str], columns: Collection[str]) -> Rows:
    """The rows, with other names for some columns; who else has such a name makes room."""
    displaced = set(names.values()) & set(columns) - set(names)
    if displaced:
        rows = rows.remove_columns(sorted(displaced))
    moved = {column: name for column, name in names.items() if column != name}
    if set(moved) & set(moved.values()):  # swapped ones: of a stream, datasets 5.2 refuses them
        rows = rows.rename_columns({column: f"{column} (was)" for column in moved})
        moved = {f"{column} (was)": name for column, name in moved.items()}
    return rows.rename_columns(moved) if moved else rows


def _how(layout: Layout, columns: Collection[str], names: Mapping[str, str], foreign: bool) -> str:
    """In a few words, how rows were understood that have other names than SFTTrainer knows."""
    if names:
        return ", ".join(f"{column} as {name}" for column, name in names.items())
    if layout.name == "alpaca":
        return f"alpaca: {', '.join(name for name in ALPACA if name in columns)}"
    return f"turns of {layout.column}, roles by the names of chat templates" if foreign else ""


def _check_loss(what: str, layout: Layout, first: Verdict, training: KeepstepConfig) -> None:
    """Whether the rows have what the loss is to be taken of."""
    if training.assistant_only_loss and not first.talks and not first.problem:
        told = f"assistant_only_loss: the {what} data has {layout}, and no turns of an assistant"
        raise ConfigError([problem(told, "assistant_only_loss: false, or rows of `messages`")])
    if training.completion_only_loss and layout.name not in ("prompt", "alpaca", "input_ids"):
        told = f"completion_only_loss: the {what} data has {layout}, and no completion"
        hint = "leave it out, or assistant_only_loss: true"
        raise ConfigError([problem(told, hint if layout.name == "messages" else "leave it out")])


def _check_rows(
    what: str,
    rows: Rows,
    source: str,
    layout: Layout,
    training: KeepstepConfig,
    warnings: list[Problem],
) -> bool:
    """Look at every row (of a stream, the first ones); whether their turns have foreign names.

    Raises:
        ConfigError: some cannot be used: how many, and what is wrong with the first.
    """
    found = reading(source, lambda: _verdicts(rows, layout, training.dataset_num_proc))
    problems, talks = found["problem"], found["talks"]
    silent = [
        layout.name in ("messages", "prompt") and t and not a
        for t, a in zip(talks, found["answered"], strict=True)
    ]
    usual = next((t for t, told in zip(talks, problems, strict=True) if not told), None)
    for number, told in enumerate(problems):
        if not told and talks[number] != usual:
            problems[number] = "turns in some rows, text in others"
        elif not told and silent[number] and training.assistant_only_loss:
            problems[number] = NOT_ANSWERED
    bad = [number for number, told in enumerate(problems) if told]
    if bad:
        told = f"{len(bad):,} of {len(problems):,} {what} rows cannot be used ({source})"
        raise ConfigError([problem(f"{told}; row {bad[0] + 1}: {problems[bad[0]]}")])
    if any(silent):
        told = f"in {counted(sum(silent), f'{what} row')} {NOT_ANSWERED}"
        warnings.append(replace(problem(told), severity="warning"))
    return any(found["foreign"])


def _verdicts(rows: Rows, layout: Layout, processes: int | None) -> dict[str, list[Any]]:
    """What `judge` says of each row; the cache of datasets keeps it for the next launch."""
    if is_stream(rows):
        seen = [_verdict(row, layout) for row in itertools.islice(rows, STREAM_SAMPLE)]
        return {name: [verdict[name] for verdict in seen] for name in seen[0]}
    column = rows.data.column(layout.column)
    is_text = layout.name == "text" and "string" in str(column.type)
    if (is_text and not column.null_count) or (layout.name == "input_ids" and _even(rows)):
        return {name: [] for name in vars(Verdict())}  # there is nothing to look for
    names = {layout.column, "prompt", "completion", "tools", *ALPACA, *TOKENS}  # no image
    rows = rows.select_columns([name for name in rows.column_names if name in names])
    judged = rows.map(
        _verdict,
        fn_kwargs={"layout": layout, "version": __version__},  # which the cache goes by
        remove_columns=rows.column_names,
        num_proc=processes,
        desc="Looking at the rows",
    )
    return {name: judged[name][:] for name in judged.column_names}


def _even(rows: Rows) -> bool:
    """Whether rows of tokens all have some, and as many labels."""
    names = [name for name in ("input_ids", *TOKENS) if name in rows.column_names]
    columns = [rows.data.column(name) for name in names]
    if any(column.null_count or "list" not in str(column.type) for column in columns):
        return False
    first, *others = [compute.list_value_length(column) for column in columns]
    return compute.min(first).as_py() != 0 and all(first.equals(other) for other in others)


def _verdict(row: Mapping[str, Any], layout: Layout, version: str = "") -> dict[str, Any]:
    return vars(judge(row, layout))


def _converted(rows: Rows, layout: Layout, columns: Collection[str]) -> Rows:
    """The rows with their turns by the names that chat templates know."""
    turns = {"messages"} if layout.name == "messages" else {"prompt", "completion"}
    gone = {"messages": {layout.column, "system"}, "alpaca": set(ALPACA)}.get(layout.name, set())
    gone &= set(columns)
    arguments: dict[str, Any] = {
        "fn_kwargs": {"layout": layout, "version": __version__},
        "remove_columns": sorted(gone - turns),
    }
    if not is_stream(rows):
        kept = {name: kind for name, kind in rows.features.items() if name not in gone}
        arguments["features"] = datasets.Features(kept | dict.fromkeys(turns, TURNS))
        arguments["desc"] = "Naming the roles"
    return rows.map(_convert, **arguments)


def as_messages(part: Part) -> Part:
    """The same rows with their turns in one list, `messages`."""
    if part.layout.name == "messages":
        return part
    arguments: dict[str, Any] = {"remove_columns": ["prompt", "completion"]}
    if not part.streamed:
        kept = {n: k for n, k in part.rows.features.items() if n not in ("prompt", "completion")}
        arguments["features"] = datasets.Features(kept | {"messages": TURNS})
        arguments["desc"] = "Joining the turns"
    rows = part.rows.map(_joined, **arguments)
    return replace(part, rows=rows, layout=Layout("messages", "messages"))


def _joined(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": [*row["prompt"], *row["completion"]]}


def _convert(row: Mapping[str, Any], layout: Layout, version: str = "") -> dict[str, Any]:
    return converted(row, layout)


def reading(source: str, read: Callable[[], T]) -> T:
    """What `read` gives of rows that may be read only now.

    Raises:
        ConfigError: they cannot be.
    """
    try:
        return read()
    except ConfigError:
        raise
    except Exception as error:
        raise unusable(source, error) from error
