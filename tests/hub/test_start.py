"""What a run asks of the Hub before it begins, and when it begins again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from keepstep.preflight.validate import validate
from keepstep.publish.card import license_of
from keepstep.publish.hub import check
from keepstep.publish.remote import Target
from keepstep.recipe.config import Problem
from keepstep.recipe.parse import parse_recipe
from keepstep.trainer.publish_callback import Publishing, told_of
from tests.helpers.folders import identify
from tests.helpers.recipes import argv
from tests.hub.peer import WRITE_TOKEN, HubPeer
from tests.hub.runs import REPO

pytestmark = pytest.mark.usefixtures("here")
THEIRS = {"run_id": "other", "global_step": 99, "metric": "eval_loss", "value": 0.1}
THEIRS |= {"greater_is_better": False, "measured_on": "rows", "weights": {}}
ASKED = {"push_to_hub": True, "hub_model_id": REPO, "hub_require": True}


def seen(demo: Path, run: Path, **fields: object) -> list[Problem]:
    """What the main process says of this recipe."""
    recipe = parse_recipe(argv(demo, run, **ASKED, **fields))
    found = [problem for problem in validate(recipe) if problem.code == "hub"]
    return found + Publishing(recipe).check()


def test_a_hub_that_is_away_ends_no_run(hub: HubPeer, demo: Path, tmp_path: Path) -> None:
    """Also of one that has to publish: that is judged at its end."""
    hub.fault("status", path="whoami", status=503, times=-1)
    (problem,) = seen(demo, tmp_path / "run")
    assert problem.severity == "warning"
    assert "the Hub cannot be reached now (" in problem.what


WRONG = {
    "401": ("hf_" + "x" * 34, "401: the token is not accepted"),
    "no token": ("", "there is no token"),
    "somebody's model": (WRITE_TOKEN, "a model is there that keepstep did not publish (q4.gguf)"),
    "another metric": (WRITE_TOKEN, "step 99 is there, ranked by bleu, not by eval_loss"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_ends_a_start_and_no_restart(
    hub: HubPeer, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A job of days comes back: it has more to lose than what `keepstep push` makes good."""
    token, expected = WRONG[case]
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    hub.create_repo(REPO)
    if case == "somebody's model":
        hub.commit(REPO, {"q4.gguf": b"GGUF"})
    elif case == "another metric":
        text = json.dumps(THEIRS | {"metric": "bleu"}).encode()
        hub.commit(REPO, {"training/best.json": text})
    (problem,) = seen(demo, tmp_path / "run")
    assert problem.severity == "error"
    assert expected in problem.what
    (again,) = seen(demo, identify(tmp_path / "run"))
    assert (again.severity, again.what) == ("warning", problem.what)


def test_what_is_there_is_told(hub: HubPeer, demo: Path, tmp_path: Path) -> None:
    """As problems, so that `keepstep check --json` stays JSON."""
    assert seen(demo, tmp_path / "run") == []
    hub.commit(REPO, {"training/best.json": json.dumps(THEIRS).encode()})
    (problem,) = seen(demo, tmp_path / "run", hub_private_repo=False)[:1]
    assert problem.severity == "warning"
    assert problem.what.startswith(f"{REPO} has step 99 (eval_loss 0.1000); only a better one")


CARDS = {
    "named": (b"---\nlicense: mit\n---\n", "mit", None),
    "none": (None, None, None),
    "nothing": (b"# Base", None, None),
    "several": (b"---\nlicense: [mit, x]\n---\n", None, None),
    "no YAML": (b"---\na: [\n---\n", None, "its metadata are no YAML"),
    "Latin-1": (b"---\nlicense: m\xeft\n---\n", None, "'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_license_of_the_base_model(hub: HubPeer, api: HfApi, case: str) -> None:
    """What its card on the Hub says; that it cannot be read is said, and ends nothing."""
    content, license, fault = CARDS[case]
    hub.create_repo("acme/base", private=False)
    hub.commit("acme/base", {"README.md": content, "config.json": b"{}"})
    answer = check(api, Target(REPO), {}, "acme/base")
    assert answer["license"] == license
    assert (answer["license_fault"] is None) == (fault is None)
    assert fault is None or fault in answer["license_fault"]
    (line,) = told_of({**answer, "asked": None}, REPO, "acme/base") if fault else [""]
    assert fault is None or line.startswith("the license of acme/base is not known (")


def test_a_license_in_a_folder(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert license_of(card) is None
    card.write_bytes(b"---\nlicense: mit\n---\n")
    assert license_of(card) == "mit"
    card.write_bytes(b"---\na: [\n---\n")
    with pytest.raises(ValueError, match="its metadata are no YAML"):
        license_of(card)
