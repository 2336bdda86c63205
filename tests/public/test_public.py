"""The public surface: what `keepstep` offers is a decision, and importing it costs nothing."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import operator
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import keepstep
from tests.helpers.ranks import ROOT

TRAINING = {
    "CheckpointArguments",
    "CheckpointMixin",
    "KeepstepConfig",
    "KeepstepTrainer",
}  # what needs TRL
CONVERTING = {"adopt", "Adopted", "AdoptError", "export", "Exported", "ExportError"}  # torch
READING = {
    *("Checkpoint", "ConfigError", "DamagedError", "Decision", "Manifest", "ManifestError"),
    "KeepstepError",
    *("Outcome", "Policy", "Problem", "Record", "RunFolder", "SelectionError", "UnreadableError"),
    "plan_retention",
}
HEAVY = ("torch", "transformers", "trl", "deepspeed", "accelerate", "datasets", "peft", "numpy")
SOURCE = ast.parse((ROOT / "src/keepstep/__init__.py").read_text())


def python(code: str) -> str:
    """What it prints last: DeepSpeed, imported, may have told of the device before."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def test_what_is_public_was_decided() -> None:
    assert set(keepstep.__all__) == TRAINING | CONVERTING | READING
    assert set(keepstep.__all__) == keepstep._PLACES.keys()


def test_importing_keepstep_imports_nothing() -> None:
    """Measured in modules: seconds depend on the machine."""
    loaded = python("import sys; import keepstep; print(*sys.modules)").split()
    assert [name for name in loaded if name.startswith("keepstep")] == ["keepstep"]
    assert not {*HEAVY, "rich", "typer", "yaml"} & set(loaded)
    code = f"import sys; from keepstep import {', '.join(sorted(READING))}; print(*sys.modules)"
    assert not set(HEAVY) & set(python(code).split())


def test_a_star_import_is_the_public_surface() -> None:
    told = python("before = {*globals()}; from keepstep import *; print(*({*globals()} - before))")
    assert set(told.split()) - {"before"} == set(keepstep.__all__)


@pytest.mark.parametrize("name", keepstep.__all__)
def test_public_names_are_there(name: str) -> None:
    value = getattr(keepstep, name)
    assert name in dir(keepstep)
    assert getattr(keepstep, name) is value
    assert pickle.loads(pickle.dumps(value)) is value


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'KeepStepTrainer'") as raised:
        keepstep.KeepStepTrainer  # type: ignore[attr-defined]  # noqa: B018
    assert raised.value.name == "KeepStepTrainer"
    assert not hasattr(keepstep, "torch")
    command = [sys.executable, "-c", "from keepstep import KeepStepTrainer"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "cannot import name 'KeepStepTrainer' from 'keepstep'" in told


def test_type_checkers_see_the_same() -> None:
    """What stands under TYPE_CHECKING is what is imported when it is asked for."""
    block, _ = [node for node in SOURCE.body if isinstance(node, ast.If)]
    told = {
        alias.asname: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == keepstep._PLACES


def sections(value: Any) -> set[str]:
    return set(re.findall(r"^ *(\w+):(?=$| )", inspect.getdoc(value) or "", re.MULTILINE))


# What docs and examples use; the other methods serve keepstep's own rooms.
FUNCTIONS = {
    *("adopt", "export", "plan_retention"),
    *("Checkpoint.at", "Checkpoint.faults", "Checkpoint.verify"),
    *("RunFolder.best", "RunFolder.checkpoint", "RunFolder.checkpoints", "RunFolder.choose"),
    *("RunFolder.latest", "RunFolder.retention"),
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_tell_what_they_take_and_give(name: str) -> None:
    function = operator.attrgetter(name)(keepstep)
    told, parameters = sections(function), inspect.signature(function).parameters
    assert "Ranks" in told
    given = [each for each in parameters if each not in ("self", "cls")]
    assert not given or "Args" in told
    assert [each for each in given if each not in told] == []
    returns = inspect.signature(function).return_annotation
    assert ("Returns" in told) == (returns != "None")
    raises = re.search(r"^\s+raise \w", inspect.getsource(function), re.MULTILINE)
    assert not raises or "Raises" in told


@pytest.mark.parametrize("name", sorted(READING | CONVERTING))
def test_classes_tell_their_fields(name: str) -> None:
    value = getattr(keepstep, name)
    assert inspect.getdoc(value)
    if dataclasses.is_dataclass(value):
        fields = {field.name for field in dataclasses.fields(value)}
        assert fields - sections(value) == set()


SCRIPT = """
from __future__ import annotations

from pathlib import Path

import keepstep
from keepstep import Checkpoint, Decision, Policy, Record, RunFolder, plan_retention

run = RunFolder("runs/x")
newest: Checkpoint | None = run.latest()
best = run.choose("best")
if best is not None:
    best.verify(deep=True)
    step: int = best.step
    loss: float = best.metrics["eval_loss"]
    made = keepstep.export(best, "models/x", dtype="bf16")
    folder: Path = made.folder
adopted: Checkpoint = keepstep.adopt("out/checkpoint-5", into=run).checkpoint
plan: list[Decision] = plan_retention([Record(10), Record(20)], Policy(limit=1))
try:
    run.choose(15)
except keepstep.SelectionError as error:
    print(error)


class MyTrainer(keepstep.KeepstepTrainer):
    pass


args: keepstep.KeepstepConfig = keepstep.KeepstepConfig(output_dir="runs/x")
limit: int | None = args.policy().limit
"""
MISTAKES = """
import keepstep

keepstep.RunFolder("runs/x").newest()
keepstep.export("a", "b", dtype="int8")
keepstep.Policy(limit="3")
keepstep.KeepStepTrainer
args: keepstep.KeepstepConfig = keepstep.KeepstepConfig(output_dir="x")
args.policy(1)
"""


@pytest.mark.long  # half a minute: mypy reads the libraries
def test_a_users_script_is_type_checked(tmp_path: Path) -> None:
    """mypy --strict sees what the names are: it takes the script, and finds the mistakes."""
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(MISTAKES)
    libraries = ",".join(f"mypy-{name}.*" for name in HEAVY)
    config = f"[mypy]\nstrict = True\n[{libraries}]\nfollow_imports = skip\n"  # minutes, else
    (tmp_path / "mypy.ini").write_text(config)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "right.py", "wrong.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("right.py")] == [], done.stdout
    wrong = [re.sub(r":(\d+):.*\[(.*)\]", r":\1 \2", line) for line in lines if "error:" in line]
    assert wrong == [
        "wrong.py:4 attr-defined",
        "wrong.py:5 arg-type",
        "wrong.py:6 arg-type",
        "wrong.py:7 attr-defined",
        "wrong.py:9 call-arg",
    ], done.stdout + done.stderr
