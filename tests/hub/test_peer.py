"""The loopback Hub, as the real client sees it on both ways to transfer."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.waiting import PATIENCE, wait_for
from tests.hub.client import Client
from tests.hub.faults import Kind
from tests.hub.peer import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, HubPeer

REPO = "tester/model"
UPLOAD = "^/object/|^/v1/xorbs/"
COMMIT = f"^/api/models/{REPO}/commit/"
WEIGHTS = os.urandom(11_000_000)
PUSH = f"""
files = ["model.safetensors", "config.json"]
added = [CommitOperationAdd(name, name) for name in files]
attempt(api.create_commit, "{REPO}", added, commit_message="Step 10")
"""


@pytest.fixture
def pushing(hub: HubPeer, client: Client) -> Client:
    """A client with files to push, and a private repository for them."""
    (client.folder / "model.safetensors").write_bytes(WEIGHTS)
    (client.folder / "config.json").write_text("{}")
    hub.create_repo(REPO)
    return client


def titles(hub: HubPeer) -> list[str]:
    return [commit.title for commit in hub.history(REPO)]


def test_push_and_pull(hub: HubPeer, pushing: Client) -> None:
    assert pushing.run(PUSH) == ["done"]
    assert titles(hub) == ["Step 10", "initial commit"]
    assert hub.read(REPO, "model.safetensors") == WEIGHTS
    pushing.run(f'api.snapshot_download("{REPO}", local_dir="copy")')
    assert (pushing.folder / "copy/model.safetensors").read_bytes() == WEIGHTS
    assert (pushing.folder / "copy/config.json").read_text() == "{}"
    by_xet = pushing.mode == "xet"
    assert bool(hub.requests("POST", "^/v1/xorbs/", "storage")) == by_xet
    assert bool(hub.requests("PUT", "^/object/", "storage")) != by_xet


def test_create_a_repo(hub: HubPeer, client: Client) -> None:
    create = f'attempt(api.create_repo, "{REPO}", private=True)\n'
    assert client.run(create * 2) == ["done", "409 HfHubHTTPError"]
    assert client.run(f'api.create_repo("{REPO}", exist_ok=True)') == []
    assert hub.store.repos[REPO].private
    assert client.run(create, READ_TOKEN) == ["403 HfHubHTTPError"]
    assert client.run(create, OTHER_TOKEN) == ["403 HfHubHTTPError"]


def test_what_the_client_reads_of_a_repo(hub: HubPeer, pushing: Client) -> None:
    pushing.run(PUSH)
    hub.commit(REPO, {"training/best.json": b"{}"}, "Best")
    script = f"""
info = api.model_info("{REPO}", files_metadata=True)
print(info.private, [(file.rfilename, file.size) for file in info.siblings])
print([commit.title for commit in api.list_repo_commits("{REPO}")])
print([(entry.path, entry.lfs.sha256) for entry in api.list_repo_tree("{REPO}", recursive=True)
       if getattr(entry, "lfs", None)])
print([entry.path for entry in api.list_repo_tree("{REPO}")])
print([entry.path for entry in api.get_paths_info("{REPO}", ["training", "config.json", "no"])])
print(info.sha, api.whoami()["name"])
"""
    entries = hub.files(REPO)
    sizes = [(path, entries[path].size) for path in sorted(entries)]
    assert pushing.run(script) == [
        f"True {sizes}",
        str(titles(hub)),
        str([("model.safetensors", entries["model.safetensors"].sha256)]),
        str([".gitattributes", "config.json", "model.safetensors", "training"]),
        str(["training", "config.json"]),
        f"{hub.history(REPO)[0].oid} tester",
    ]


def test_a_commit_deletes(hub: HubPeer, pushing: Client) -> None:
    hub.commit(REPO, {"model-1.safetensors": b"stale", "logs/a": b"", "logs/b": b""})
    script = """
added += [CommitOperationDelete("model-1.safetensors"), CommitOperationDelete("logs/")]
"""
    assert pushing.run(PUSH.replace("attempt", script + "attempt")) == ["done"]
    assert set(hub.files(REPO)) == {".gitattributes", "config.json", "model.safetensors"}
    before = hub.history(REPO)[1].oid
    assert hub.read(REPO, "model-1.safetensors", before) == b"stale"
    gone = 'attempt(api.delete_file, "no.txt", "tester/model")'
    assert pushing.run(gone) == ["404 RemoteEntryNotFoundError"]


def test_a_parent_that_is_not_the_head(hub: HubPeer, pushing: Client) -> None:
    parent = hub.history(REPO)[0].oid
    push = PUSH.replace("Step 10", f'Step 10", parent_commit="{parent}')
    hub.commit(REPO, {"notes.txt": b"theirs"})
    assert pushing.run(push) == ["412 HfHubHTTPError"]
    assert titles(hub) == ["By hand", "initial commit"]
    parent_now = hub.history(REPO)[0].oid
    assert pushing.run(push.replace(parent, parent_now)) == ["done"]
    assert hub.read(REPO, "notes.txt") == b"theirs"


@pytest.mark.parametrize(
    ("token", "write", "read"),
    [
        (WRITE_TOKEN, "done", "done"),
        (READ_TOKEN, "403 HfHubHTTPError", "done"),
        (OTHER_TOKEN, "404 RepositoryNotFoundError", "404 RepositoryNotFoundError"),
        (WRITE_TOKEN[:-1] + "y", "401 HfHubHTTPError", "401 HfHubHTTPError"),
        (None, "401 RepositoryNotFoundError", "401 RepositoryNotFoundError"),
    ],
    ids=["write", "read", "foreign", "wrong", "none"],
)
def test_what_a_token_may(
    hub: HubPeer, pushing: Client, token: str | None, write: str, read: str
) -> None:
    checks = f"""
attempt(api.auth_check, "{REPO}", write=True)
attempt(api.auth_check, "{REPO}")
attempt(api.model_info, "{REPO}")
"""
    assert pushing.run(PUSH + checks, token) == [write, write, read, read]
    assert len(titles(hub)) == (2 if write == "done" else 1)


def test_others_read_what_is_public(hub: HubPeer, client: Client) -> None:
    hub.create_repo("tester/public", private=False)
    hub.commit("tester/public", {"config.json": b"{}"})
    script = """
attempt(api.hf_hub_download, "tester/public", "config.json")
attempt(api.hf_hub_download, "tester/public", "no.json")
attempt(api.hf_hub_download, "tester/public", "config.json", revision="no")
attempt(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="tester/public")
"""
    lines = ["done", "404 RemoteEntryNotFoundError", "404 RevisionNotFoundError"]
    assert client.run(script, OTHER_TOKEN) == [*lines, "403 HfHubHTTPError"]


def test_the_storage_never_sees_the_token(hub: HubPeer, pushing: Client) -> None:
    pushing.run(PUSH + f'api.snapshot_download("{REPO}")')
    assert len(hub.requests(role="storage")) >= 2
    assert hub.mentions(WRITE_TOKEN, "hub")
    assert hub.mentions(WRITE_TOKEN, "storage") == []
    assert hub.find_bytes(WRITE_TOKEN.encode()) == []


def test_where_bytes_stand(hub: HubPeer, pushing: Client) -> None:
    pushing.run(PUSH)
    oid = hub.history(REPO)[0].oid[:8]
    assert hub.find_bytes(WEIGHTS[5_000_000:5_000_100]) == [f"{REPO}@{oid}:model.safetensors"]


def test_a_token_in_a_file_is_refused(hub: HubPeer, pushing: Client) -> None:
    (pushing.folder / "config.json").write_text(f'{{"token": "{READ_TOKEN}"}}')
    assert pushing.run(PUSH) == ["400 BadRequestError"]
    assert titles(hub) == ["initial commit"]
    assert hub.find_bytes(READ_TOKEN.encode()) == []


def test_a_card_is_checked(hub: HubPeer, client: Client) -> None:
    hub.create_repo(REPO)
    script = """
from huggingface_hub import ModelCard

for base in ("/local/path", "org/base"):
    text = "---\\nlicense: mit\\nbase_model: " + base + "\\n---\\nWords"
    try:
        ModelCard(text).push_to_hub("tester/model", commit_message=base)
    except ValueError as error:
        print("refused" if "base_model" in str(error) else error)
info = api.model_info("tester/model")
print(ModelCard.load("tester/model").data.base_model, info.card_data.license)
"""
    assert client.run(script) == ["refused", "org/base mit"]
    assert titles(hub) == ["org/base", "initial commit"]


def test_a_commit_is_refused_twice(hub: HubPeer, pushing: Client) -> None:
    fault = hub.fault("status", method="POST", path=COMMIT, times=2)
    again = 'attempt(api.create_commit, "tester/model", added, commit_message="Step 10")\n'
    assert pushing.run(PUSH + again * 2) == ["503 HfHubHTTPError"] * 2 + ["done"]
    assert fault.hits == 2
    assert [request.status for request in hub.requests("POST", COMMIT)] == [503, 503, 200]
    assert titles(hub) == ["Step 10", "initial commit"]


def test_an_upload_is_reset(hub: HubPeer, pushing: Client) -> None:
    fault = hub.fault("reset", path=UPLOAD, role="storage", after_bytes=1_000_000)
    assert pushing.run(PUSH)[-1] == "done"
    first, *rest = hub.requests(path=UPLOAD, role="storage")
    assert (fault.hits, first.fault, first.status) == (1, "reset", None)
    assert 1_000_000 <= first.received < len(WEIGHTS)
    assert rest[-1].status == 200
    assert hub.read(REPO, "model.safetensors") == WEIGHTS


@pytest.mark.parametrize("do", ["apply_then_reset", "apply_then_status"])
def test_a_commit_is_applied_and_the_answer_lost(hub: HubPeer, pushing: Client, do: Kind) -> None:
    hub.fault(do, method="POST", path=COMMIT, status=500)
    script = PUSH.replace("\nattempt", "\ntry: attempt") + "except Exception: print('lost')"
    (line,) = pushing.run(script)
    assert line == ("lost" if do == "apply_then_reset" else "500 HfHubHTTPError")
    assert titles(hub) == ["Step 10", "initial commit"]
    assert hub.read(REPO, "model.safetensors") == WEIGHTS


def test_the_client_waits_as_told(hub: HubPeer, pushing: Client) -> None:
    hub.fault("status", path="/preupload/", status=429, headers={"Retry-After": "2"})
    assert pushing.run(PUSH)[-1] == "done"
    first, second = hub.requests("POST", "/preupload/")
    assert (first.status, second.status) == (429, 200)
    assert second.began - first.began >= 2


def test_a_hub_that_hangs(hub: HubPeer, pushing: Client) -> None:
    fault = hub.fault("hang", path=COMMIT)
    process = pushing.start(PUSH)
    wait_for(lambda: fault.hits)
    time.sleep(1)
    assert process.poll() is None
    hub.stop()
    assert process.wait(PATIENCE) != 0
    assert titles(hub) == ["initial commit"]


def test_slow_answers(hub: HubPeer) -> None:
    hub.fault("delay", path="whoami", seconds=0.5)
    hub.fault("throttle", path="validate-yaml", rate=200_000)
    token = {"Authorization": f"Bearer {WRITE_TOKEN}"}
    url, body = f"{hub.url}/api", b'{"content": "' + b"x" * 100_000 + b'"}'
    for path, data in (("whoami-v2", None), ("validate-yaml", body)):
        asked = urllib.request.Request(f"{url}/{path}", data, token)
        began = time.monotonic()
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            assert answer.status == 200
        assert time.monotonic() - began > 0.4


def test_faults_count(hub: HubPeer) -> None:
    fault = hub.fault("status", path="whoami", skip=1, times=1, status=418)
    statuses = []
    for _ in range(3):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{hub.url}/api/whoami-v2", timeout=PATIENCE)
        statuses.append(caught.value.code)
    assert statuses == [401, 418, 401]
    assert fault.hits == 1
    with pytest.raises(ValueError, match="no such fault"):
        hub.fault("explode")  # type: ignore[arg-type]


def test_the_storage_wants_a_signature(hub: HubPeer, pushing: Client) -> None:
    pushing.run(PUSH)
    sha256 = hub.files(REPO)["model.safetensors"].sha256
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{hub.storage_url}/object/{sha256}", timeout=PATIENCE)
    asked = urllib.request.Request(hub.sign(f"/object/{sha256}"), headers={"Range": "bytes=10-19"})
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
        assert (answer.status, answer.read()) == (206, WEIGHTS[10:20])


def test_another_peer_goes_on_in_the_folder(hub: HubPeer, pushing: Client) -> None:
    pushing.run(PUSH)
    hub.stop()
    with HubPeer(hub.store.folder) as again:
        pushing.hub = again
        pushing.run(f'api.hf_hub_download("{REPO}", "model.safetensors", local_dir="copy")')
        assert (pushing.folder / "copy/model.safetensors").read_bytes() == WEIGHTS
        assert titles(again) == ["Step 10", "initial commit"]


def test_an_upload_in_parts(tmp_path: Path) -> None:
    with HubPeer(tmp_path / "hub", multipart_over=6_000_000) as hub:
        client = Client(hub, tmp_path / "client", "lfs")
        (client.folder / "model.safetensors").write_bytes(WEIGHTS)
        (client.folder / "config.json").write_text("{}")
        hub.create_repo(REPO)
        assert client.run(PUSH) == ["done"]
        assert len(hub.requests("PUT", "^/part/", "storage")) == 3
        assert hub.read(REPO, "model.safetensors") == WEIGHTS
