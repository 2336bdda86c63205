"""A webhook on the loopback: what is posted to it, and answers of any kind."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.waiting import PATIENCE


class Webhook(ThreadingHTTPServer):
    """
    Attributes:
        got: the objects that were posted.
        users: beside each the header that names its sender; None: there was none.
        status: what is answered; 0: nothing is.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.got: list[dict[str, Any]] = []
        self.users: list[str | None] = []
        self.status = 204
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/s3cret-path"

    def wait_for(self, count: int, timeout: float = PATIENCE) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout
        while len(self.got) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.got


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.users.append(self.headers["Authorization"])
        self.server.got.append(json.loads(body))
        if not self.server.status:
            self.server.over.wait(PATIENCE)
            return
        self.send_response(self.server.status)
        if self.server.status in (301, 302, 307, 308):
            self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""


@contextmanager
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
