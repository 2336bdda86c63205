from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils._xet import abort_xet_session

from keepstep.mirror.store import Store
from keepstep.mirror.stores import open_store
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import STATE, commit, identify
from tests.hub.client import Client
from tests.hub.peer import HubPeer
from tests.hub.runs import live_at, look_at
from tests.mirror.server import BUCKET, S3Server

HUB_BUCKET = "tester/bucket"


@pytest.fixture
def here(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of its user."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubPeer]:
    """A Hub with one empty bucket, which tells few files at once; and the environment of its
    user, whose client does not wait long."""
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "50ms")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "3")
    monkeypatch.setattr("huggingface_hub.utils._http.time", Hasty)
    with HubPeer(tmp_path / "hub", page=5) as peer:
        peer.create_bucket(HUB_BUCKET)
        live_at(Client(peer, tmp_path / "user", "xet"), monkeypatch)
        look_at(peer, monkeypatch)
        yield peer
        abort_xet_session()
        set_client_factory(default_client_factory)


class Hasty:
    """The pauses of huggingface_hub's client, a hundred times as short."""

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(seconds / 100)


def store_of(kind: str, request: pytest.FixtureRequest) -> Store:
    """A run's prefix on a store of a kind."""
    if kind == "file":
        folder: Path = request.getfixturevalue("tmp_path")
        return open_store((folder / "other disk").as_uri() + "/run")
    if kind == "hf":
        request.getfixturevalue("hub")
        return open_store(f"hf://buckets/{HUB_BUCKET}/some%20prefix/run")
    request.getfixturevalue("here")
    return open_store(f"s3://{BUCKET}/some/prefix/run")


@pytest.fixture(params=["s3", "file", pytest.param("hf", marks=pytest.mark.long)])
def store(request: pytest.FixtureRequest) -> Store:
    """A run's prefix, on each kind; on the Hub, which takes longest, in the long campaign only."""
    return store_of(request.param, request)


@pytest.fixture(params=["s3", "file", "hf"])
def each_store(request: pytest.FixtureRequest) -> Store:
    """A run's prefix, on each kind always."""
    return store_of(request.param, request)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with two checkpoints, made by hand."""
    folder = identify(tmp_path / "run", metric="eval_loss")
    for step in (4, 8):
        commit(folder, step, STATE)
    (folder / ".keepstep/events.jsonl").touch()
    return RunFolder(folder)
