"""What the documents say of fields, commands and files is what the code has."""

from __future__ import annotations

import re

import pytest
from docs import reference

from keepstep.recipe.parse import RecipeParser
from tests.helpers.ranks import ROOT
from tests.project.documents import text_of

RENEW = (
    "the code has changed: run `python docs/reference.py` (`make docs`), and commit what it writes"
)


@pytest.mark.parametrize("path", reference.documents(), ids=lambda path: path.name)
def test_generated_parts_are_those_of_the_code(path) -> None:
    """Fields of the configuration, commands with all arguments and options, the reading path."""
    text = path.read_text()
    assert reference.renewed(text) == text, RENEW


def test_every_part_has_its_place() -> None:
    text = "".join(path.read_text() for path in reference.documents())
    assert set(re.findall(r"<!-- made by make docs: ([\w-]+) -->", text)) == set(reference.PARTS)


def test_every_field_has_a_sentence() -> None:
    fields = reference.own_fields()
    assert {"save_interval_seconds", "eval_split_fraction", "save_total_limit"} <= fields.keys()
    without = [name for name, (field, _) in fields.items() if not field.metadata.get("help")]
    assert without == []


def test_every_section_names_fields_that_exist() -> None:
    named = [name for names in reference.SECTIONS.values() for name in names]
    assert sorted(set(named) - reference.own_fields().keys()) == [], "docs/reference.py, SECTIONS"
    assert len(named) == len(set(named))


def test_every_command_is_shown() -> None:
    """One line that a person can copy, for every command."""
    text = text_of("docs/commands.md")
    shown = set(re.findall(r"^### `keepstep ([\w-]+)", text, re.M)) - {"COMMAND"}
    examples = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    missing = {name for name in shown if f"keepstep {name}" not in examples}
    assert missing <= {"unpin", "reshard"}, "docs/commands.md: one example in its first block"
    assert {"ls", "which", "verify", "prune", "push"} <= shown


def test_one_save_and_one_resume_can_be_read() -> None:
    """In at most seven files and about 1,200 lines."""
    counts = {
        file: reference.lines_of(file, names) for file, names in reference.READING_PATH.items()
    }
    assert len(counts) <= 7
    total = sum(counts.values())
    assert total <= 1300, f"{total} lines: {counts}"
    assert total > 300, f"too few to be the whole way: {counts}"


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 170


def test_make_docs_is_there() -> None:
    assert "docs/reference.py" in (ROOT / "Makefile").read_text()


def test_what_one_migrates_to_exists() -> None:
    """Every field in a second column of docs/migrating.md is one of a recipe."""
    rows = [line.split("|") for line in text_of("docs/migrating.md").splitlines()]
    cells = [row[2] for row in rows if len(row) == 5 and "---" not in row[1]]
    named = set(re.findall(r"`([a-z][a-z0-9_]*)(?=[`:])", "".join(cells)))
    fields = {action.dest for action in RecipeParser()._actions}
    assert len(named) > 40
    assert sorted(named - fields) == []
