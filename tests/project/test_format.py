"""docs/format.md specifies what the code reads and writes: fields, types, events, places."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import zlib
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from keepstep.policy.batch import Batch, Dealt
from keepstep.policy.manifest import BOUNDS, FORMAT_VERSION, MOST, FileEntry, Manifest
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.retention import Policy
from keepstep.publish.remote import Target
from keepstep.ranks.outcome import EXIT_STATUS, Outcome
from keepstep.run_folder.events import FACTS, FACTS_OF_COMMITS, WITHOUT_ATTEMPT
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.paths import REQUESTS
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.trainer.restore import Resharded
from tests.helpers.folders import commit
from tests.helpers.ranks import ROOT
from tests.project.documents import text_of

TEXT = text_of("docs/format.md")
WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    int | None: "integer or null",
    str | None: "string or null",
    tuple[int, ...]: "list of integers",
    dict[str, Any]: "object",
    dict[str, float]: "object of numbers",
    dict[str, str]: "object of strings",
    dict[str, FileEntry]: "object of file entries",
    Batch: "object of batch fields",
}
EVERY_LINE = {"time", "event", "attempt"}


def tables() -> list[dict[str, tuple[str, str]]]:
    """Those that specify fields, in their order: name → type, required."""
    found: list[dict[str, tuple[str, str]]] = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:3] == ["field", "type", "required"]:
            found.append({})
        elif found and line.startswith("| `") and len(cells) == 4 and cells[2] in ("yes", "no"):
            found[-1][cells[0].strip("`")] = cells[1], cells[2]
    return found


MANIFEST, ENTRY, DEALT, STATUS = tables()


def fields_of(kind: Any) -> dict[str, tuple[str, str]]:
    missing = dataclasses.MISSING
    hints = get_type_hints(kind)
    return {
        f.name: (
            WORDS[hints[f.name]],
            "yes" if f.default is missing and f.default_factory is missing else "no",
        )
        for f in dataclasses.fields(kind)
    }


def test_the_manifest() -> None:
    specified = dict(MANIFEST)
    assert specified.pop("digest") == ("string", "yes")
    in_code = fields_of(Manifest) | {"format_version": ("integer", "yes")}
    assert specified == in_code
    assert f"manifest format **{FORMAT_VERSION}**" in TEXT


def test_ranges() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| ([\d^]+) \|$", TEXT, re.M)
    specified = {name: (int(low), power(high)) for name, low, high in rows}
    assert specified == {name: (low, high) for name, (low, high) in BOUNDS.items()}
    most = re.search(r"at most ([\d^]+) files", TEXT)
    assert most
    assert power(most[1]) == MOST


def power(text: str) -> int:
    base, _, exponent = text.partition("^")
    return int(base) ** int(exponent or 1)


@pytest.mark.parametrize(("specified", "kind"), [(ENTRY, FileEntry), (DEALT, Dealt)])
def test_what_is_in_it(specified: dict[str, tuple[str, str]], kind: Any) -> None:
    assert specified == fields_of(kind)


@pytest.mark.parametrize("kind", [Batch, Policy, Target])
def test_smaller_objects(kind: Any) -> None:
    assert [f.name for f in dataclasses.fields(kind) if f"`{f.name}`" not in TEXT] == []


def test_the_status() -> None:
    words = ", ".join(f"`{word}`" for word in EXIT_STATUS)
    assert STATUS["outcome"] == (words, "yes")
    in_code = {name: kind for name, (kind, _) in fields_of_outcome().items()}
    assert {n: kind for n, (kind, _) in STATUS.items() if n in in_code} == in_code
    assert STATUS.keys() == {"outcome", "owner", *in_code}


def fields_of_outcome() -> dict[str, tuple[str, str]]:
    hints = get_type_hints(Outcome)
    return {n: (WORDS[kind], "") for n, kind in hints.items() if n != "outcome"}


def events() -> dict[str, set[str]]:
    """Each event's fields, as specified."""
    table = TEXT.split("## events.jsonl")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    return {row[1].strip(" `"): set(re.findall(r"`(\w+)`", row[2])) for row in rows}


def test_every_event_is_specified_with_its_fields() -> None:
    """And none that nobody writes."""
    specified, written = events(), {name: set[str]() for name in WITHOUT_ATTEMPT}
    for module in (ROOT / "src/keepstep").rglob("*.py"):
        for call in ast.walk(ast.parse(module.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", "")
            if name in ("record", "_record") and call.args:
                event = ast.literal_eval(call.args[0])
                written.setdefault(event, set()).update(k.arg for k in call.keywords if k.arg)
    written["reshard"] |= (
        Resharded(1, ParallelLayout(2, 3), ParallelLayout(1), 5, 0.5).as_json().keys()
    )
    written["commit"] |= FACTS_OF_COMMITS.keys()
    written["end"] |= {f.name for f in dataclasses.fields(Outcome)}
    assert specified.keys() == written.keys()
    for event, fields in written.items():
        assert fields <= specified[event], event
    named = set().union(*specified.values()) | EVERY_LINE
    assert FACTS.keys() <= named


def test_every_place_is_in_the_layout(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    layout = TEXT.split("## Layout")[1].split("```")[1]
    places = [value for value in vars(run).values() if isinstance(value, Path)]
    names = {place.name for place in places if place != tmp_path} | set(REQUESTS)
    names -= {run.target.name}
    missing = {name for name in names if not re.search(rf"(?<!\w){re.escape(name)}\b", layout)}
    assert missing == set()
    assert run.target.name in TEXT


def test_the_digest_is_found_as_specified(tmp_path: Path) -> None:
    folder = commit(tmp_path, 500)
    lines = (folder / "manifest.json").read_text().splitlines()
    stated = re.fullmatch(r' "digest": "([0-9a-f]{64})",', lines[1])
    assert lines[0] == "{"
    assert stated
    (command,) = re.findall(r"^(grep -v .*)$", TEXT, re.M)
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.stdout.split()[0] == stated[1]


def test_a_line_carries_its_check_as_specified(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    (tmp_path / ".keepstep").mkdir()
    Keeper(run, Policy(), Storage()).record("prune", step=3, reason='a "reason"', by="me")
    line = run.events.read_text().strip()
    body, check = re.fullmatch(r'(.*), "check": "([0-9a-f]{8})"\}', line).groups()
    assert int(check, 16) == zlib.crc32(f"{body}}}".encode())
    assert json.loads(line).keys() == EVERY_LINE | events()["prune"] | {"check"}
