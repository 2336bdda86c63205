"""The model card's code runs, for a model with a chat template and for one without."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keepstep.policy.retention import Policy
from keepstep.publish.bundle import make_bundle
from keepstep.publish.card import fault_of
from tests.helpers.vision import IMAGE_TOKENS, make_vision, picture
from tests.hub.runs import POLICY, REPO, a_run


@pytest.mark.parametrize("chat", [True, False])
def test_the_code_of_the_card(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: bool
) -> None:
    files = {} if chat else {"chat_template.jinja": None}
    run = a_run(tmp_path / "run", demo / "model", files=files)
    bundle, policy = tmp_path / "bundle", Policy(**POLICY)  # type: ignore[arg-type]
    make_bundle(run.path / "checkpoint-8", policy, REPO, bundle, {})
    (code,) = re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL)
    exec(code.replace(REPO, str(bundle)), {})
    assert ("<|im_start|>user" in capsys.readouterr().out) == chat


@pytest.mark.parametrize(
    "asked",
    [{"tags": 5}, {"datasets": [1]}, {"license": ["mit"]}, {"model-index": 3}, {"base_model": {}}],
)
def test_metadata_that_are_none(asked: dict[str, object]) -> None:
    assert fault_of(asked) is not None


def test_metadata() -> None:
    asked = {"license": "mit", "tags": "one", "datasets": ["a/b"], "base_model": ["a/b", "c/d"]}
    assert fault_of({**asked, "language": ["en"], "extra": {"any": 1}}) is None
    assert fault_of({}) is None


def test_the_code_of_a_vision_language_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = make_vision(tmp_path / "vision")
    run = a_run(tmp_path / "run", vision / "model")
    bundle, policy = tmp_path / "bundle", Policy(**POLICY)  # type: ignore[arg-type]
    make_bundle(run.path / "checkpoint-8", policy, REPO, bundle, {})
    card = (bundle / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "picture.png").write_bytes(picture(1)[0])
    monkeypatch.chdir(tmp_path)
    exec(code.replace(REPO, str(bundle)), {})
    assert "<image>" * IMAGE_TOKENS + "What is it?" in capsys.readouterr().out
