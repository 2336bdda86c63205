"""docs/json.md, made from the dataclasses of `--json`."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from keepstep.cli import rows
from keepstep.cli.history import AttemptShown, RunShown
from keepstep.cli.log import LogLine, SaidLine
from keepstep.cli.samples import SampleRow
from keepstep.cli.space import Freed
from keepstep.cli.status import RunStatus
from keepstep.recipe.problems import Problem
from tests.helpers.ranks import ROOT

PAGE = ROOT / "docs/json.md"
# What prints it → the class of what is printed; `[]`: an array of these.
COMMANDS: dict[str, tuple[str, type]] = {
    "ls": ("keepstep ls RUN --json", rows.CheckpointRow),
    "ls-runs": ("keepstep ls s3://bucket/prefix --json", rows.MirroredRunRow),
    "which": ("keepstep which RUN --json", rows.ResumeAnswer),
    "status": ("keepstep status RUN --json", RunStatus),
    "show": ("keepstep show RUN --json", RunShown),
    "log": ("keepstep log RUN --json", LogLine),
    "said": ("keepstep log RUN --said --json", SaidLine),
    "goodput": ("keepstep goodput RUN --json", rows.GoodputReport),
    "verify": ("keepstep verify RUN --json", rows.VerifyReport),
    "prune": ("keepstep prune RUN --json", Freed),
    "drop": ("keepstep export RUN/best --to DIR --drop_run --json", Freed),
    "rm": ("keepstep rm RUN STEP… --json", Freed),
    "samples": ("keepstep samples RUN --json", SampleRow),
    "check": ("keepstep check RECIPE --json", rows.CheckReport),
    "estimate": ("keepstep estimate RECIPE --json", rows.Estimate),
}
ARRAYS = {"ls", "ls-runs", "which", "samples"}
LINES = {"log", "said"}
INNER = {AttemptShown: "show", Problem: "check", rows.EstimateRow: "estimate"}
TYPES = {int: "integer", float: "number", str: "string", bool: "true or false"}
PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}
DIALECT = "https://json-schema.org/draft/2020-12/schema"
LEFT_OUT = {rows.ResumeAnswer: {"under_way"}}  # keys that are not always there
SCHEMAS = ROOT / "docs/json.schema.json"
HEAD = """# What `--json` prints

These commands print JSON for programs when they are given `--json`. The tables are made from the
dataclasses that are printed (`keepstep/cli/rows.py`). Keys and their types stay: a test compares
what is printed with what was printed before. More keys may come: ignore those that you do not
know. Sizes are in bytes. Exit statuses are those without `--json`.
[json.schema.json](json.schema.json) is the same as JSON Schema, by the headings of this page.
"""


def page() -> str:
    parts = [HEAD]
    for name, (command, kind) in COMMANDS.items():
        what = "An array of objects. " if name in ARRAYS else ""
        what = "An object on each line. " if name in LINES else what
        parts.append(f"## `{command}`\n\n{what}{_first_line(kind)}\n\n{_table(kind)}")
        for inner, of in INNER.items():
            if of == name:
                parts.append(f"`{inner.__name__}`: {_first_line(inner)}\n\n{_table(inner)}")
    return "\n".join(parts)


def schemas() -> dict[str, Any]:
    """A JSON Schema (2020-12) of what each command prints; with `LINES`, of each line."""
    found: dict[str, Any] = {}
    for name, (command, kind) in COMMANDS.items():
        of: Any = tuple[kind, ...] if name in ARRAYS else kind  # type: ignore[valid-type]
        of = dict[str, tuple[str, ...]] if kind is rows.VerifyReport else of
        found[command] = {"$schema": DIALECT, **schema_of(of)}
    return found


def schema_of(kind: Any) -> dict[str, Any]:
    """More keys may come: only those that are there now are asked for."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind in PLAIN:
        return {"type": PLAIN[kind]}
    if origin in (UnionType, Union):
        return {"anyOf": [schema_of(argument) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is dict or kind is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1])}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin is tuple:
        each = [schema_of(argument) for argument in arguments]
        return {"type": "array", "prefixItems": each, "minItems": len(each), "items": False}
    told, hints, left_out = attributes(kind), get_type_hints(kind), LEFT_OUT.get(kind, set())
    return {
        "type": "object",
        "description": _first_line(kind),
        "properties": {
            field.name: {"description": told[field.name], **schema_of(hints[field.name])}
            for field in fields(kind)
        },
        "required": [field.name for field in fields(kind) if field.name not in left_out],
    }


def _first_line(kind: type) -> str:
    text = (inspect.getdoc(kind) or "").partition("\n\nAttributes:")[0]
    return " ".join(text.split())


def _table(kind: type) -> str:
    told, hints = attributes(kind), get_type_hints(kind)
    lines = ["| key | type | meaning |", "|---|---|---|"]
    for field in fields(kind):
        meaning = told[field.name].replace("|", "\\|")
        lines.append(f"| `{field.name}` | {_type(hints[field.name])} | {meaning} |")
    return "\n".join(lines) + "\n"


def attributes(kind: type) -> dict[str, str]:
    """The field's name → what the class's docstring says of it."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _type(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in TYPES:
        return TYPES[kind]
    if origin in (UnionType, Union):
        return " or ".join("null" if a is NoneType else _type(a) for a in arguments)
    if origin is Literal:
        return " or ".join(f"`{word}`" for word in arguments)
    if origin is dict:
        return "object" if arguments[1] is Any else f"object of {_plural(arguments[1])}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"array of {_plural(arguments[0])}"
    if origin is tuple:
        return f"array of {len(arguments)} {_plural(arguments[0])}"
    return f"`{kind.__name__}`"


def _plural(kind: Any) -> str:
    name = _type(kind)
    return name if name.startswith("`") else re.sub(r"^(array|\w+)", r"\1s", name)
