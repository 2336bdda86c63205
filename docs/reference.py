"""Writes those parts of the documents that the code knows best: `make docs`.

A generated part stands between two comments, `<!-- made by make docs: NAME -->` and `<!-- end -->`.
tests/project/test_reference.py compares each with what is made here.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/keepstep"
PART = re.compile(r"(<!-- made by make docs: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NEAR = 20  # lines by which a count may be wrong: not every edit of a file is one of the README

# What is read for one save and one resume, in that order: a file, and what of it (all, if nothing
# is named). The README shows it; a test bounds its lines.
READING_PATH: Mapping[str, tuple[str, ...]] = {
    "trainer/saving.py": ("Saving",),
    "save/saver.py": ("Saver",),
    "save/rank_part.py": ("Part",),
    "run_folder/writer.py": ("RunWriter.stage", "RunWriter.commit", "RunWriter.select"),
    "save/manager.py": ("CheckpointManager.choose", "CheckpointManager._decide"),
    "policy/selection.py": ("choose", "_newest_valid"),
    "trainer/restore.py": (),
}

# Sections of docs/configuration.md; a field that is in none of them stands in the last one.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "The run and how it resumes": (
        *("output_dir", "resume_from_checkpoint", "resume_weights_only", "allow_drift"),
        *("allow_batch_change", "verify_on_resume", "max_attempts_without_progress"),
        "restore_callback_states_from_checkpoint",
    ),
    "Which checkpoints stay": (
        *("save_total_limit", "keep_ranking", "metric_for_best_model", "keep_every_n_steps"),
        "keep_total_bytes",
    ),
    "When to save, to evaluate, to stop": (
        *("save_interval_seconds", "max_save_overhead", "save_min_seconds", "eval_strategy"),
        *("eval_steps", "metrics", "early_stopping_patience"),
        *("sample_prompts", "sample_max_new_tokens", "sample_temperature"),
        *("time_limit", "deadline", "stop_margin_seconds", "max_lost_minutes"),
    ),
    "How checkpoints are written": (
        *("async_save", "save_weights", "save_timeout_seconds", "on_save_error"),
        "on_nonfinite",
        *("on_spike", "spike_sigma", "spike_window", "max_rewinds"),
        *("max_failed_saves", "last_save_retry_seconds", "min_free_bytes"),
    ),
    "Dead and stuck ranks": ("peer_timeout_seconds", "hang_timeout_seconds", "hang_min_seconds"),
    "Publishing": ("hub_require", "publish_min_seconds", "publish_timeout_seconds", "card"),
    "Kernels": ("use_liger_kernel", "padding_free"),
    "Rows": ("eval_dataset_name", "eval_datasets", "column_names", "eval_split_fraction"),
    "Everything else": (),
}


def own_fields() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """keepstep's fields: those that TRL and transformers do not have, and those whose default or
    meaning is another here. Name → the field, and its type."""
    from trl import DatasetMixtureConfig, ScriptArguments, SFTConfig

    from keepstep.recipe.config import DataConfig, KeepstepConfig

    found = {}
    for kind, bases in (
        (KeepstepConfig, (SFTConfig,)),
        (DataConfig, (ScriptArguments, DatasetMixtureConfig)),
    ):
        theirs = {f.name: f for base in bases for f in dataclasses.fields(base)}
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            known = theirs.get(field.name)
            if (
                known is None
                or known.default != field.default
                or known.metadata.get("help") != field.metadata.get("help")
            ):
                found[field.name] = field, hints[field.name]
    return found


def fields() -> Iterator[str]:
    """The tables of docs/configuration.md."""
    from keepstep.recipe.values import WORDS

    known = own_fields()
    named = {name for names in SECTIONS.values() for name in names}
    rest = [name for name in known if name not in named]
    for title, names in SECTIONS.items():
        rows = [name for name in (*names, *([] if names else rest)) if name in known]
        if not rows:
            continue
        yield from (f"### {title}", "", "| field | type | default | meaning |", "|---|---|---|---|")
        for name in rows:
            field, kind = known[name]
            meaning = cell(str(field.metadata["help"]))
            shown = type_name(kind)
            if name in WORDS:
                shown = shown.replace("text", f"`{WORDS[name]}`")
            yield f"| `{name}` | {shown} | {default_of(field)} | {meaning} |"
        yield ""


def default_of(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is None:
        return "null"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def type_name(kind: Any) -> str:
    """A type as somebody who writes YAML knows it."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    names = {str: "text", int: "integer", float: "number", bool: "true, false", dict: "mapping"}
    if kind in names:
        return names[kind]
    if get_origin(kind) in (list, dict):
        return {list: "list", dict: "mapping"}[get_origin(kind)]
    found = [type_name(argument) for argument in get_args(kind) if argument is not type(None)]
    return " or ".join(found)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def commands() -> Iterator[str]:
    """The commands of docs/commands.md, with every argument and option."""
    import typer

    from keepstep.cli.main import app

    yield from _command(typer.main.get_command(app), "keepstep")


def _command(command: Any, name: str) -> Iterator[str]:
    group = getattr(command, "commands", None)
    words = [_placeholder(p) for p in command.params if is_argument(p)]
    title = " ".join([name, *words, *(["COMMAND"] if group else [])])
    yield from (f"### `{title}`", "", " ".join((command.help or "").split()), "")
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    if shown:
        yield from ("| argument or option | default | meaning |", "|---|---|---|")
    for parameter in shown:
        yield f"| {_spelled(parameter)} | {_default(parameter)} | {_help(parameter)} |"
    if shown:
        yield ""
    for _, inner in sorted(group.items()) if group else ():  # else as they were imported
        if not inner.hidden:
            yield from _command(inner, f"{name} {inner.name}")


def is_argument(parameter: Any) -> bool:
    return not any(name.startswith("-") for name in parameter.opts)


def _placeholder(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _spelled(parameter: Any) -> str:
    if is_argument(parameter):
        return cell(f"`{_placeholder(parameter)}`")
    long = [option for option in parameter.opts if option.startswith("--")]
    takes = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
    named = [f"`{option}{takes}`" for option in [*long, *parameter.secondary_opts]]
    return cell(", ".join([*named, *(f"`{o}`" for o in parameter.opts if o not in long)]))


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value in (None, "", False, ()):
        return ""
    return f"`{value}`"


def _help(parameter: Any) -> str:
    return cell(getattr(parameter, "help", None) or "")


def lines_of(file: str, names: tuple[str, ...]) -> int:
    """How many lines of a module are read: all, or those of the functions and classes named.

    Raises:
        LookupError: one of them is not there.
    """
    text = (SOURCE / file).read_text()
    if not names:
        return len(text.splitlines())
    return sum(_extent(ast.parse(text), name, file) for name in names)


def _extent(tree: Any, name: str, file: str) -> int:
    for part in name.split("."):
        inner = [node for node in tree.body if getattr(node, "name", None) == part]
        if not inner:
            raise LookupError(
                f"{file} has no {name}: say in docs/reference.py, READING_PATH, what is read there"
            )
        tree = inner[0]
    return int(tree.end_lineno - tree.lineno + 1)


def reading_path(before: str) -> Iterator[str]:
    """The README's list of files. A count that is about right stays."""
    yield from ("| file | what to read in it | lines, about |", "|---|---|---|")
    for file, names in READING_PATH.items():
        shown = ", ".join(f"`{name}`" for name in names) or "all"
        row, count = f"| [{file}](src/keepstep/{file}) | {shown} |", lines_of(file, names)
        known = re.search(rf"^{re.escape(row)} (\d+) \|$", before, re.M)
        if known is None or abs(int(known[1]) - count) > NEAR:
            yield f"{row} {round(count, -1)} |"
        else:
            yield known[0]


def hooks() -> Iterator[str]:
    """The table of what keepstep relies on in other libraries, library by library."""
    from keepstep.trainer.upstream import HOOKS, TESTED

    for library in dict.fromkeys(hook.library for hook in HOOKS):
        yield from (f"### {library} ({TESTED[library]} is tested)", "")
        yield from ("| where | what | how | why |", "|---|---|---|---|")
        for hook in HOOKS:
            if hook.library == library:
                what = f"{hook.name}{hook.signature if hook.parameters else ''}"
                place = hook.owner.removeprefix(f"{library}.")
                yield f"| `{place}` | `{what}` | {hook.kind} | {hook.why} |"
        yield ""


def save_states() -> Iterator[str]:
    """The states of a save: a picture, and what each means."""
    from keepstep.policy.save_states import SaveState, picture

    yield from ("```mermaid", *picture(), "```", "", "| state | meaning |", "|---|---|")
    yield from (f"| {state.name} | {cell(state.value)} |" for state in SaveState)


PARTS: Mapping[str, Callable[[str], Iterator[str]]] = {
    "fields": lambda before: fields(),
    "commands": lambda before: commands(),
    "reading-path": reading_path,
    "hooks": lambda before: hooks(),
    "save-states": lambda before: save_states(),
}


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text: str) -> str:
    """A document with its generated parts as the code has them now."""

    def made(match: re.Match[str]) -> str:
        return match[1] + "\n".join(PARTS[match[2]](match[3])).rstrip() + "\n" + match[4]

    return PART.sub(made, text)


if __name__ == "__main__":
    for path in documents():
        old = path.read_text()
        new = renewed(old)
        if new != old:
            path.write_text(new)
            print(f"{path.relative_to(ROOT)}: written anew")
