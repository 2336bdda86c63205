"""What a push finds in a repository: somebody's model, ours come to harm, another visibility."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from huggingface_hub import HfApi, ModelCard
from tenacity import RetryCallState, Retrying, wait_chain, wait_fixed
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.hub import client
from keepstep.hub.client import HubError
from keepstep.policy.retention import Policy
from keepstep.publish import hub
from keepstep.publish.best import Best
from keepstep.publish.bundle import make_bundle
from keepstep.publish.by_hand import PushFailedError, push_best
from keepstep.publish.hub import Pushed
from keepstep.publish.remote import Target
from keepstep.run_folder.reader import RunFolder
from tests.helpers import launchers
from tests.helpers.waiting import PATIENCE, wait_for
from tests.hub.peer import HubPeer
from tests.hub.runs import POLICY, REPO, a_run
from tests.hub.test_push import COMMIT

pytestmark = pytest.mark.usefixtures("here")
MODEL = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"somebody's weights"}


class Bundle:
    """What would be sent, and the sending of it: by the real client, in this process."""

    def __init__(self, run: RunFolder, folder: Path, card: dict[str, str] | None = None) -> None:
        self._folder, self._card = folder, card
        checkpoint = run.path / "checkpoint-8"
        self.best = make_bundle(checkpoint, Policy(**POLICY), REPO, folder, card or {})  # type: ignore[arg-type]

    def push(self, api: HfApi, best: Best | None = None, **target: bool) -> Pushed:
        asked = bool(self._card)
        return hub.push(api, Target(REPO, **target), self._folder, best or self.best, asked)


@pytest.fixture(scope="module")
def bundle(demo: Path, workspace: Path) -> Bundle:
    run = a_run(workspace / "repositories", demo / "model")
    return Bundle(run, workspace / "repositories/bundle")


def titles(peer: HubPeer) -> list[str]:
    return [commit.title for commit in peer.history(REPO)]


@pytest.mark.parametrize(
    "theirs",
    [MODEL, {"pytorch_model.bin": b"old"}, {"q4.gguf": b"GGUF"}, {"tokenizer.json": b"{}"}],
    ids=["model", "bin", "gguf", "tokenizer"],
)
def test_somebodys_model_is_not_overwritten(
    peer: HubPeer, api: HfApi, bundle: Bundle, theirs: Mapping[str, bytes]
) -> None:
    """keepstep has not published it: there is no best.json."""
    peer.create_repo(REPO)
    peer.commit(REPO, {**theirs, "notes.md": b"kept", "README.md": b"# Theirs"})
    with pytest.raises(HubError, match="a model is there that keepstep did not publish") as told:
        bundle.push(api)
    assert told.value.fatal
    assert titles(peer) == ["By hand", "initial commit"]
    assert all(peer.read(REPO, name) == content for name, content in theirs.items())
    assert bundle.push(api, force=True).outcome == "published"
    assert peer.read(REPO, "notes.md") == b"kept"


def test_an_empty_repository_is_filled(peer: HubPeer, api: HfApi, bundle: Bundle) -> None:
    """As the Hub's page makes one: with a README, and other texts that somebody has put there."""
    peer.create_repo(REPO)
    peer.commit(REPO, {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT"})
    assert bundle.push(api).outcome == "published"


@pytest.mark.parametrize("force", [False, True])
def test_what_came_to_harm_is_mended(
    peer: HubPeer, api: HfApi, bundle: Bundle, force: bool
) -> None:
    """Beside a best.json that is as it was; nothing else is touched, and there is one commit."""
    bundle.push(api)
    before = {name: peer.read(REPO, name) for name in peer.files(REPO)}
    damage = {"config.json": None, "model.safetensors": b"cut", "tokenizer.json": b"{}"}
    foreign = {"adapter_config.json": b"{}", "README.md": b"# Ours", "notes.md": b"kept"}
    peer.commit(REPO, {**damage, **foreign})
    told = bundle.push(api, force=force)
    assert (told.outcome, told.commit) == ("mended", peer.history(REPO)[0].oid)
    text = ["README.md"] if force else []  # people write there
    assert told.mended == [*text, *sorted(damage), "adapter_config.json"]
    after = {name: peer.read(REPO, name) for name in peer.files(REPO)}
    readme = before["README.md"] if force else b"# Ours"
    assert after == {**before, "README.md": readme, "notes.md": b"kept"}
    assert len(titles(peer)) == 4
    assert titles(peer)[0].startswith("Step 8: eval_loss 1.2500 (mended: ")
    assert bundle.push(api, force=force).outcome == "present"


def test_weights_that_are_gone_are_sent_again(peer: HubPeer, api: HfApi, bundle: Bundle) -> None:
    bundle.push(api)
    weights = peer.read(REPO, "model.safetensors")
    peer.commit(REPO, {"model.safetensors": None, "README.md": None})
    assert bundle.push(api).mended == ["README.md", "model.safetensors"]
    assert peer.read(REPO, "model.safetensors") == weights


def test_a_new_card(
    peer: HubPeer, api: HfApi, bundle: Bundle, made: RunFolder, tmp_path: Path
) -> None:
    """The weights are there; --card asks for other metadata."""
    bundle.push(api)
    again = Bundle(made, tmp_path / "bundle", card={"license": "mit"})
    assert again.push(api).mended == ["README.md"]
    (tmp_path / "README.md").write_bytes(peer.read(REPO, "README.md"))
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"


def test_the_same_weights_of_another_run(peer: HubPeer, api: HfApi, bundle: Bundle) -> None:
    """What that run says of them stays."""
    bundle.push(api)
    said = replace(bundle.best, run_id="other", metric="eval_accuracy", value=0.5)
    peer.commit(REPO, {"training/best.json": said.to_json().encode(), "config.json": b"{}"})
    assert bundle.push(api).mended == ["config.json"]
    assert json.loads(peer.read(REPO, "training/best.json")) == asdict(said)


def test_better_weights_that_are_not_there(peer: HubPeer, api: HfApi, bundle: Bundle) -> None:
    """best.json speaks of a better model, whose weights somebody has removed."""
    bundle.push(api)
    weights = {"model.safetensors": "0" * 64}
    said = replace(bundle.best, run_id="other", global_step=99, value=0.1, weights=weights)
    peer.commit(REPO, {"training/best.json": said.to_json().encode()})
    message = r"model.safetensors there is not what its training/best.json speaks of"
    with pytest.raises(HubError, match=message):
        bundle.push(api)
    assert bundle.push(api, force=True).outcome == "published"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_value_that_is_no_number(peer: HubPeer, api: HfApi, bundle: Bundle, value: str) -> None:
    """It would be better than every number, for ever."""
    other = replace(bundle.best, weights={"other.safetensors": "0" * 64}).to_json()
    peer.create_repo(REPO)
    peer.commit(REPO, {"training/best.json": other.replace("1.25", value).encode()})
    with pytest.raises(HubError, match=r"best.json cannot be read"):
        bundle.push(api)
    assert bundle.push(api, force=True).outcome == "published"


def test_private_and_public(peer: HubPeer, api: HfApi, bundle: Bundle) -> None:
    """What is asked for is done for a new repository; nothing private goes into a public one."""
    assert bundle.push(api).private
    assert peer.store.repos.pop(REPO).private
    assert not bundle.push(api, private=False).private
    assert not peer.store.repos[REPO].private
    with pytest.raises(HubError, match="can be read by everybody, and private was asked for"):
        bundle.push(api, private=True)
    assert not bundle.push(api).private, "it was made before, and is left as it is"


def test_every_request_has_a_timeout(
    peer: HubPeer, api: HfApi, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in its turn is never answered; the next try finds what there is."""
    monkeypatch.setattr(client, "READ_TIMEOUT", 0.5)
    monkeypatch.setattr(client, "PAUSES", wait_fixed(0.05))
    bundle.push(api)
    kinds = ("whoami", f"{REPO}$", "/tree/", "auth-check", "resolve/", "preupload", COMMIT)
    for kind in (*kinds, "validate-yaml"):
        peer.commit(REPO, {"config.json": None})
        fault = peer.fault("hang", path=kind)
        hub.check(api, Target(REPO), {}, None)
        assert bundle.push(api).outcome in ("mended", "published"), kind
        assert fault.hits == 1, kind


def test_an_answer_that_is_none_of_the_hubs(peer: HubPeer, api: HfApi, bundle: Bundle) -> None:
    """A page about maintenance, with status 200: it passes."""
    fault = peer.fault("status", path=f"{REPO}$", status=200, message="<html>")
    assert bundle.push(api).outcome == "published"
    assert fault.hits == 1


def push(run: RunFolder, repo_id: str | None = REPO, dry_run: bool = False) -> list[str]:
    return push_best(run, repo_id, timeout=PATIENCE, dry_run=dry_run)


def test_a_hub_that_does_not_listen(api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """What httpx has from httpcore is the same text, and said once."""
    monkeypatch.setattr(client, "PAUSES", wait_fixed(0.05))
    api.endpoint = "http://127.0.0.1:9"
    with pytest.raises(HubError) as told:
        client.with_patience(REPO, lambda: api.repo_info(REPO), tries=2)
    assert str(told.value).count("Connection refused") == 1


def test_no_try_begins_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last error is told then, instead of a process that was ended in a pause."""
    monkeypatch.setattr(client, "PAUSES", wait_chain(wait_fixed(0), wait_fixed(2 * PATIENCE)))
    begun: list[float] = []

    def fail() -> None:
        begun.append(time.monotonic())
        raise OSError("no route to host")

    for seconds, tries in ((PATIENCE, 2), (-1, 1)):
        begun.clear()
        until = time.monotonic() + seconds
        with pytest.raises(HubError, match="last: no route to host; there was no time") as told:
            client.with_patience(REPO, fail, tries=50, until=until)
        assert len(begun) == tries
        assert all(moment < until for moment in begun[1:])
        count = "1 try" if tries == 1 else f"{tries} tries"
        assert str(told.value).startswith(f"{REPO}: {count}, the last: ")
        assert not told.value.fatal


def test_pauses_grow_and_no_two_processes_keep_the_same_ones() -> None:
    state = RetryCallState(Retrying(), None, (), {})
    for number, least in enumerate((1, 2, 4, 8, 15, 15), 1):
        state.attempt_number = number
        drawn = [client.PAUSES(state) for _ in range(20)]
        assert all(least <= pause <= least + 1 for pause in drawn)
        assert len(set(drawn)) > 10


def test_a_token_that_is_none(peer: HubPeer, api: HfApi, bundle: Bundle) -> None:
    api.token = "hf_ä"
    with pytest.raises(HubError, match="the token holds a character that no token has"):
        bundle.push(api)


def test_a_best_checkpoint_without_its_weights(peer: HubPeer, made: RunFolder) -> None:
    (made.path / "checkpoint-8/model.safetensors").unlink()
    with pytest.raises(PushFailedError, match=r"model.safetensors of checkpoint-8 is missing"):
        push(made)
    assert peer.store.repos == {}
    assert not (made.private / "publish-by-hand").exists()


@pytest.mark.parametrize("name", ["demo", "tester/de mo", "a/b/c", "tester/demo.git", "/demo"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_no_name(peer: HubPeer, made: RunFolder, name: str, dry_run: bool) -> None:
    """Of a bare one a repository would be made."""
    with pytest.raises(PushFailedError, match="is no repository name: owner/name"):
        push(made, name, dry_run=dry_run)
    assert (peer.log, peer.store.repos) == ([], {})


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"])
def test_what_the_environment_lacks_is_said_at_once(
    peer: HubPeer, made: RunFolder, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "" if variable == "HF_TOKEN" else "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    message = "there is no token" if variable == "HF_TOKEN" else f"{variable} is set: unset it"
    with pytest.raises(PushFailedError, match=message):
        push(made)
    assert not (made.publishing / "push.log").exists(), "nothing was begun"
    assert len(push(made, dry_run=True)) > 1


def test_two_pushes_at_once(peer: HubPeer, made: RunFolder) -> None:
    """The second one is told to wait, and takes nothing from the first."""
    fault = peer.fault("delay", method="POST", path=COMMIT, seconds=PATIENCE)
    told: list[str] = []
    first = threading.Thread(target=lambda: told.extend(push(made)))
    first.start()
    wait_for(lambda: fault.hits)
    with pytest.raises(
        PushFailedError, match=r"another `keepstep push .*` is at work: wait for it"
    ):
        push(made)
    fault.end()
    first.join(PATIENCE)
    assert told[0].startswith(f"{REPO}: published, step 8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--card", "[1]"], "--card is no JSON object: [1]"),
        (["--card", '"mit"'], '--card is no JSON object: "mit"'),
        (["--card", "{license: mit}"], "--card is no JSON: Expecting property name"),
        (["--card", '{"license": 1e999}'], "--card is no JSON: '1e999' is no finite number"),
        (["--card", '{"tags": 5}'], "card: tags is 5, not a text, or a list of texts"),
        (["--card", '{"license": ["mit"]}'], "card: license is ['mit'], not a text"),
        (["--card", '{"model-index": 3}'], "card: the Hub takes no such metadata: Invalid"),
        (["--timeout", "0"], "--timeout 0 is not between 0 and"),
        (["--timeout", "nan"], "--timeout nan is not between 0 and"),
        (["--repo_id", "demo"], "'demo' is no repository name: owner/name"),
    ],
)
def test_wrong_words(peer: HubPeer, made: RunFolder, flags: list[str], message: str) -> None:
    """One message, exit status 2, and nobody was asked."""
    done = CliRunner().invoke(app, ["push", str(made.path), "--repo_id", REPO, *flags])
    assert (done.exit_code, done.exception.__class__) == (2, SystemExit), done.output
    assert message in done.output
    assert peer.log == []


def test_what_is_told(peer: HubPeer, made: RunFolder) -> None:
    """Line by line: what would go, what went, and who can read it."""

    def told(*flags: str) -> list[str]:
        done = CliRunner().invoke(app, ["push", str(made.path), "--repo_id", REPO, *flags])
        assert done.exit_code == 0, done.output
        return done.output.splitlines()

    assert told("--dry-run")[0] == f"checkpoint-8 to {REPO} (private, if it is new):"
    assert told("--dry-run", "--public")[0] == f"checkpoint-8 to {REPO} (public, if it is new):"
    assert peer.log == []
    assert told("--public") == [
        f"{REPO}: published, step 8, commit {peer.history(REPO)[0].oid[:8]}"
    ]
    assert not peer.store.repos[REPO].private
    peer.commit(REPO, {"config.json": None})
    assert told() == [
        f"{REPO}: mended, step 8, commit {peer.history(REPO)[0].oid[:8]}",
        "  config.json",
        f"{REPO} can be read by everybody: it was made before, and is left as it is",
    ]


@pytest.mark.parametrize(
    ("fault", "flags", "expected"),
    [
        ({"do": "status", "status": 503}, ["--timeout", "20"], 75),
        ({"do": "hang"}, ["--timeout", "8"], 75),
        ({"do": "status", "status": 403}, [], 2),
        ({"do": "status", "status": 401}, [], 2),
    ],
    ids=lambda value: str(value),
)
def test_a_hub_that_is_away_is_no_mistake(
    peer: HubPeer,
    made: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any],
    flags: list[str],
    expected: int,
) -> None:
    """75, as `EX_TEMPFAIL`: the same command may do later. 2: it will not."""
    peer.fault(**fault, path="^/api/", times=-1)
    done = CliRunner().invoke(app, ["push", str(made.path), "--repo_id", REPO, *flags])
    assert done.exit_code == expected, done.output
    assert done.output.startswith("keepstep: not published: ")
    assert not (made.private / "publish-by-hand").exists()


def test_a_push_that_is_interrupted(peer: HubPeer, made: RunFolder) -> None:
    """Ctrl-C while the Hub says nothing: that is told, and nothing is left at work."""
    fault = peer.fault("hang", path="^/api/", times=-1)
    code = "from keepstep.cli.main import main; main()"
    command = [sys.executable, "-c", code, "push", str(made.path), "--repo_id", REPO]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, preexec_fn=launchers.hear_signals
    )
    wait_for(lambda: fault.hits)
    (pushing,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, told
    assert told == "keepstep: interrupted: one commit is sent, which is there whole or not at all\n"
    assert not psutil.wait_procs([pushing], PATIENCE)[1], "it is left"
    assert not (made.private / "publish-by-hand").exists()
