"""One class above all errors of keepstep's; they carry facts, and survive pickling and copying."""

from __future__ import annotations

import ast
import builtins
import copy
import errno
import pickle
from pathlib import Path

import pytest

from keepstep.errors import KeepstepError
from keepstep.policy.batch import Batch as B
from keepstep.policy.batch import BatchError, Dealt, agree
from keepstep.policy.manifest import ManifestError
from keepstep.policy.selection import (
    Candidate,
    NoProgressError,
    SelectionError,
    Situation,
    UnreadableError,
    choose,
)
from keepstep.recipe.problems import ConfigError, Problem
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.storage import NotOwnerError
from tests.helpers.ranks import ROOT

PLACE = Path("/runs/x/checkpoint-3")


def bases_of_all_classes() -> dict[str, list[str]]:
    """Every class of keepstep's → the names of its bases."""
    found = {}
    for path in (ROOT / "src/keepstep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name] = [ast.unparse(base) for base in node.bases]
    return found


def test_keepstep_error_is_above_all() -> None:
    bases = bases_of_all_classes()

    def above(name: str) -> set[str]:
        return {name}.union(*(above(base) for base in bases.get(name, [])))

    def is_error(name: str) -> bool:
        kind = getattr(builtins, name, None)
        return isinstance(kind, type) and issubclass(kind, BaseException)

    public = (name for name in bases if not name.startswith("_"))
    errors = {name for name in public if any(map(is_error, above(name)))}
    assert {"ConfigError", "SaveError", "NotOwnerError", "NoProgressError"} <= errors
    assert sorted(name for name in errors if "KeepstepError" not in above(name)) == []


@pytest.mark.parametrize(
    ("error", "second"),
    [
        (SelectionError("no step 3", step=3, path=PLACE), LookupError),
        (UnreadableError("cannot be read", path=PLACE, errno=errno.EIO), OSError),
        (UnreadableError(errno.EIO, "cannot be read", "/a/file", ranks=(1, 2)), OSError),
        (NotOwnerError("it is another's", path=PLACE), PermissionError),
        (BatchError("7 rows", rows=7, processes=2), ValueError),
        (ConfigError([Problem("a"), Problem("b", "c")]), ValueError),
    ],
)
def test_facts_survive(error: KeepstepError, second: type[Exception]) -> None:
    assert isinstance(error, second)
    error.add_note("noted")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)
        assert again.errno == error.errno
        assert getattr(again, "filename", None) == getattr(error, "filename", None)


def test_a_choice_that_fails_names_the_step() -> None:
    def faulty(step: int) -> list[str]:
        return ["model.safetensors is missing"]

    situation = Situation([Candidate(4), Candidate(8)], None, faulty)
    with pytest.raises(SelectionError) as raised:
        choose("4", situation)
    assert raised.value.step == 4
    tired = Situation([Candidate(4)], None, faulty, fruitless={4: 3})
    with pytest.raises(NoProgressError) as without:
        choose("4", tired)
    assert without.value.step == 4


def test_rows_that_cannot_be_shared_out_are_counted() -> None:
    before = Dealt(B(4, 1, 2), B(4, 1, 2), None)
    with pytest.raises(BatchError) as raised:
        agree(before, B(4, 1, 3))
    assert (raised.value.rows, raised.value.processes) == (8, 3)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as raised:
        read_checkpoint(tmp_path / "checkpoint-1")
    assert raised.value.path == tmp_path / "checkpoint-1"
