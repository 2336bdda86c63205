"""A Hugging Face Hub on the loopback: what pushing and pulling models needs, and faults.

It has two listeners, as the real one has two hosts: `url` for the API, `storage_url` for content.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import socket
import sys
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.hub import access, api, storage
from tests.hub.access import User
from tests.hub.buckets import Bucket, Buckets
from tests.hub.commits import Multipart
from tests.hub.exchange import Exchange, Refusal, Request, Route, reset
from tests.hub.faults import Fault, Faults, Kind, Role
from tests.hub.store import Commit, Entry, Repo, Store
from tests.hub.xet import XetStore

# Of the shape of real ones, so that whatever looks for tokens finds them.
WRITE_TOKEN = "hf_" + "WriteTokenOfTester".ljust(34, "x")
READ_TOKEN = "hf_" + "ReadTokenOfTester".ljust(34, "x")
OTHER_TOKEN = "hf_" + "WriteTokenOfOther".ljust(34, "x")
TOKENS = {
    WRITE_TOKEN: User("tester", "write", ("acme",)),
    READ_TOKEN: User("tester", "read", ("acme",)),
    OTHER_TOKEN: User("other", "write"),
}


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, peer: HubPeer, role: Role, routes: list[Route], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Exchange)
        self.peer, self.role, self.routes = peer, role, routes
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.connections: set[socket.socket] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what a route got wrong, not that a client or the peer itself has gone."""
        if not self.peer.stopping.is_set() and not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class HubPeer:
    """Serves from `start` to `stop`; another one can go on in the same folder."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        tokens: Mapping[str, User] = TOKENS,
        multipart_over: int | None = None,
        page: int = 1000,
    ) -> None:
        """
        Args:
            folder: for everything that is kept.
            port: of the API; any free one by default.
            tokens: who may come.
            multipart_over: LFS files above that many bytes are taken in parts of 5 MiB.
            page: files of a bucket that are told at once.
        """
        self.tokens = dict(tokens)
        self.multipart_over = multipart_over
        self.multiparts: dict[str, Multipart] = {}
        self.store, self.xet, self.buckets = Store(folder), XetStore(folder), Buckets(folder)
        self.page = page
        self.log: list[Request] = []
        self.faults = Faults()
        self.stopping = threading.Event()
        self._key = secrets.token_bytes(16)
        self._hub = Listener(self, "hub", api.ROUTES, port)
        self._storage = Listener(self, "storage", storage.ROUTES)
        self._listeners = (self._hub, self._storage)
        self.url, self.storage_url = self._hub.url, self._storage.url

    def start(self) -> HubPeer:
        for listener in self._listeners:
            serve = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
            serve.start()
        return self

    def stop(self) -> None:
        """Stop, and reset what is connected: nothing answers any more."""
        self.stopping.set()
        self.clear_faults()
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()
            for connection in list(listener.connections):
                reset(connection)

    def __enter__(self) -> HubPeer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def fault(self, do: Kind, **options: Any) -> Fault:
        """Do something wrong from now on; faults.Fault has the options. Its `hits` counts."""
        return self.faults.add(Fault(do, **options))

    def clear_faults(self) -> None:
        self.faults.clear()

    def requests(
        self, method: str | None = None, path: str = "", role: Role | None = None
    ) -> list[Request]:
        """What came in, oldest first; `path` is a regular expression, as in a fault."""
        return [
            request
            for request in list(self.log)
            if method in (None, request.method)
            and role in (None, request.role)
            and re.search(path, request.target)
        ]

    def mentions(self, needle: str, role: Role | None = None) -> list[Request]:
        """The requests that have `needle` in their address or a header."""
        return [
            request
            for request in self.requests(role=role)
            if any(needle in text for text in (request.target, *request.headers.values()))
        ]

    def create_repo(self, repo: str, private: bool = True) -> Repo:
        """Make a repository without a client."""
        return self.store.create(repo, private)

    def create_bucket(self, name: str, private: bool = True) -> Bucket:
        """Make a bucket without a client."""
        return self.buckets.create(name, private)

    def commit(
        self, repo: str, files: Mapping[str, bytes | None], title: str = "By hand"
    ) -> Commit:
        """Commit without a client: what somebody else does. None deletes a file."""
        with self.store.lock:
            found = self.store.repos[repo]
            tree = dict(found.commits[found.head].tree)
            for path, data in files.items():
                tree.pop(path, None)
                if data is not None:
                    tree[path] = self.store.add_file(data)
            return self.store.commit(found, tree, title, "", "somebody")

    def history(self, repo: str) -> list[Commit]:
        """The commits of `main`, newest first; the last is the one that made the repository."""
        found = self.store.repos[repo]
        return list(found.history(found.commits[found.head]))

    def files(self, repo: str, revision: str = "main") -> dict[str, Entry]:
        return dict(access.commit_at(self.store.repos[repo], revision).tree)

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        return self.store.object(self.files(repo, revision)[path].sha256).read_bytes()

    def find_bytes(self, needle: bytes) -> list[str]:
        """Where `needle` stands, in any commit of any repository or in what was only uploaded."""
        objects = (self.store.folder / "objects").iterdir()
        found = {file.name for file in objects if needle in file.read_bytes()}
        places, committed = [], set()
        for repo in self.store.repos.values():
            for oid, commit in repo.commits.items():
                for path, entry in commit.tree.items():
                    if entry.sha256 in found:
                        committed.add(entry.sha256)
                        places.append(f"{repo.name}@{oid[:8]}:{path}")
        return sorted(places) + [f"only uploaded: {name}" for name in sorted(found - committed)]

    def authenticate(self, header: str | None) -> User | None:
        """The user of an Authorization header. A token that nobody has is an error everywhere."""
        if header is None:
            return None
        user = self.tokens.get(header.removeprefix("Bearer ").strip())
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def sign(self, path: str) -> str:
        """An address in the storage that needs no token."""
        return f"{self._storage.url}{path}?signature={self._signature(path)}"

    def is_signed(self, target: str) -> bool:
        url = urlsplit(target)
        given = parse_qs(url.query).get("signature", [""])[0]
        return hmac.compare_digest(given, self._signature(url.path))

    def _signature(self, path: str) -> str:
        return hmac.new(self._key, path.encode(), "sha256").hexdigest()

    def obtain(self, sha256: str) -> bool:
        """Whether the content is here, decoded if it came as Xet."""
        if self.store.has(sha256):
            return True
        file_hash = self.xet.hash_of(sha256)
        file = self.xet.find(file_hash) if file_hash else None
        if file_hash is None or file is None:
            return False
        content = self.xet.content(file)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refusal(400, f"the Xet content of {sha256} has another sha256")
        self.store.add_file(content)
        return True
