"""`keepstep push` against a Hub that does everything wrong: one commit, whole, or none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from huggingface_hub import ModelCard

from keepstep.publish.bundle import measured_on
from keepstep.publish.by_hand import PushFailedError, best_of, push_best
from keepstep.publish.publisher import Publisher
from keepstep.publish.remote import Target
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv
from tests.helpers.waiting import PATIENCE, wait_for
from tests.hub.client import Client
from tests.hub.faults import Kind
from tests.hub.peer import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubPeer
from tests.hub.runs import REPO, a_run, live_at
from tests.hub.test_peer import UPLOAD

COMMIT = f"^/api/models/{REPO}/commit/"
CARD = '{"license": "apache-2.0", "base_model": "acme/base", "datasets": ["acme/data"]}'
PUSHED = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "model.safetensors", "training/arguments.json"),
    *("training/best.json", "training/curve.png", "training/metrics.json", ".gitattributes"),
}


@pytest.fixture(scope="module")
def trained(ranks: Ranks, demo: Path, workspace: Path) -> dict[str, RunFolder]:
    """Runs of two processes: `full`; `bare`, without weights files; and an adapter's."""
    kinds: dict[str, dict[str, Any]] = {
        "full": {},
        "bare": {"save_weights": "never"},
        "adapter": LORA,
    }
    for kind, fields in kinds.items():
        command = argv(demo, workspace / f"push-{kind}", max_steps=8, card=CARD, **fields)
        ranks.run(command)
    return {kind: RunFolder(workspace / f"push-{kind}") for kind in kinds}


@pytest.fixture
def run(trained: dict[str, RunFolder]) -> RunFolder:
    return trained["full"]


@pytest.fixture
def here(client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    live_at(client, monkeypatch)
    return client


def push(
    run: RunFolder, timeout: float = PATIENCE, force: bool = False, dry_run: bool = False
) -> str:
    told = push_best(run, REPO, force=force, timeout=timeout, dry_run=dry_run)
    assert not (run.private / "publish-by-hand").exists()
    return "\n".join(told)


def titles(hub: HubPeer) -> list[str]:
    return [commit.title for commit in hub.history(REPO)]


def title(run: RunFolder) -> str:
    best = best_of(run)
    return f"Step {best.step}: eval_loss {best.manifest.metrics['eval_loss']:.4f}"


def pushing() -> list[psutil.Process]:
    """The processes that talk to a Hub now; their arguments hold nothing."""
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    found = [p for p in alive if p.cmdline()[-1:] == ["keepstep.publish.push"]]
    assert all(len(process.cmdline()) == 3 for process in found)
    return found


@pytest.mark.usefixtures("here")
def test_one_commit_and_no_more(hub: HubPeer, run: RunFolder) -> None:
    assert push(run).startswith(f"{REPO}: published, step 8, commit {hub.history(REPO)[0].oid[:8]}")
    assert push(run).startswith(f"{REPO}: already there, step 8")
    assert titles(hub) == [title(run), "initial commit"]
    assert hub.files(REPO).keys() == PUSHED
    assert hub.store.repos[REPO].private
    weights = (best_of(run).path / "model.safetensors").read_bytes()
    assert hub.read(REPO, "model.safetensors") == weights
    said = json.loads(hub.read(REPO, "training/best.json"))
    assert (said["global_step"], said["run_id"]) == (8, run.run_id())
    assert said["weights"] == {"model.safetensors": hub.files(REPO)["model.safetensors"].sha256}
    metrics = json.loads(hub.read(REPO, "training/metrics.json"))
    assert [row["step"] for row in metrics if "eval_loss" in row] == [4, 8]


def test_by_lfs(
    hub: HubPeer, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way to transfer; all the rest goes it in the long campaign."""
    live_at(Client(hub, tmp_path / "lfs", "lfs"), monkeypatch)
    hub.fault("reset", path="^/object/", after_bytes=100_000)
    assert "published" in push(run)
    weights = (best_of(run).path / "model.safetensors").read_bytes()
    assert hub.read(REPO, "model.safetensors") == weights
    assert titles(hub) == [title(run), "initial commit"]
    assert hub.requests("POST", "^/v1/xorbs/") == []


@pytest.mark.usefixtures("here")
def test_how_far_it_is(hub: HubPeer, demo: Path, tmp_path: Path) -> None:
    """What is read, then what has left: more than a socket holds, so that it is seen on its way."""
    weights = os.urandom(48 * 2**20)
    large = a_run(tmp_path / "large", demo / "model", files={"model.safetensors": weights})
    fault = hub.fault("delay", path=UPLOAD, seconds=300, times=-1)
    seen: dict[str, list[tuple[int, int | None]]] = {}

    @contextlib.contextmanager
    def progress(text: str) -> Iterator[Callable[[int, int | None], None]]:
        def tell(done: int, total: int | None) -> None:
            seen.setdefault(text, []).append((done, total))
            if text.startswith("sending ") and done:
                fault.end()

        yield tell

    told = push_best(large, REPO, timeout=300, progress=progress)
    assert told[0].startswith(f"{REPO}: published, step 8")
    size = len(weights)
    for text, steps in seen.items():
        assert text in ("reading checkpoint-8", f"sending checkpoint-8 to {REPO}")
        assert all(0 <= done <= total for done, total in steps if total is not None)
    total = {total for _, total in seen[f"sending checkpoint-8 to {REPO}"] if total}
    assert all(size <= one <= size + 2**20 for one in total), "beside them texts alone"
    assert b"%" not in (large.publishing / "push.log").read_bytes(), "no bars of the library's"


@pytest.mark.usefixtures("here")
def test_nothing_private_leaves(hub: HubPeer, run: RunFolder, workspace: Path) -> None:
    push(run)
    for needle in (WRITE_TOKEN, str(workspace), str(Path.home()) + "/"):
        assert hub.find_bytes(needle.encode()) == []
    texts = [hub.read(REPO, name) for name in PUSHED if name.endswith((".md", ".json", ".jinja"))]
    assert not any(os.uname().nodename.encode() in text.split() for text in texts)
    assert hub.mentions(WRITE_TOKEN, "storage") == []
    assert hub.requests(role="storage") != []
    for path in run.path.rglob("*"):
        assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes()


@pytest.mark.usefixtures("here")
def test_the_card(hub: HubPeer, run: RunFolder, tmp_path: Path) -> None:
    push(run)
    (tmp_path / "README.md").write_bytes(hub.read(REPO, "README.md"))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("acme/base", "apache-2.0")
    assert card.data.datasets == ["acme/data"]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    (result,) = card.data.eval_results
    assert result.metric_type == "eval_loss"
    value = best_of(run).manifest.metrics["eval_loss"]
    assert result.metric_value == pytest.approx(value, abs=1e-6)
    assert 'AutoModelForCausalLM.from_pretrained("tester/demo")' in card.text
    assert hub.read(REPO, "training/curve.png").startswith(b"\x89PNG")


@pytest.mark.usefixtures("here")
def test_dry_run(hub: HubPeer, run: RunFolder) -> None:
    told = push(run, dry_run=True).splitlines()
    assert told[0] == f"checkpoint-8 to {REPO} (private, if it is new):"
    assert {line.strip() for line in told[1:]} == PUSHED - {".gitattributes"}
    assert hub.log == []


STAGES = {
    "upload": UPLOAD,
    "commit": COMMIT,
    "verification": f"^/api/models/{REPO}/tree/",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("here")
def test_killed_and_again(hub: HubPeer, run: RunFolder, stage: str) -> None:
    """SIGKILL of the process that pushes; the second `tree` is read after the commit."""
    fault = hub.fault("hang", path=STAGES[stage], skip=1 if stage == "verification" else 0)
    failures: list[str] = []

    def first() -> None:
        try:
            push(run)
        except PushFailedError as error:
            failures.append(str(error))

    thread = threading.Thread(target=first)
    thread.start()
    wait_for(lambda: fault.hits)
    (child,) = pushing()
    child.send_signal(signal.SIGKILL)
    thread.join(PATIENCE)
    assert failures == ["not published: the push ended with exit status -9"]
    hub.clear_faults()
    there = stage == "verification"
    assert titles(hub) == ([title(run)] if there else []) + ["initial commit"]
    assert ("already there" if there else "published") in push(run)
    assert titles(hub) == [title(run), "initial commit"]


@pytest.mark.parametrize("do", ["apply_then_status", "apply_then_reset"])
@pytest.mark.usefixtures("here")
def test_applied_and_the_answer_lost(hub: HubPeer, run: RunFolder, do: Kind) -> None:
    hub.fault(do, method="POST", path=COMMIT, status=500)
    assert "published, step 8" in push(run)
    assert titles(hub) == [title(run), "initial commit"]


@pytest.mark.parametrize(
    ("fault", "most"),
    [
        ({"do": "status", "path": COMMIT, "times": 2}, 3),
        ({"do": "status", "path": COMMIT, "status": 429, "headers": {"Retry-After": "1"}}, 2),
        ({"do": "reset", "path": UPLOAD, "after_bytes": 100_000}, 3),
        ({"do": "status", "path": UPLOAD, "times": 2}, 5),
    ],
    ids=["503", "429", "reset", "503 of the storage"],
)
@pytest.mark.usefixtures("here")
def test_what_passes_is_waited_for(hub: HubPeer, run: RunFolder, fault: dict, most: int) -> None:
    rule = hub.fault(**fault)
    assert "published, step 8" in push(run)
    assert rule.hits == fault.get("times", 1)
    assert len(hub.requests(path=fault["path"])) <= most
    assert titles(hub) == [title(run), "initial commit"]


@pytest.mark.usefixtures("here")
def test_a_hub_that_hangs(hub: HubPeer, run: RunFolder) -> None:
    hub.fault("hang", path=COMMIT)
    with pytest.raises(PushFailedError, match="did not answer to the end within 6 s"):
        push(run, timeout=6)
    assert pushing() == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_" + "x" * 34, f"{REPO}: 401: the token is not accepted: export HF_TOKEN"),
        (READ_TOKEN, f"{REPO}: 403: the token may not write there"),
        (OTHER_TOKEN, f"{REPO}: 403: the token may not write there"),
    ],
    ids=["unknown", "read", "foreign"],
)
def test_a_wrong_token(
    hub: HubPeer,
    here: Client,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PushFailedError, match=message):
        push(run)
    asked = Counter((request.method, request.target) for request in hub.requests())
    assert max(asked.values()) <= 2, "it is not tried again, but looked at again what there is"
    assert REPO not in hub.store.repos
    assert token not in (run.publishing / "push.log").read_text()


@pytest.mark.usefixtures("here")
def test_content_that_the_hub_rejects(hub: HubPeer, run: RunFolder) -> None:
    hub.fault("status", path=COMMIT, status=400, message="no such metadata")
    with pytest.raises(PushFailedError, match=r"400: the Hub rejects what was sent .*no such meta"):
        push(run)
    assert len(hub.requests(path=COMMIT)) == 1


def theirs(run: RunFolder, **values: object) -> dict[str, bytes | None]:
    """Somebody else's weights, and what is said of them."""
    said = {"run_id": "other", "global_step": 99, "metric": "eval_loss", "value": 0.1}
    said |= {"measured_on": measured_on(best_of(run).manifest.settings)}
    weights = {"model.safetensors": hashlib.sha256(b"other").hexdigest()}
    said |= {"greater_is_better": False, "weights": weights, **values}
    return {"model.safetensors": b"other", "training/best.json": json.dumps(said).encode()}


@pytest.mark.parametrize("better", [False, True])
@pytest.mark.usefixtures("here")
def test_a_foreign_commit_in_between(hub: HubPeer, run: RunFolder, better: bool) -> None:
    """It comes while ours is on its way: 412, and everything is looked at again."""
    hub.create_repo(REPO)
    fault = hub.fault("delay", method="POST", path=COMMIT, seconds=PATIENCE)
    foreign = {"notes.md": b"kept", **(theirs(run) if better else {})}

    def commit() -> None:
        wait_for(lambda: fault.hits)
        hub.commit(REPO, foreign)
        fault.end()

    other = threading.Thread(target=commit)
    other.start()
    if better:
        with pytest.raises(PushFailedError, match=r"step 99 of run other .* is there, which is no"):
            push(run)
        assert hub.read(REPO, "model.safetensors") == b"other"
    else:
        assert "published, step 8" in push(run)
        assert titles(hub) == [title(run), "By hand", "initial commit"]
    other.join()
    assert 412 in [request.status for request in hub.requests("POST", COMMIT)]
    assert hub.read(REPO, "notes.md") == b"kept"


@pytest.mark.usefixtures("here")
def test_what_cannot_be_compared(hub: HubPeer, run: RunFolder) -> None:
    hub.create_repo(REPO)
    hub.commit(REPO, theirs(run, metric="eval_accuracy"))
    with pytest.raises(PushFailedError, match="cannot be compared"):
        push(run)
    assert "published" in push(run, force=True)


@pytest.mark.parametrize("kind", ["full", "adapter", "bare"])
@pytest.mark.usefixtures("here")
def test_no_stale_weights(hub: HubPeer, trained: dict[str, RunFolder], kind: str) -> None:
    """Over shards, an old .bin and an adapter; from shards of ZeRO, if there are no weights."""
    hub.create_repo(REPO)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names += ["model.safetensors.index.json", "pytorch_model.bin", "adapter_model.safetensors"]
    names += ["adapter_config.json", "config.json", "notes.md", "figures/model.safetensors"]
    hub.commit(REPO, dict.fromkeys(names, b"{}"))
    push(trained[kind], force=True)
    pushed = PUSHED | {"notes.md", "figures/model.safetensors"}
    if kind == "adapter":
        pushed -= {"model.safetensors", "config.json", "generation_config.json"}
        pushed |= {"adapter_model.safetensors", "adapter_config.json"}
        config = json.loads(hub.read(REPO, "adapter_config.json"))
        assert config["base_model_name_or_path"] == "acme/base"
    assert hub.files(REPO).keys() == pushed


@pytest.mark.parametrize("status", [403, 503])
@pytest.mark.usefixtures("here")
def test_no_answer_is_not_nothing_there(hub: HubPeer, run: RunFolder, status: int) -> None:
    """A better model must not be overwritten because the Hub would not say what is there."""
    hub.create_repo(REPO)
    hub.commit(REPO, theirs(run))
    hub.fault("status", path="resolve/.*best.json", status=status, times=-1)
    seconds, told = (PATIENCE, "403") if status == 403 else (8, "within 8 s")
    with pytest.raises(PushFailedError, match=told):
        push(run, timeout=seconds)
    assert titles(hub) == ["By hand", "initial commit"]


@pytest.mark.usefixtures("here")
def test_what_cannot_be_read_is_not_overwritten(hub: HubPeer, run: RunFolder) -> None:
    hub.create_repo(REPO)
    hub.commit(REPO, {"training/best.json": b"torn"})
    with pytest.raises(
        PushFailedError, match=r"best.json cannot be read, so that it cannot be com"
    ):
        push(run)


@pytest.mark.usefixtures("here")
def test_a_card_that_somebody_has_edited(hub: HubPeer, run: RunFolder) -> None:
    """The weights are there: nothing is to be done, and nothing is amiss."""
    push(run)
    hub.commit(REPO, {"README.md": b"# Ours"}, title="A better text")
    assert "already there" in push(run)
    assert hub.read(REPO, "README.md") == b"# Ours"


@pytest.mark.usefixtures("here")
def test_a_card_that_the_hub_does_not_take(hub: HubPeer, run: RunFolder) -> None:
    hub.fault("status", path="validate-yaml", status=400, times=-1)
    with pytest.raises(PushFailedError, match="400: the Hub rejects what was sent"):
        push(run)
    assert len(hub.requests(path="validate-yaml")) == 1, "it is not tried again"


def test_whoever_starts_it_dies(hub: HubPeer, here: Client, run: RunFolder, tmp_path: Path) -> None:
    """The process that pushes does not live on alone."""
    fault = hub.fault("hang", path=COMMIT)
    keepstep = str(Path(sys.executable).parent / "keepstep")
    command = [keepstep, "push", str(run.path), "--repo_id", REPO]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: fault.hits)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    child.wait(PATIENCE)


@pytest.mark.usefixtures("here")
def test_not_too_often(hub: HubPeer, run: RunFolder, tmp_path: Path) -> None:
    """The first improvement goes at once, the next waits its time, the last goes at the end."""
    first, second = run.checkpoints()
    events: list[dict] = []
    publisher = a_publisher(run, tmp_path, events, pause=1000.0)
    publisher.offer(first)
    deadline = time.monotonic() + PATIENCE
    while not events:
        assert time.monotonic() < deadline
        publisher.offer(second)
        time.sleep(0.05)
    for _ in range(3):
        publisher.offer(second)
    assert pushing() == []
    assert publisher.finish(second)["outcome"] == "published"
    assert [event["step"] for event in events] == [4, 8]
    assert [commit.title[:7] for commit in hub.history(REPO)] == ["Step 8:", "Step 4:", "initial"]


def a_publisher(run: RunFolder, folder: Path, events: list[dict], pause: float = 0.0) -> Publisher:
    """Of the run's checkpoints, in a folder of its own."""
    return Publisher(
        RunFolder(folder),
        run.policy(),
        Target(REPO),
        lambda event, **facts: events.append({"event": event, **facts}),
        Storage(),
        pause=pause,
        timeout=PATIENCE,
    )


def test_a_publisher_ends_no_training(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process can be started, or it ends at once."""
    events: list[dict] = []
    publisher, best = a_publisher(run, tmp_path, events), best_of(run)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    publisher.offer(best)
    assert "error" in publisher.finish(best)
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    for _ in range(20):
        publisher.offer(best)
    answer = publisher.finish(best)
    assert answer == {"error": "the push ended with exit status 0"}
    assert {event["event"] for event in events} == {"publish"}
    assert [p for p in publisher.run.publishing.iterdir() if p.is_dir()] == []
