"""Buckets: files that are replaced in place, with no history, whose content came as Xet.

As huggingface_hub 2.4 asks for them. Nothing in its requests is conditional: the last one to write
a path has it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import hf_xet

from tests.hub.access import known_user
from tests.hub.exchange import Exchange, Refusal, reply_xet_token, route
from tests.hub.store import now

OPERATIONS = ("addFile", "copyFile", "deleteFile")
ODD_PATH = re.compile(r"^/|/$|//|\\|\0|(^|/)\.\.(/|$)|^\./")


@dataclass(frozen=True)
class Held:
    """A file: what it holds, by the names that Xet and the peer's own storage have for that."""

    xet_hash: str
    sha256: str
    size: int
    mtime: int
    uploaded: str = field(default_factory=now)


@dataclass
class Bucket:
    name: str
    private: bool
    created: str = field(default_factory=now)
    files: dict[str, Held] = field(default_factory=dict)

    @property
    def as_json(self) -> dict[str, Any]:
        size = sum(held.size for held in self.files.values())
        facts = {"id": self.name, "private": self.private, "createdAt": self.created}
        return facts | {"size": size, "totalFiles": len(self.files)}


class Buckets:
    """A folder with them, so that another peer can go on with it."""

    def __init__(self, folder: Path) -> None:
        self.refuse = 0  # so many operations, from now on
        self.lock = threading.RLock()
        self._folder = folder / "buckets"
        self._folder.mkdir(parents=True, exist_ok=True)
        loaded = [_load(file) for file in self._folder.glob("*.json")]
        self.known = {bucket.name: bucket for bucket in loaded}

    def create(self, name: str, private: bool) -> Bucket:
        self.known[name] = Bucket(name, private)
        self.keep(self.known[name])
        return self.known[name]

    def remove(self, bucket: Bucket) -> None:
        del self.known[bucket.name]
        self._file(bucket).unlink()

    def keep(self, bucket: Bucket) -> None:
        new = self._file(bucket).with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(bucket)))
        os.replace(new, self._file(bucket))

    def _file(self, bucket: Bucket) -> Path:
        return self._folder / (bucket.name.replace("/", "--") + ".json")


def _load(file: Path) -> Bucket:
    stored = json.loads(file.read_text())
    stored["files"] = {path: Held(**held) for path, held in stored["files"].items()}
    return Bucket(**stored)


def readable(exchange: Exchange, name: str) -> Bucket:
    """The bucket; one that is private does not exist for others."""
    user, found = exchange.user, exchange.peer.buckets.known.get(name)
    if found is None or (found.private and not (user and user.owns(name))):
        raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
    return found


def writable(exchange: Exchange, name: str) -> Bucket:
    found = readable(exchange, name)
    if not known_user(exchange).may_write(name):
        raise Refusal(403, "Forbidden: you must use a write token to write to a bucket.")
    return found


def create(exchange: Exchange, repo: str) -> None:
    peer, user, asked = exchange.peer, known_user(exchange), exchange.json()
    namespace, name = repo.split("/")
    name = f"{user.name if namespace == 'me' else namespace}/{name}"
    url = f"{peer.url}/buckets/{name}"
    if not user.may_write(name):
        raise Refusal(403, f"You don't have the rights to create a bucket under {namespace}")
    with peer.buckets.lock:
        if name in peer.buckets.known:
            message = "You already created this bucket"
            raise Refusal(409, message, body={"error": message, "url": url})
        peer.buckets.create(name, asked.get("visibility") == "private")
    exchange.reply({"url": url, "name": name})


def remove(exchange: Exchange, repo: str) -> None:
    with exchange.peer.buckets.lock:
        exchange.peer.buckets.remove(writable(exchange, repo))
    exchange.reply({})


def info(exchange: Exchange, repo: str) -> None:
    exchange.reply(readable(exchange, repo).as_json)


def all_of(exchange: Exchange, name: str) -> None:
    """The buckets of a namespace, as far as the caller may see them."""
    user, known = exchange.user, exchange.peer.buckets.known.values()
    namespace = known_user(exchange).name if name == "me" else name
    seen = [b for b in known if b.name.split("/")[0] == namespace]
    told = [b.as_json for b in seen if not b.private or (user and user.owns(b.name))]
    exchange.reply(told)


def told(path: str, held: Held) -> dict[str, Any]:
    facts = {"type": "file", "path": path, "size": held.size, "xetHash": held.xet_hash}
    return facts | {"mtime": held.uploaded, "uploadedAt": held.uploaded}


def tree(exchange: Exchange, repo: str, path: str = "") -> None:
    """A page of what begins with `path`, be it a folder or not, and where the next page is."""
    bucket, query = readable(exchange, repo), exchange.query
    with exchange.peer.buckets.lock:
        files = {name: held for name, held in bucket.files.items() if name.startswith(path)}
    found = {name: told(name, held) for name, held in files.items()}
    if query.get("recursive", "").lower() not in ("true", "1"):
        for name in files:
            inner = name[len(path) :].lstrip("/").split("/")
            if len(inner) > 1:
                folder = name[: len(name) - len("/".join(inner[1:])) - 1]
                del found[name]
                found[folder] = {"type": "directory", "path": folder, "uploadedAt": now()}
    names = sorted(name for name in found if name > query.get("cursor", ""))
    page = names[: exchange.peer.page]
    headers = {}
    if len(names) > len(page):
        asked = urlencode(query | {"cursor": page[-1]})
        url = f"{exchange.peer.url}{exchange.path.split('?')[0]}?{asked}"
        headers["Link"] = f'<{url}>; rel="next"'
    exchange.reply([found[name] for name in page], headers=headers)


def paths_info(exchange: Exchange, repo: str) -> None:
    """Files; a path where none is is left out."""
    bucket = readable(exchange, repo)
    paths = exchange.json()["paths"]
    exchange.reply([told(path, bucket.files[path]) for path in paths if path in bucket.files])


def batch(exchange: Exchange, repo: str) -> None:
    """Operations, each for itself: what fails is told, and the others are done."""
    bucket, peer = writable(exchange, repo), exchange.peer
    try:
        asked = [json.loads(line) for line in exchange.body().splitlines()]
    except ValueError as error:
        raise Refusal(400, "a line of the body is no JSON") from error
    if not asked or len(asked) > 1000 or any(o.get("type") not in OPERATIONS for o in asked):
        raise Refusal(400, "no operations, more than 1000, or one that is not known")
    failed = []
    with peer.buckets.lock:
        files = dict(bucket.files)
        for operation in asked:
            path = operation["path"]
            if peer.buckets.refuse:
                peer.buckets.refuse -= 1
                wrong: str | None = "refused for once"
            elif operation["type"] == "deleteFile":
                wrong = None if files.pop(path, None) else "File not found"
            else:
                wrong = _add(exchange, files, operation)
            failed += [{"path": path, "error": wrong}] if wrong else []
        bucket.files = files
        peer.buckets.keep(bucket)
    done = len(asked) - len(failed)
    report = {"success": not failed, "processed": len(asked), "succeeded": done, "failed": failed}
    exchange.reply(report, 422 if not done else 200)


def _add(exchange: Exchange, files: dict[str, Held], operation: dict[str, Any]) -> str | None:
    """Put a file of known content at a path, or say why not."""
    peer, path, xet_hash = exchange.peer, operation["path"], operation["xetHash"]
    if ODD_PATH.search(path):
        return "Invalid path"
    if operation["type"] == "copyFile":
        source = readable(exchange, operation["sourceRepoId"])
        if xet_hash not in [held.xet_hash for held in source.files.values()]:
            return "The source has no such file"
    file = peer.xet.find(xet_hash)
    if file is None:
        return "Xet hash not found"
    sha256 = _content(exchange, xet_hash)
    if sha256 is None:
        return "The content is not what its hash says"
    files[path] = Held(xet_hash, sha256, file.size, operation["mtime"])
    return None


def _content(exchange: Exchange, xet_hash: str) -> str | None:
    """Keep what the chunks of a file are; None: they are not what they are named after."""
    store, xet = exchange.peer.store, exchange.peer.xet
    file = xet.find(xet_hash)
    assert file is not None
    content = xet.content(file)
    new = store.temporary()
    new.write_bytes(content)
    hashed = hf_xet.hash_files([str(new)])[0].hash
    sha256 = hashlib.sha256(content).hexdigest()
    os.replace(new, store.object(sha256))
    return sha256 if hashed == xet_hash else None


def xet_write_token(exchange: Exchange, repo: str) -> None:
    writable(exchange, repo)
    reply_xet_token(exchange)


def xet_read_token(exchange: Exchange, repo: str) -> None:
    readable(exchange, repo)
    reply_xet_token(exchange)


def resolve(exchange: Exchange, repo: str, path: str) -> None:
    """Where a file's content is, for both ways to get it."""
    peer, held = exchange.peer, readable(exchange, repo).files.get(path)
    if held is None:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    token = f"{peer.url}/api/buckets/{repo}/xet-read-token"
    plan = f"{peer.storage_url}/v1/reconstructions/{held.xet_hash}"
    headers = {
        "Location": peer.sign(f"/object/{held.sha256}"),
        "ETag": f'"{held.xet_hash}"',
        "X-Linked-Size": str(held.size),
        "X-Xet-Hash": held.xet_hash,
        "Link": f'<{token}>; rel="xet-auth", <{plan}>; rel="xet-reconstruction-info"',
    }
    exchange.reply(status=302, headers=headers)


ROUTES = [
    route("POST", "/api/buckets/{repo}", create),
    route("GET", "/api/buckets/{repo}", info),
    route("DELETE", "/api/buckets/{repo}", remove),
    route("GET", "/api/buckets/{name}", all_of),
    route("GET", "/api/buckets/{repo}/tree", tree),
    route("GET", "/api/buckets/{repo}/tree/{path}", tree),
    route("POST", "/api/buckets/{repo}/paths-info", paths_info),
    route("POST", "/api/buckets/{repo}/batch", batch),
    route("GET", "/api/buckets/{repo}/xet-write-token", xet_write_token),
    route("GET", "/api/buckets/{repo}/xet-read-token", xet_read_token),
    route("GET", "/buckets/{repo}/resolve/{path}", resolve),
]
