from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.client import Client
from tests.hub.peer import HubPeer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubPeer]:
    """A Hub with nothing in it."""
    with HubPeer(tmp_path / "hub") as peer:
        yield peer


@pytest.fixture(params=["xet", pytest.param("lfs", marks=pytest.mark.long)])
def client(request: pytest.FixtureRequest, hub: HubPeer, tmp_path: Path) -> Client:
    """The client, once for each way to transfer: by LFS in the long campaign only."""
    return Client(hub, tmp_path / "client", request.param)
