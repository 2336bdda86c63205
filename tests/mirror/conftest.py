from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.mirror.store import Store
from keepstep.mirror.stores import open_store
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import STATE, commit, identify
from tests.mirror.server import BUCKET, S3Server


@pytest.fixture
def s3() -> Iterator[S3Server]:
    """An S3 server with one empty bucket."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def here(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of its user."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A run's prefix, on both kinds."""
    if request.param == "file":
        return open_store((tmp_path / "other disk").as_uri() + "/run")
    request.getfixturevalue("here")
    return open_store(f"s3://{BUCKET}/some/prefix/run")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with two checkpoints, made by hand."""
    folder = identify(tmp_path / "run", metric="eval_loss")
    for step in (4, 8):
        commit(folder, step, STATE)
    (folder / ".keepstep/events.jsonl").touch()
    return RunFolder(folder)
