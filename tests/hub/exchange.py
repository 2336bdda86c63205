"""One request and its answer: routing, the body, files with ranges, and faults."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.faults import Role
from tests.hub.store import BLOCK

if TYPE_CHECKING:
    from tests.hub.access import User
    from tests.hub.peer import HubPeer, Listener

TOKEN_SECONDS = 3600
PARTS = {
    "repo": "[^/]+/[^/]+",
    "name": "[^/]+",
    "revision": "[^/]+",
    "path": ".+",
    "hash": "[0-9a-f]{64}",
    "number": "[0-9]+",
}


class Refusal(Exception):
    """Becomes an answer with an error status. `code` goes into X-Error-Code."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        body: object = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message} if body is None else body
        # A header takes one line of ASCII.
        told = {"X-Error-Message": re.sub("[^ -~]", " ", message)[:400]}
        self.headers = (headers or {}) | told | ({"X-Error-Code": code} if code else {})


class Cut(Exception):
    """Reset the connection, with nothing more said."""


@dataclass
class Request:
    """An entry of the log. `status` stays None when no answer was given."""

    role: Role
    method: str
    target: str
    headers: dict[str, str]
    began: float = field(default_factory=time.time)
    status: int | None = None
    fault: str | None = None
    received: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    answer: Callable[..., None]


def route(method: str, path: str, answer: Callable[..., None]) -> Route:
    """`{repo}` in the path, and so on, become keyword arguments of `answer`."""
    pattern = re.sub(r"\{(\w+)\}", lambda found: f"(?P<{found[1]}>{PARTS[found[1]]})", path)
    return Route(method, re.compile(pattern), answer)


def reset(connection: socket.socket) -> None:
    """Close so that the other side sees a reset, whoever reads from it here."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        connection.close()


class Exchange(BaseHTTPRequestHandler):
    """Handles the requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # every answer would wait 40 ms for a delayed ACK
    server: Listener

    @property
    def peer(self) -> HubPeer:
        return self.server.peer

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the peer has its own log."""

    def _handle(self) -> None:
        role = self.server.role
        self.entry = Request(role, self.command, self.path, dict(self.headers.items()))
        self.user: User | None = None
        self._read = False
        self.fault = self.peer.faults.take(self.command, self.path, role)
        self.entry.fault = self.fault.do if self.fault else None
        self.peer.log.append(self.entry)
        try:
            self._answer()
        except (Cut, ConnectionError, TimeoutError):
            self.close_connection = True
            reset(self.connection)
        finally:
            self.entry.seconds = time.time() - self.entry.began

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _answer(self) -> None:
        try:
            if "Transfer-Encoding" in self.headers:
                self.close_connection = True
                raise Refusal(411, "this peer reads bodies of a known length only")
            self._go_wrong()
            if self.server.role == "hub":
                self.user = self.peer.authenticate(self.headers.get("Authorization"))
            self._route()
        except Refusal as refusal:
            self.reply(refusal.body, refusal.status, refusal.headers)

    def _go_wrong(self) -> None:
        """What a fault asks for before the request is looked at."""
        fault = self.fault
        if fault is None:
            return
        if fault.do == "delay":
            fault.ended.wait(fault.seconds)
        elif fault.do == "hang":
            self.body()
            self.peer.stopping.wait()
            raise Cut
        elif fault.do == "reset":
            for _ in self.blocks():
                if self.entry.received >= fault.after_bytes:
                    break
            raise Cut
        elif fault.do == "status":
            raise Refusal(fault.status, fault.message, headers=fault.headers)

    def _route(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        method = "GET" if self.command == "HEAD" else self.command
        for known in self.server.routes:
            found = known.pattern.fullmatch(url.path) if known.method == method else None
            if found:
                parts = {key: unquote(value) for key, value in found.groupdict().items()}
                known.answer(self, **parts)
                return
        raise Refusal(404, f"nothing here: {self.command} {self.path}")

    def blocks(self) -> Iterator[bytes]:
        """The body, once, at the pace that a throttle allows."""
        left = 0 if self._read else int(self.headers.get("Content-Length") or 0)
        self._read = True
        throttle = self.fault if self.fault and self.fault.do == "throttle" else None
        while left:
            block = self.rfile.read1(min(left, BLOCK))
            if not block:
                raise ConnectionError("the client has gone")
            left -= len(block)
            self.entry.received += len(block)
            if throttle:
                time.sleep(len(block) / throttle.rate)
            yield block

    def body(self) -> bytes:
        return b"".join(self.blocks())

    def json(self) -> Any:
        try:
            return json.loads(self.body() or b"{}")
        except ValueError as error:
            raise Refusal(400, "the body is no JSON") from error

    def reply(
        self, body: object = b"", status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.body()
        if self.fault and self.fault.do == "apply_then_reset":
            raise Cut
        if self.fault and self.fault.do == "apply_then_status" and status < 400:
            status, headers = self.fault.status, self.fault.headers
            body = {"error": self.fault.message}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self._head(status, len(data), kind | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.entry.status = status  # before the client can know
        self.send_response(status)
        everything = {"Content-Length": str(length), "X-Request-Id": secrets.token_hex(4)}
        for key, value in (everything | headers).items():
            self.send_header(key, value)
        self.end_headers()

    def wanted_range(self, size: int) -> tuple[int, int] | None:
        """First and last byte that the client asks for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if found is None or size == 0:
            return None
        first, last = int(found[1]), int(found[2] or size - 1)
        if first >= size:
            raise Refusal(416, "no such range", headers={"Content-Range": f"bytes */{size}"})
        return first, min(last, size - 1)

    def reply_file(self, path: Path, headers: dict[str, str] | None = None) -> None:
        size = path.stat().st_size
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        wanted = self.wanted_range(size)
        first, last = wanted or (0, size - 1)
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._head(206 if wanted else 200, last - first + 1, headers)
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(first)
            left = last - first + 1
            while left:
                block = file.read(min(left, BLOCK))
                if self.fault and self.fault.do == "apply_then_reset":
                    self.wfile.write(block[: len(block) // 2])
                    raise Cut
                self.wfile.write(block)
                left -= len(block)


def reply_xet_token(exchange: Exchange) -> None:
    url, token = exchange.peer.storage_url, f"xet-{secrets.token_hex(8)}"
    expires = int(time.time()) + TOKEN_SECONDS
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    exchange.reply({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)
