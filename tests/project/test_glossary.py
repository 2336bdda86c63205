"""Every public name is in docs/glossary.md, so that one word means one thing."""

from __future__ import annotations

import dataclasses
import re
from typing import get_args, get_type_hints

import keepstep
from keepstep.policy.manifest import FileEntry, Manifest
from keepstep.policy.save_states import SaveState
from keepstep.ranks.outcome import EXIT_STATUS
from keepstep.run_folder.checkpoint import Unfit
from tests.project.documents import text_of

TEXT = text_of("docs/glossary.md")
QUOTED = set(re.findall(r"`([\w.]+)`", TEXT))
WHERE = "docs/glossary.md: one line for each of these"


def test_public_names() -> None:
    public = [n for n in getattr(keepstep, "__all__", []) if not n.startswith("__")]
    assert [name for name in public if name not in QUOTED] == [], WHERE


def test_fields_of_the_manifest() -> None:
    names = [f.name for kind in (Manifest, FileEntry) for f in dataclasses.fields(kind)]
    assert [name for name in names if name not in QUOTED] == [], WHERE


def test_states() -> None:
    """How an attempt ends, what a checkpoint may be found to be, where a save stands."""
    kinds = get_args(get_type_hints(Unfit)["kind"])
    assert len(kinds) == 3
    names = [*EXIT_STATUS, *kinds, *(state.name for state in SaveState)]
    assert [name for name in names if name not in QUOTED] == [], WHERE


def test_no_word_is_explained_twice() -> None:
    body = TEXT.split("## Fields of a manifest")[0]
    words = [word for row in re.findall(r"^\| ([^|]+) \|", body, re.M) for word in row.split(", ")]
    words = [word for word in words if word not in ("word", "---")]
    assert len(words) > 60
    assert len(words) == len(set(words))
