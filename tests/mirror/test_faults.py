"""What a store does wrong, and what follows: each line of the table in docs/mirror.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from keepstep.mirror import object_store, upload
from keepstep.mirror.download import bring
from keepstep.mirror.owners import Owner, claim, there
from keepstep.mirror.pruning import prune
from keepstep.mirror.store import Store, StoreError
from keepstep.mirror.stores import open_store
from keepstep.mirror.upload import Upload
from keepstep.policy.retention import Policy
from keepstep.run_folder.checkpoint import read_checkpoint
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.folders import STATE, commit, final_digests
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv
from tests.mirror.server import BUCKET, S3Server

URL = f"s3://{BUCKET}/run"
PUT, GET, LIST = "PUT", "GET", r"list-type=2"
ONE_FILE = r"checkpoint-8/.*/model"
TOKEN = "0123456789ab"


@pytest.fixture(autouse=True)
def quick(here: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Three tries, soon; and where a store says nothing, it is given up after three seconds. (No
    machine is so slow; but where nothing stalls, nothing is to hang on that.)"""
    stalls = re.search("stall|silence", request.node.name) is not None
    silent = "3s" if stalls else "60s"
    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20)}
    patience = {"max_retries": 3, "retry_timeout": timedelta(seconds=30), "backoff": backoff}
    monkeypatch.setattr(object_store, "RETRIES", patience)
    monkeypatch.setattr(object_store, "READS", {"read_timeout": silent, "timeout": "60s"})
    monkeypatch.setattr(object_store, "WRITES", {"timeout": silent})
    monkeypatch.setattr(upload, "AT_ONCE", 1)


def send(run: RunFolder, store: Store, step: int, owner: Owner) -> None:
    checkpoint = read_checkpoint(run.path / f"checkpoint-{step}")
    Upload(store, owner, checkpoint).run({"run.json": run.identity.read_bytes()})
    prune(store, owner, run, Policy(limit=1), ())


def brought(folder: Path) -> tuple[int, dict[str, str]]:
    """What an empty disk gets, and what is passed by."""
    run, storage = RunFolder(folder), Storage()
    storage.make_folder(run.private)
    found = bring(run, storage, open_store(URL), run.staging / TOKEN)
    assert found is not None
    assert found.checkpoint.faults(deep=True) == []
    return found.checkpoint.step, found.passed_by


@dataclass(frozen=True)
class Case:
    """A fault while checkpoint-8 is copied behind checkpoint-4.

    Attributes:
        do: what the store does (tests/hub/faults.py).
        times: how often; -1: for ever.
        told: what is said of it, a regular expression; None: nothing, it has passed.
        hits: how many requests met it.
        fatal: it would be so again until somebody has changed something.
    """

    do: str
    method: str = PUT
    path: str = ONE_FILE
    times: int = 2
    told: str | None = None
    hits: int = 2
    fatal: bool = False
    how: dict[str, Any] = field(default_factory=dict)


def refused(code: str, status: int, told: str, hits: int = 1, fatal: bool = True) -> Case:
    how = {"status": status, "message": code}
    return Case("status", PUT, ONE_FILE, -1, told, hits, fatal, how)


CASES = {
    "500": Case("status", how={"status": 500}),
    "503 SlowDown": Case("status", how={"status": 503}),
    "429": Case("status", how={"status": 429}),
    "reset": Case("reset"),
    "lost answer": Case("apply_then_reset"),
    "answer that is an error": Case("apply_then_status", how={"status": 500}),
    "lost answer of the manifest": Case("apply_then_reset", path=r"checkpoint-8/.*manifest"),
    "lost answer of a listing": Case("reset", GET, LIST),
    "stall in a put": Case("hang", times=1, hits=1),
    "stall in a listing": Case("hang", GET, LIST, 1, hits=1),
    "stall in a manifest that is read": Case("stall", GET, r"manifest\.json", 1, hits=1),
    "503 for hours": Case("status", times=-1, told=r"writing .*model.*: 503 .*SlowDown$", hits=4),
    "stall for ever": Case("hang", times=-1, told=r"it did not answer, 4 times", hits=4),
    "reset for ever": Case("reset", times=-1, told=r"writing .*model", hits=4),
    "other bytes stored": Case("damage", times=-1, told=r"is not what was written there", hits=1),
    "other bytes stored once": Case(
        "damage", times=1, told=r"is not what was written there", hits=1
    ),
    "no digest": Case("no digest", times=-1, hits=1),
    "expired": refused("ExpiredToken", 400, r"400 .*ExpiredToken\n    Hint: the credentials have"),
    "expired, as a 403": refused("ExpiredToken", 403, r"403 .*\n    Hint: the credentials have"),
    "clock": refused("RequestTimeTooSkewed", 403, r"this machine's clock says \d{4}-\d\d-\d\d "),
    "keys": refused("InvalidAccessKeyId", 403, r"Hint: the keys are not this store's"),
    "permission": refused(
        "AccessDenied", 403, r"403 .*AccessDenied\n    Hint: .* list, read, write"
    ),
    "quota": refused("QuotaExceeded", 403, r"Hint: the store is full"),
    "507": refused("InsufficientStorage", 507, r"507 .*\n    Hint: the store is full", 4, False),
    "region": refused("AuthorizationHeaderMalformed", 400, r"Hint: .* AWS_REGION", 1, False),
}


@pytest.mark.parametrize("name", CASES)
def test_while_it_is_copied(s3: S3Server, run: RunFolder, tmp_path: Path, name: str) -> None:
    """It passes unseen, or is told; in between the one before is there, whole; and later, when it
    has passed, everything is."""
    case, store = CASES[name], open_store(URL)
    owner = claim(store, TOKEN)
    send(run, store, 4, owner)
    fault = s3.fault(case.do, method=case.method, path=case.path, times=case.times, **case.how)
    if case.told is None:
        send(run, store, 8, owner)
    else:
        with pytest.raises(StoreError) as error:
            send(run, store, 8, owner)
        assert re.search(case.told, str(error.value)), str(error.value)
        assert str(error.value).startswith(URL)
        assert error.value.fatal == case.fatal
        assert [one.step for one in there(store, store.names())] == [4]
        assert brought(tmp_path / "in between")[0] == 4
    assert fault.hits == case.hits, "requests that met it"
    s3.clear_faults()
    if case.told is not None:
        send(run, open_store(URL), 8, owner)
    assert brought(tmp_path / "in the end") == (8, {})
    assert [one.step for one in there(store, store.names())] == [8]


READING = {
    "stall": (Case("stall", GET, times=1, hits=1), 8),
    "stall for ever": (Case("stall", GET, times=-1), 4),
    "cut": (Case("cut", GET, times=1, hits=1), 8),
    "cut for ever": (Case("cut", GET, times=-1), 4),
    "503": (Case("status", GET), 8),
    "other bytes": (Case("damage", GET, times=-1), 4),
    "silence": (Case("hang", GET, times=1, hits=1), 8),
}


@pytest.mark.parametrize("name", READING)
def test_while_it_is_brought(s3: S3Server, run: RunFolder, tmp_path: Path, name: str) -> None:
    """The newest, or the one before it and why; never other bytes."""
    case, step = READING[name]
    store = open_store(URL)
    owner = claim(store, TOKEN)
    for number in (4, 8):
        Upload(store, owner, read_checkpoint(run.path / f"checkpoint-{number}")).run({})
    fault = s3.fault(case.do, method=case.method, path=case.path, times=case.times, **case.how)
    got, passed_by = brought(tmp_path / "new")
    assert got == step
    assert bool(passed_by) == (step == 4)
    assert fault.hits >= 1
    if step == 8:
        assert fault.hits == case.hits


def damaged(s3: S3Server, ending: str, change: Callable[[bytes], bytes] | None) -> None:
    (name,) = (n for n in s3.names("run/checkpoint-8") if n.endswith(ending))
    if change is None:
        s3.client.delete_object(Bucket=BUCKET, Key=name)
    else:
        s3.write(name, change(s3.read(name)))


@pytest.mark.parametrize("ending", ["/model.safetensors", "/receipt-0.json", "/manifest.json"])
@pytest.mark.parametrize(
    "change",
    [lambda b: b[:-1], lambda b: b"", lambda b: bytes([b[0] ^ 1]) + b[1:], None],
    ids=["cut", "empty", "a bit", "gone"],
)
def test_damaged_at_rest(
    s3: S3Server, run: RunFolder, tmp_path: Path, ending: str, change: Any
) -> None:
    """It is passed by; the next copies go on as if it were not there, and are whole."""
    store = open_store(URL)
    owner = claim(store, TOKEN)
    for number in (4, 8):
        Upload(store, owner, read_checkpoint(run.path / f"checkpoint-{number}")).run({})
    damaged(s3, ending, change)
    assert brought(tmp_path / "new")[0] == 4
    commit(run.path, 12, STATE)
    Upload(store, owner, read_checkpoint(run.path / "checkpoint-12")).run({})
    assert brought(tmp_path / "later")[0] == 12


def test_a_listing_that_lags(s3: S3Server, run: RunFolder, tmp_path: Path) -> None:
    """What is not shown yet is not taken, nor taken for gone; what is shown and is gone is passed
    by; a number that somebody has is not given twice."""
    store = open_store(URL)
    owner = claim(store, TOKEN)
    Upload(store, owner, read_checkpoint(run.path / "checkpoint-4")).run({})
    store.names()  # what a late listing shows from now on
    fault = s3.fault("stale", method=GET, path=LIST, times=-1)
    Upload(store, owner, read_checkpoint(run.path / "checkpoint-8")).run({})
    assert prune(store, owner, run, Policy(limit=1), ()) == []
    assert brought(tmp_path / "late") == (4, {})
    assert claim(store, "ba9876543210").number == 2
    s3.clear_faults()
    store.names()
    s3.fault("stale", method=GET, path=LIST, times=-1)
    for name in s3.names("run/checkpoint-4"):
        if name.endswith("/manifest.json"):
            s3.client.delete_object(Bucket=BUCKET, Key=name)
    with pytest.raises(StoreError, match="none of its checkpoints can be had"):
        brought(tmp_path / "gone")
    assert fault.hits


TRAINED: dict[str, tuple[dict[str, Any], int, str]] = {
    "expired in mid-run": (
        {"do": "status", "method": PUT, "path": "checkpoint-", "skip": 8, "times": -1}
        | {"status": 403, "message": "ExpiredToken"},
        70,
        r"Not mirrored: checkpoint-\d+.*: .*403 .*ExpiredToken\n    Hint: the credentials have",
    ),
    "a burst of 503": (
        {"do": "status", "method": PUT, "path": "checkpoint-", "skip": 8, "times": 5},
        0,
        r"mirrored checkpoint-12: ",
    ),
}


def test_training_is_unharmed(s3: S3Server, ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Real runs: the same weights as without a mirror, bit for bit; a mirror that lacks the last
    checkpoint is no success, and says so; the same command mends it when the store is well."""
    how: dict[str, Any] = {"strategy": "ddp", "processes": 1, "env": s3.environment()}
    ranks.run(argv(demo, tmp_path / "straight"), **how)
    wanted = final_digests(tmp_path / "straight", 12)
    for number, (fault, status, told) in enumerate(TRAINED.values()):
        folder = tmp_path / f"run-{number}"
        command = argv(demo, folder, mirror=f"s3://{BUCKET}/runs")
        s3.fault(**fault)
        run = ranks.start(command, **how)
        assert run.wait() == [status]
        assert re.search(told, run.output), run.output
        assert run.output.count("Not mirrored") <= 4
        s3.clear_faults()
        assert final_digests(folder, 12) == wanted
        if status:
            assert re.search(r"lacks \d of the checkpoints here \(.*checkpoint-12\)", run.output)
            assert "Hint: `keepstep sync" in run.output
            assert ranks.start(command, **how).wait() == [0]
        assert "checkpoint-12" in {n.split("/")[2] for n in s3.names(f"runs/run-{number}/checkp")}


def test_what_is_new_in_the_environment_of_the_next_copy(
    s3: S3Server, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Credentials of a profile are read by each copy anew, if boto3 is installed; obstore's own
    way is the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match=r"\(mine\) could not be found"):
        open_store(URL)
    for key in ("first", "second"):
        file.write_text(f"[mine]\naws_access_key_id = {key}\naws_secret_access_key = x\n")
        open_store(URL).put("name", key.encode())
        assert f"Credential={key}/" in s3.log[-1].authorization


@pytest.mark.parametrize("has_boto3", [True, False])
def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_boto3: bool) -> None:
    """It is said where they are looked for, not that a machine's metadata did not answer."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("keepstep.mirror.credentials._has_boto3", lambda: has_boto3)
    with pytest.raises(
        StoreError, match="no credentials\n    Hint: AWS_ACCESS_KEY_ID and"
    ) as error:
        open_store(URL).names()
    assert error.value.fatal
    assert ("pip install boto3" in str(error.value)) == (not has_boto3)


@pytest.mark.parametrize(
    ("variables", "header", "value"),
    [
        ({"AWS_SERVER_SIDE_ENCRYPTION": "AES256"}, "server-side-encryption", "AES256"),
        (
            {"AWS_SERVER_SIDE_ENCRYPTION": "aws:kms", "AWS_SSE_KMS_KEY_ID": "key"},
            "server-side-encryption-aws-kms-key-id",
            "key",
        ),
        (
            {"AWS_SERVER_SIDE_ENCRYPTION": "aws:kms", "AWS_SSE_BUCKET_KEY_ENABLED": "true"},
            "server-side-encryption-bucket-key-enabled",
            "true",
        ),
        ({"AWS_REQUEST_PAYER": "requester"}, "request-payer", "requester"),
        ({"AWS_SESSION_TOKEN": "token"}, "security-token", "token"),
    ],
)
def test_settings_that_pass_through(
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    header: str,
    value: str,
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    open_store(URL).put("name", b"x")
    put = next(request for request in reversed(s3.log) if request.method == PUT)
    assert put.headers[f"HTTP_X_AMZ_{header.upper().replace('-', '_')}"] == value
    assert put.headers["HTTP_X_AMZ_CHECKSUM_SHA256"]


def test_a_setting_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "nonsense")
    with pytest.raises(StoreError, match="Invalid encryption type: nonsense") as error:
        open_store(URL)
    assert error.value.fatal


def test_what_a_save_costs(s3: S3Server, run: RunFolder) -> None:
    """Requests of a copy, the third of an attempt, of which one checkpoint is kept there."""
    store = open_store(URL)
    owner = claim(store, TOKEN)
    for step in (4, 8):
        send(run, store, step, owner)
    commit(run.path, 12, STATE)
    s3.log.clear()
    send(run, store, 12, owner)
    files = len(read_checkpoint(run.path / "checkpoint-12").manifest.files)
    asked = Counter("LIST" if "list-type" in r.name else r.method for r in s3.log)
    # Receipt, manifest, history; what an owner found (twice), a receipt, the manifests there;
    # of what goes the manifest first.
    assert asked == {"PUT": files + 3, "LIST": 4, "GET": 5, "POST": 2}
