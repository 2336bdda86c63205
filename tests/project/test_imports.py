"""What may import what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.folders import commit, identify
from tests.helpers.ranks import ROOT

SOURCE = ROOT / "src/keepstep"


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in SOURCE.rglob("*.py")
    }


def test_imports_point_down() -> None:
    """The contracts of pyproject.toml: floors, no circle, where torch and DeepSpeed may be."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_commands_do_not_import_what_takes_long() -> None:
    code = (
        "import sys, keepstep.cli.main; sys.exit(bool({'torch', 'rich.progress'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


HEAVY = {"torch", "transformers", "trl", "deepspeed", "accelerate", "datasets", "peft", "numpy"}
LIGHT = ("ls", "status", "log", "goodput", "which", "show", "verify", "prune", "pin", "stop")


def test_commands_that_look_import_nothing_that_takes_long(tmp_path: Path) -> None:
    """Not when they are asked, either."""
    commit(identify(tmp_path / "run"), 20)
    code = """
import sys
from typer.testing import CliRunner
from keepstep.cli.main import app

run, heavy = sys.argv[1], set(sys.argv[2].split(","))
for command in sys.argv[3:]:
    done = CliRunner().invoke(app, [command, run])
    assert done.exception is None or isinstance(done.exception, SystemExit), (command, done)
    assert not heavy & {*sys.modules}, (command, heavy & {*sys.modules})
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run"), ",".join(HEAVY), *LIGHT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tests_of_decisions_and_of_the_run_folder_need_no_torch() -> None:
    """They are collected where it cannot be imported, nor what is built upon it. (What keepstep's
    modules import later, the contracts see.)"""
    code = """
import importlib.abc, sys
import pytest

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "deepspeed", "accelerate", "datasets"}:
            raise ModuleNotFoundError(f"{name} is not here", name=name)

sys.meta_path.insert(0, Without())
sys.exit(pytest.main(["-q", "--collect-only", *sys.argv[1:]]))
"""
    tests = ["tests/policy", "tests/run_folder"]
    done = subprocess.run(
        [sys.executable, "-c", code, *tests], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
