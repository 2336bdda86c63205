"""A model's files that cannot be read are told before anything is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.preflight.model_files import unreadable
from keepstep.preflight.validate import validate
from keepstep.recipe.parse import parse_recipe

NOBODY = 65534


@pytest.fixture
def model(demo: Path) -> Iterator[Path]:
    """Where every user may enter: pytest's own folders are root's."""
    with tempfile.TemporaryDirectory(prefix="keepstep-model-") as made:
        Path(made).chmod(0o755)
        copy = Path(made, "model")
        shutil.copytree(demo / "model", copy)
        for path in (copy, *copy.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield copy


def test_whole(model: Path) -> None:
    (model / "odd.json").mkdir()
    os.mkfifo(model / "odd.bin")  # nobody writes to it, and nobody waits for that
    assert not list(unreadable(str(model)))


def test_a_link_to_nothing(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../blobs/0123")
    recipe = parse_recipe(["--model_name_or_path", str(model), "--output_dir", "x"])
    told = [str(problem) for problem in validate(recipe)]
    expected = f"model_name_or_path: {model}: model.safetensors: No such file or directory"
    assert any(line.startswith(expected) for line in told), told


def test_another_users(model: Path) -> None:
    (model / "model.safetensors").chmod(0o600)
    for number in range(8):
        (model / f"model-{number}.safetensors").touch(0o600)
    program = (
        "import os, sys; from keepstep.preflight.model_files import unreadable;"
        f"os.getuid() or os.setuid({NOBODY}); print(*unreadable(sys.argv[1]))"
    )
    if os.getuid():
        for path in model.glob("*.safetensors"):
            path.chmod(0)
    done = subprocess.run([sys.executable, "-c", program, model], capture_output=True, text=True)
    assert "model-4.safetensors, and 4 more: Permission denied" in done.stdout, done.stderr
