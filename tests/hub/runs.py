"""A run that can be published, made by hand: no rank is started."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from huggingface_hub import constants

from keepstep.policy.manifest import MANIFEST_NAME, FileEntry
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import identify, manifest
from tests.hub.client import Client
from tests.hub.peer import HubPeer

REPO = "tester/demo"
POLICY = {"metric": "eval_loss", "greater_is_better": False}
ABOUT = {"base_model": "acme/base", "datasets": ["acme/data"], "license": None, "card": {}}
SETTINGS = {"learning_rate": 1e-3, "eval_dataset": "rows", "base_model": "base"}
NOTHING: Mapping[str, bytes | None] = MappingProxyType({})


def a_run(
    folder: Path, model: Path, step: int = 8, files: Mapping[str, bytes | None] = NOTHING
) -> RunFolder:
    """A run with one checkpoint, of `model`'s files; `files` beside or over these (None: not)."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    rows = [{"step": step, "loss": 1.5}, {"step": step, "eval_loss": 1.25}]
    contents: dict[str, bytes | None] = {p.name: p.read_bytes() for p in model.iterdir()}
    contents["trainer_state.json"] = json.dumps({"log_history": rows}).encode()
    entries = {}
    for name, content in {**contents, **files}.items():
        if content is not None:
            path = checkpoint / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            entries[name] = FileEntry(0, len(content), digest_of(path))
    facts = {"metrics": {"eval_loss": 1.25}, "about": ABOUT, "settings": SETTINGS}
    text = manifest(step, files=entries, **facts).to_json()
    (checkpoint / MANIFEST_NAME).write_text(text)
    return RunFolder(identify(folder, **POLICY))


def live_at(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user of that Hub."""
    for name in set(os.environ) - set(client.environment()):
        monkeypatch.delenv(name)
    for name, value in client.environment().items():
        monkeypatch.setenv(name, value)


def look_at(hub: HubPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client has read of the environment when it was imported, in this process."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
