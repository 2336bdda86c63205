"""A function that a recipe names: found, or told what is wrong with the name."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.preflight.validate import validate
from keepstep.recipe.functions import named
from keepstep.recipe.parse import parse_recipe
from tests.recipe.test_config import flags

TEXT = """
import beside
VALUE = 3
def mine(labels): return {"mine": (beside.ONE, 1)}
class Kind:
    def __init__(self, labels): ...
    @staticmethod
    def of(labels): return {}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "beside.py").write_text("ONE = 1\n")
    (tmp_path / "own_one.py").write_text(TEXT)
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n in ("beside", "own_one") or "keepstep_user" in n]:
        del sys.modules[name]


def test_a_module_and_a_file(folder: Path) -> None:
    """In the working directory; a file may import what lies beside it, wherever that is."""
    assert named("own_one:mine")([]) == {"mine": (1, 1)}
    assert named("own_one:Kind.of")([]) == {}
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/own_one.py").write_text("from nearby import mine\n")
    (folder / "elsewhere/nearby.py").write_text("def mine(labels): return 2\n")
    assert named("elsewhere/own_one.py:mine")([]) == 2
    assert named(f"{folder}/own_one.py:mine") is named("own_one.py:mine")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("own_one", "neither module:function nor path/to/file.py:function"),
        ("own_one:", "neither module:function"),
        ("own_one:a-b", "neither module:function"),
        ("own_one:absent", "own_one has no absent"),
        ("own_one:VALUE", "VALUE is of type int, and cannot be called"),
        ("own_one:Kind", "Kind is a class"),
        ("not_there:mine", "cannot be imported: ModuleNotFoundError"),
        ("not_there.py:mine", "cannot be imported: FileNotFoundError: there is no such file"),
        ("raises.py:mine", "cannot be imported: ZeroDivisionError"),
        ("ends.py:mine", "cannot be imported: SystemExit"),
        ("raises:mine", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_is_none(folder: Path, name: str, told: str) -> None:
    for _ in range(2):  # what failed is not half there
        with pytest.raises(ValueError, match=re.escape(told)):
            named(name)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, []),
        ({"metric_for_best_model": "mine", "greater_is_better": True}, []),
        ({"metric_for_best_model": "loss + 2*mine", "greater_is_better": False}, []),
        ({"metric_for_best_model": "my_loss"}, []),  # its name tells
        ({"metric_for_best_model": "mine"}, ["mine is a metric of yours: is more of it better?"]),
        ({"eval_strategy": "no", "keep_ranking": "recency"}, ["eval_strategy: no makes none"]),
        ({"metrics": "own_one:absent"}, ["metrics: own_one:absent: own_one has no absent"]),
        (
            {"metric_for_best_model": "mine", "eval_datasets": '{"math": "x/y"}'},
            ["mine is nothing that the evaluation gives"],
        ),
        (
            {
                **{"metric_for_best_model": "eval_math_mine", "greater_is_better": True},
                "eval_datasets": '{"math": "x/y"}',
            },
            [],
        ),
        ({"metric_for_best_model": "mine", "metrics": None}, ["mine is nothing that the"]),
    ],
)
def test_before_anything_is_loaded(folder: Path, fields: dict, told: list[str]) -> None:
    given = {"metrics": "own_one:mine"} | fields
    given = {name: value for name, value in given.items() if value is not None}
    found = [str(problem) for problem in validate(parse_recipe(flags(**given)))]
    assert len(found) == len(told), found
    for text, problem in zip(told, found, strict=True):
        assert text in problem
