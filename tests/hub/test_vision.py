"""A vision-language model is published with its processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoProcessor

from keepstep.publish.by_hand import push_best
from tests.helpers.vision import make_vision
from tests.helpers.waiting import PATIENCE
from tests.hub.peer import HubPeer
from tests.hub.runs import REPO, a_run


@pytest.mark.usefixtures("here")
def test_the_processor_is_pushed(hub: HubPeer, tmp_path: Path) -> None:
    model = make_vision(tmp_path / "vision") / "model"
    push_best(a_run(tmp_path / "run", model), REPO, timeout=PATIENCE)
    said = json.loads(hub.read(REPO, "processor_config.json"))
    assert said == json.loads((model / "processor_config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (tmp_path / name).write_bytes(hub.read(REPO, name))
    (tmp_path / "processor_config.json").write_text(json.dumps(said))
    assert AutoProcessor.from_pretrained(tmp_path).image_token == "<image>"
    assert b"image-text-to-text" in hub.read(REPO, "README.md")
