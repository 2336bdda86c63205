"""`KEEPSTEP_NOTIFY_URL`: one message to a webhook for each thing that a person should hear of.

Nobody waits for it but the end, for five seconds at most; that it does not arrive is told, and ends
nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from keepstep.errors import KeepstepError
from keepstep.output import post
from keepstep.output.environment import hidden, without_secrets
from keepstep.policy.notices import Notice, Notices
from keepstep.recipe.problems import Problem
from keepstep.run_folder.reader import RunFolder
from keepstep.save.manager import CheckpointManager

logger = logging.getLogger(__name__)

VARIABLE = "KEEPSTEP_NOTIFY_URL"
SECONDS = 5.0
LONGEST = 1500  # characters: Discord takes 2,000


class Notifier:
    """Ranks: any; the main process hears of events, another one speaks only when that is dead."""

    def __init__(self, run: RunFolder, seconds: float = SECONDS) -> None:
        self._run, self._seconds = run, seconds
        self._url = os.environ.get(VARIABLE, "")
        self.notices = Notices()
        self._lock = threading.Lock()
        self._posts: list[subprocess.Popen[bytes]] = []
        self._told: set[str] = set()

    def check(self) -> list[Problem]:
        """What is wrong with the address, which is not told: it is a secret. Ranks: any."""
        if not self._url or _host_of(self._url) is not None:
            return []
        told = f"{VARIABLE} is no address of http:// or https://: nobody is notified"
        hint = "the address of a webhook; what is no ASCII in it, and spaces, as %XX"
        return [Problem(told, hint, "notify", "warning")]

    def hear(self, event: Mapping[str, Any]) -> None:
        """An event has been written down. Ranks: the main process, any thread; never raises."""
        if not self._url:
            return
        try:
            notice = self.notices.hear(event, lambda: self._run.events_read()[0])
        except Exception as error:
            logger.warning("a message could not be made: %s: %s", type(error).__name__, error)
            return
        if notice is not None:
            self.send(notice, event["attempt"])

    def tell_of_main(self, reason: str, manager: CheckpointManager, step: int | None) -> None:
        """The main process is gone, which else speaks: one of those that are left does. Ranks: any
        but the main one; never raises."""
        try:
            manager.storage.make_folder(manager.run.launched)
            first = manager.storage.claim(manager.run.launched / f"{manager.attempt}.told")
        except OSError:  # two messages are better than none
            first = True
        if first:
            self.send(Notice("rank_died", f"failed: {reason}", step), manager.attempt)

    def send(self, notice: Notice, attempt: int) -> None:
        """Begin to send it. Ranks: any, any thread; never raises."""
        if _host_of(self._url) is None:
            return
        job = {"url": self._url, "seconds": self._seconds}
        job |= {"body": self._body(notice, attempt)}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", post.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=without_secrets(os.environ),
                start_new_session=True,  # a signal to the training's group is not for it
            )
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(job).encode())
            process.stdin = None  # it is closed: `communicate` would close it again
        except OSError as error:
            self._warn(f"{type(error).__name__}: {os.strerror(error.errno or 0)}")
            return
        with self._lock:
            self._posts.append(process)

    def close(self) -> None:
        """Wait for what is on its way. Ranks: any, any thread; never raises."""
        with self._lock:
            posts, self._posts = self._posts, []
        for process in posts:
            try:
                told, _ = process.communicate(timeout=self._seconds + 1)
            except subprocess.TimeoutExpired:
                process.kill()
                told, _ = process.communicate()
            if process.returncode:
                said = json.loads(told) if told else f"no answer within {self._seconds:g} s"
                self._warn(str(said))

    def _warn(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            logger.warning("a message to %s did not arrive: %s", VARIABLE, why)

    def _body(self, notice: Notice, attempt: int) -> dict[str, Any]:
        name, host, run_id = self._run.path.resolve().name, socket.gethostname(), None
        with contextlib.suppress(KeepstepError, OSError):
            run_id = self._run.run_id()
        told = hidden(notice.told, os.environ)[:LONGEST]
        facts = {
            "run": name,
            "run_id": run_id,
            "attempt": attempt,
            "host": host,
            "event": notice.kind,
            "step": notice.step,
            "exit": notice.exit,
            "message": told,
        }
        return body_for(self._url, f"{name} (attempt {attempt}, {host}): {told}", facts)


def body_for(url: str, text: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the service at this address takes: Slack `text`, Discord `content`; any other all that
    is known, with the `text` beside."""
    parts = urlsplit(url)
    host = (parts.hostname or "").removeprefix("www.")
    if host == "hooks.slack.com":
        plain = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return {"text": plain}
    if host in ("discord.com", "discordapp.com") and "/webhooks/" in parts.path:
        return {"content": text, "allowed_mentions": {"parse": []}}
    return {"text": text, **facts}


def _host_of(url: str) -> str | None:
    """None: it is no address that could be posted to."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # which is read here, and may be no number
    except ValueError:
        return None
    path = f"{parts.path}?{parts.query}"
    can_be_sent = path.isascii() and path.isprintable() and " " not in path
    return parts.hostname if parts.scheme in ("http", "https") and can_be_sent else None
