"""KEEPSTEP_NOTIFY_URL: what a webhook gets, that nobody waits long, and that it stays a secret."""

from __future__ import annotations

import base64
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.output.environment import hidden, without_secrets
from keepstep.policy.notices import Notice
from keepstep.policy.retention import Policy
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from keepstep.trainer.notify import VARIABLE, Notifier, body_for
from tests.helpers.waiting import PATIENCE
from tests.helpers.webhook import Webhook, webhook


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    with webhook() as server:
        monkeypatch.setenv(VARIABLE, server.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


def begin(run: Path, seconds: float = PATIENCE) -> tuple[Notifier, RunWriter]:
    notifier = Notifier(RunFolder(run), seconds)
    writer = RunWriter(RunFolder(run), Policy(), Storage())
    writer.heard = notifier.hear
    writer.start()
    return notifier, writer


def test_a_run_says_what_has_happened(tmp_path: Path, hook: Webhook) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    notifier, writer = begin(run)
    writer.record("save_failed", step=5, reason=f"No space left: {run}/checkpoint-5")
    assert hook.wait_for(1)[0]["event"] == "save_failed"
    assert hook.got[0]["message"].endswith("not saved: No space left: checkpoint-5")  # no path
    writer.record("training")
    status = {"outcome": "finished", "reason": None, "global_step": 9, "best_step": None}
    writer.end({**status, "exit": 0})
    notifier.close()
    assert [body["event"] for body in hook.got] == ["save_failed", "finished"]
    body = hook.got[1]
    assert (body["run"], body["run_id"], body["attempt"]) == ("mine", writer.run_id, 1)
    assert (body["step"], body["exit"]) == (9, 0)
    assert body["text"].startswith("mine (attempt 1, ")
    assert body["text"].endswith("): finished at step 9")


@pytest.mark.parametrize("status", [404, 500, 302, 308])
def test_that_it_did_not_arrive_is_told_once_and_ends_nothing(
    tmp_path: Path, hook: Webhook, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    hook.status = status
    notifier, _ = begin(tmp_path)
    for _ in range(2):
        notifier.send(Notice("failed", "failed"), 1)
        notifier.close()
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"a message to {VARIABLE} did not arrive: HTTP status {status}")
    assert ("set the address that it leads to" in told) == (status in (302, 308))
    assert len(hook.got) == 2


@pytest.mark.parametrize("how", ["silent", "nobody", "no name"])
def test_nobody_waits_for_long(
    tmp_path: Path,
    hook: Webhook,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    hook.status = 0
    if how != "silent":
        address = "http://127.0.0.1:9/s3cret" if how == "nobody" else "http://s3cret.invalid/"
        monkeypatch.setenv(VARIABLE, address)
    notifier, _ = begin(tmp_path, seconds=1.0)
    began = time.monotonic()
    notifier.send(Notice("failed", "failed"), 1)
    notifier.close()
    assert time.monotonic() - began < PATIENCE  # and it is a second by the clock
    (told,) = [record.getMessage() for record in caplog.records]
    assert "did not arrive" in told
    assert "s3cret" not in told


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://s3cret.invalid/", "its host's name is not known here (gaierror)"),
        ("http://127.0.0.1:9/s3cret", "its host refuses the connection (ConnectionRefusedError)"),
        ("https://127.0.0.1:{port}/s3cret", "no TLS with its host (SSLError)"),
    ],
)
def test_why_it_did_not_arrive_is_told_in_words(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    why: str,
) -> None:
    """Not by the error's own text, which may hold the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=answer_without_tls, args=(server,), daemon=True)
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv(VARIABLE, address.format(port=port))
        notifier, _ = begin(tmp_path)
        notifier.send(Notice("failed", "failed"), 1)
        notifier.close()
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == f"a message to {VARIABLE} did not arrive: {why}"


def answer_without_tls(server: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the test is over
        connection, _ = server.accept()
        with connection:
            connection.recv(1)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.recv(4096)


@pytest.mark.parametrize(
    "address",
    [
        *("s3cret", "ftp://s3cret/x", "http://", "http://[s3cret", "http://127.0.0.1:s3cret/"),
        *("http://127.0.0.1/s3 cret", "http://127.0.0.1/s3crät"),
    ],
)
def test_what_is_no_address_is_told_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv(VARIABLE, address)
    notifier, writer = begin(tmp_path)
    (problem,) = notifier.check()
    assert problem.severity == "warning"
    assert "s3cret" not in problem.told()
    writer.record("save_failed", step=5, reason="full")
    notifier.close()


def test_an_address_may_have_a_user_and_a_password(
    tmp_path: Path,
    hook: Webhook,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, hook.url.replace("//", "//me:s%40cret@"))
    notifier, _ = begin(tmp_path)
    notifier.send(Notice("failed", "failed"), 1)
    notifier.close()
    assert caplog.records == []
    assert hook.users == ["Basic " + base64.b64encode(b"me:s@cret").decode()]


def test_without_one_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process is started"))
    notifier, writer = begin(tmp_path)
    assert notifier.check() == []
    writer.record("save_failed", step=5, reason="full")
    notifier.send(Notice("failed", "failed"), 1)
    notifier.close()


def test_each_service_gets_its_own_form() -> None:
    facts = {"event": "failed"}
    slack = body_for("https://hooks.slack.com/services/a/b", "a <b> & c", facts)
    assert slack == {"text": "a &lt;b&gt; &amp; c"}
    discord = body_for("https://discord.com/api/webhooks/1/x", "@everyone", facts)
    assert discord == {"content": "@everyone", "allowed_mentions": {"parse": []}}
    assert body_for("https://example.org/x", "a", facts) == {"text": "a", "event": "failed"}


def test_a_message_tells_no_secret_and_is_short(
    tmp_path: Path, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    notifier, _ = begin(tmp_path)
    notifier.send(Notice("failed", f"very-secret-key {hook.url} {'x' * 9999}"), 1)
    notifier.close()
    assert "very-secret" not in hook.got[0]["text"]
    assert hook.url not in hook.got[0]["text"]
    assert len(hook.got[0]["text"]) < 2000


def test_the_address_is_a_secret_of_the_environment() -> None:
    environment = {VARIABLE: "https://hooks.slack.com/services/s3cret", "A": "b"}
    assert without_secrets(environment) == {"A": "b"}
    assert hidden(f"to {environment[VARIABLE]}", environment) == "to ***"
