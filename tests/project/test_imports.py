"""What may import what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.ranks import ROOT

SOURCE = ROOT / "src/keepstep"


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in SOURCE.rglob("*.py")
    }


def test_imports_point_down() -> None:
    """The contracts of pyproject.toml: floors, no circle, where torch and DeepSpeed may be."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_commands_do_not_import_torch() -> None:
    code = "import sys, keepstep.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
