from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from keepstep.hub.client import connect
from keepstep.run_folder.reader import RunFolder
from tests.hub.client import Client
from tests.hub.peer import HubPeer
from tests.hub.runs import a_run, live_at, look_at


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubPeer]:
    """A Hub with nothing in it."""
    with HubPeer(tmp_path / "hub") as peer:
        yield peer


@pytest.fixture(params=["xet", pytest.param("lfs", marks=pytest.mark.long)])
def client(request: pytest.FixtureRequest, hub: HubPeer, tmp_path: Path) -> Client:
    """The client, once for each way to transfer: by LFS in the long campaign only."""
    return Client(hub, tmp_path / "client", request.param)


@pytest.fixture
def here(hub: HubPeer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The environment of a user of that Hub, whose transfers go the usual way."""
    client = Client(hub, tmp_path / "user", "xet")
    live_at(client, monkeypatch)
    return client


@pytest.fixture
def peer(hub: HubPeer) -> HubPeer:
    """The same, where `hub` is the module."""
    return hub


@pytest.fixture
def api(hub: HubPeer, here: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    """The real client, as a push has it, in this process."""
    look_at(hub, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its threads outlive the peer
    connect()
    yield HfApi(endpoint=hub.url, library_name="keepstep")
    set_client_factory(default_client_factory)


@pytest.fixture
def made(demo: Path, tmp_path: Path) -> RunFolder:
    """A run with one checkpoint, made by hand."""
    return a_run(tmp_path / "made", demo / "model")
