"""An S3 server on the loopback: moto's, which is kept in memory, with faults in front of it.

What it is good for: objects, listings, copies, `If-None-Match: *`, checksums that a client sends.
What it is not: nothing of it is on a disk, permissions are not looked at, and it is slow.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import boto3
import requests
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from tests.hub.faults import Fault, Faults

BUCKET = "bucket"


@dataclass(frozen=True)
class Request:
    """Something that was asked of the server."""

    method: str
    name: str  # of the object, or what is asked of the bucket
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # as WSGI names them

    @property
    def authorization(self) -> str:
        return self.headers.get("HTTP_AUTHORIZATION", "")


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *arguments: Any) -> None:
        pass

    def log(self, *arguments: Any) -> None:
        pass


class S3Server:
    """
    Attributes:
        url: its address.
        log: what was asked of it.
    """

    def __init__(self) -> None:
        logging.getLogger("moto").setLevel(logging.ERROR)
        self.log: list[Request] = []
        self._faults = Faults()
        self._listings: dict[str, tuple[str, list[tuple[str, str]], bytes]] = {}
        self._stopping = threading.Event()
        self._creating = threading.Lock()
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._server = ThreadedWSGIServer("127.0.0.1", 0, self._answer, handler=Quiet)
        self._server.daemon_threads = True
        self._serving = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._serving.start()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id="tester",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        requests.post(f"{self.url}/moto-api/reset").raise_for_status()  # all servers are one
        self.client.create_bucket(Bucket=BUCKET)

    def environment(self) -> dict[str, str]:
        """What a user of it has set."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def stop(self) -> None:
        self._stopping.set()
        self._faults.clear()
        self._server.shutdown()
        self._server.server_close()
        self._serving.join(10)

    def fault(self, do: Any, **how: Any) -> Fault:
        """Something that goes wrong from now on (see `Fault`), by method and object."""
        return self._faults.add(Fault(do, **how))

    def clear_faults(self) -> None:
        self._faults.clear()

    def names(self, prefix: str = "") -> dict[str, int]:
        """All objects below it, with their sizes."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {o["Key"]: o["Size"] for page in pages for o in page.get("Contents", ())}

    def read(self, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read())

    def write(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        name = unquote(environ["PATH_INFO"]).removeprefix(f"/{BUCKET}").lstrip("/")
        target = f"{name}?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else name
        asked = {name: text for name, text in environ.items() if name.startswith("HTTP_")}
        self.log.append(Request(method, target, asked))
        if length := int(environ.get("CONTENT_LENGTH") or 0):
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        fault = self._faults.take(method, target, "storage")
        do = None if fault is None else fault.do
        if fault is not None and do in ("status", "apply_then_status"):
            if do == "apply_then_status":
                self._apply(environ)
            return refuse(start, fault)
        if do in ("reset", "apply_then_reset"):
            if do == "apply_then_reset":
                self._apply(environ)
            leave(environ["werkzeug.socket"], reset=True)
        if do == "hang":
            self._stopping.wait()
        if fault is not None and do == "delay":
            fault.ended.wait(fault.seconds)
        if do == "damage" and method == "PUT":
            damage_body(environ)
        status, headers, body = self._apply(environ)
        if do == "damage" and method == "GET":
            body = flip(body)
        if do is not None and do in ("stall", "cut"):
            self._half(environ["werkzeug.socket"], status, headers, body, do)
        if do == "no digest":
            headers = [(n, '"encrypted"' if n.lower() == "etag" else v) for n, v in headers]
        if method == "GET" and "list-type" in target:
            before = self._listings.get(target, (status, headers, body))
            if do == "stale":
                status, headers, body = before
            else:
                self._listings[target] = (status, headers, body)
            if do == "no digest":
                body = re.sub(rb"(<ETag>)[^<]*", rb"\1&quot;encrypted&quot;", body)
                headers = [(n, v) for n, v in headers if n.lower() != "content-length"]
                headers.append(("Content-Length", str(len(body))))
        start(status, headers)
        return [body]

    def _apply(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        """Do what is asked; what is asked on condition one after the other, since moto looks first
        and writes later."""
        told: list[Any] = []
        with self._creating if "HTTP_IF_NONE_MATCH" in environ else contextlib.nullcontext():
            body = b"".join(
                self._app(environ, lambda status, headers, _=None: told.extend((status, headers)))
            )
        return told[0], told[1], body

    def _half(
        self,
        connection: socket.socket,
        status: str,
        headers: list[tuple[str, str]],
        body: bytes,
        do: str,
    ) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        head = f"HTTP/1.1 {status}\r\n{lines}\r\n".encode()
        with contextlib.suppress(OSError):
            connection.sendall(head + body[: len(body) // 2])
        if do == "stall":
            self._stopping.wait()
        leave(connection, reset=False)


def refuse(start: Any, fault: Fault) -> Iterable[bytes]:
    """The answer of a fault: its `message` is S3's code."""
    code = "SlowDown" if fault.message == "injected" else fault.message
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
    start(f"{fault.status} Injected", [("Content-Length", str(len(body)))])
    return [body]


def leave(connection: socket.socket, reset: bool) -> None:
    """End a connection without another word."""
    with contextlib.suppress(OSError):
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


def flip(content: bytes) -> bytes:
    """One bit is another."""
    return content[:-1] + bytes([content[-1] ^ 1]) if content else content


def damage_body(environ: dict[str, Any]) -> None:
    """What is stored is not what was sent, and the server does not notice."""
    environ["wsgi.input"] = io.BytesIO(flip(environ["wsgi.input"].read()))
    for name in [name for name in environ if "CHECKSUM" in name or name == "HTTP_CONTENT_MD5"]:
        del environ[name]
