"""How far it is told that machines are with each other's parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from keepstep.ranks import control_group
from keepstep.ranks.nodes import Nodes
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.save import node_exchange, node_parts
from keepstep.save.node_parts import NodeParts
from tests.helpers.folders import commit, identify

Told = list[tuple[str, int, int | None]]


def telling(told: Told) -> Callable[[str], AbstractContextManager[Callable[..., None]]]:
    @contextmanager
    def progress(text: str) -> Iterator[Callable[[int, int | None], None]]:
        yield lambda done, total: told.append((text, done, total))

    return progress


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    control_group.forget()
    dist.destroy_process_group()


def test_a_part_that_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: Told = []
    monkeypatch.setattr(node_parts, "progress", telling(told))
    run = RunFolder(identify(tmp_path / "run"))
    commit(run.path, 20)
    parts = NodeParts(Nodes((0,), ("here",)), run, Storage())
    assert not parts.is_damaged(30), "none is here"
    assert told == []
    assert not parts.is_damaged(20)
    total = run.checkpoint(20).manifest.total_bytes
    assert told[-1] == ("verifying this machine's part of checkpoint-20", total, total)


@pytest.mark.usefixtures("alone")
def test_parts_that_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: Told = []
    monkeypatch.setattr(node_exchange, "progress", telling(told))
    monkeypatch.setattr(node_exchange, "PIECE", 100)
    run = RunFolder(identify(tmp_path / "run"))
    commit(run.path, 20)
    checkpoint = run.checkpoint(20)
    files = checkpoint.manifest.files
    sources, into = dict.fromkeys(files, 0), tmp_path / "there"
    node_exchange.exchange(
        checkpoint.manifest, sources, files.keys(), checkpoint.path, into, Storage()
    )
    total = checkpoint.manifest.total_bytes
    assert told[-1] == ("passing on parts of checkpoint-20", total, total)
    assert len(told) > len(files)
    shutil.rmtree(into)
    node_exchange.exchange(checkpoint.manifest, sources, (), checkpoint.path, None, Storage())
    assert told[-1] == ("passing on parts of checkpoint-20", total, total), "nothing was to do"
