"""An S3 server on the loopback: moto's, which is kept in memory, with faults in front of it.

What it is good for: objects, listings, copies, `If-None-Match: *`, checksums that a client sends.
What it is not: nothing of it is on a disk, permissions are not looked at, and it is slow.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import boto3
import requests
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from tests.hub.faults import Fault, Faults

BUCKET = "bucket"
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Slow.</Message></Error>"


@dataclass(frozen=True)
class Request:
    """Something that was asked of the server."""

    method: str
    name: str  # of the object, or what is asked of the bucket


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
        self._stopping = threading.Event()
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
        self.log.append(Request(method, target))
        fault = self._faults.take(method, target, "storage")
        if fault is None:
            return self._app(environ, start)  # type: ignore[no-any-return]
        connection: socket.socket = environ["werkzeug.socket"]
        if fault.do == "delay":
            fault.ended.wait(fault.seconds)
            return self._app(environ, start)  # type: ignore[no-any-return]
        if fault.do == "hang":
            self._stopping.wait()
        if fault.do.startswith("apply_then"):
            list(self._app(environ, lambda *_, **__: lambda _: None))
        if fault.do in ("status", "apply_then_status"):
            start(f"{fault.status} Injected", [("Content-Length", str(len(SLOW_DOWN)))])
            return [SLOW_DOWN]
        with contextlib.suppress(OSError):  # reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError
