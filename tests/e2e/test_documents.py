"""The documents' scripts, run as a person runs them: with a tiny model in the place of theirs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from keepstep import RunFolder
from tests.helpers.launchers import end, start
from tests.project.documents import Block, blocks

SCRIPTS = [block for block in blocks("python") if block.note == "run with a model"]


def made_small(block: Block, demo: Path) -> str:
    """The same script with a model and rows that are here, and three steps."""
    text = block.text.replace('"Qwen/Qwen3-0.6B"', repr(str(demo / "model")))
    text = text.replace('"data/train.jsonl"', repr(str(demo / "data/train.jsonl")))
    text = text.replace(", save_steps=100", "")
    return text.replace("max_steps=2000", "max_steps=3, save_steps=2, max_length=64")


@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_script(block: Block, demo: Path, tmp_path: Path) -> None:
    """It trains and commits. (Run again, the README's knows that it is finished.)"""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(made_small(block, demo))
    (folder,) = re.findall(r'output_dir="([\w/]+)"', block.text)
    code, output = end(start([sys.executable, str(script)], log, cwd=tmp_path), log)
    assert code == 0, output
    assert [c.step for c in RunFolder(tmp_path / folder).checkpoints()] == [2, 3]
    if "def on_checkpoint_committed" in block.text:
        assert re.findall(r"committed: (\d+)", output) == ["2", "3"]
    if block.document == "README.md":
        code, output = end(start([sys.executable, str(script)], log, cwd=tmp_path), log)
        assert code == 0, output
        assert "This run is finished, at step 3 of 3" in output


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 4
