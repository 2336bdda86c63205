"""Every Python block of the documents runs, here or where the comment before it says.

A block without a comment runs here, after the blocks before it in its document, in a folder with a
run `runs/mine` (made by hand: files and manifests, no model). One with `<!-- run with a model -->`
runs in a process of its own that trains a tiny model for a few steps.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.folders import STATE, commit, identify
from tests.helpers.ranks import ROOT
from tests.project.documents import DOCUMENTS, Block, blocks

WITH_MODEL = "run with a model"
ELSEWHERE = re.compile(r"run by (tests/[\w/]+\.py)")
BLOCKS = blocks("python")
LOSSES = {500: 1.9, 1000: 1.2, 1500: 1.1, 3000: 1.45}


def of(document: str, note: str) -> list[Block]:
    return [block for block in BLOCKS if block.document == document and block.note == note]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_python(block: Block) -> None:
    """And says where it runs, if not here."""
    compile(block.text, str(block), "exec")
    if block.note not in ("", WITH_MODEL):
        where = ELSEWHERE.fullmatch(block.note)
        assert where, block.note
        assert (ROOT / where[1]).is_file()


@pytest.fixture
def a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/mine"
    identify(run, limit=3, ranking="metric", metric="eval_loss")
    for step, loss in LOSSES.items():
        commit(run, step, STATE, metrics={"eval_loss": loss})
    (run / "best").symlink_to("checkpoint-1500")
    (run / "latest").symlink_to("checkpoint-3000")
    return run


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if of(d, "")])
@pytest.mark.usefixtures("a_run")
def test_blocks_run(document: str) -> None:
    names: dict[str, object] = {"__name__": "blocks"}
    for block in of(document, ""):
        exec(compile(block.text, str(block), "exec"), names)


def test_some_blocks_run() -> None:
    assert sum(len(of(document, "")) for document in DOCUMENTS) >= 4
