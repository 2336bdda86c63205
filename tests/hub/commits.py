"""The Hub's listener, writing: where files go, LFS uploads, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hub import cards
from tests.hub.access import commit_at, known_user, writable
from tests.hub.exchange import Exchange, Refusal, route
from tests.hub.store import MEBIBYTE, Entry, Repo, goes_to_lfs

PART_BYTES = 5 * MEBIBYTE
SECRET_FOUND = (
    "It appears that one or more of your files contain valid Hugging Face secrets, such as tokens "
    "or API keys. For your security, please revoke and remove these secrets before pushing. "
    "Offending files: - "
)
NOT_UPLOADED = (
    "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
    "Offending file: - "
)


@dataclass
class Multipart:
    """An upload in parts: each part's ETag and file, by number from 1."""

    sha256: str
    parts: dict[int, tuple[str, Path]] = field(default_factory=dict)


def preupload(exchange: Exchange, repo: str, revision: str) -> None:
    """Say of each file how it is to be uploaded, and what stands in its place now."""
    commit = commit_at(writable(exchange, repo), revision)
    told = []
    for file in exchange.json()["files"]:
        path, old = file["path"], commit.tree.get(file["path"])
        mode = "lfs" if goes_to_lfs(path, file["size"]) else "regular"
        oid = old and (old.sha256 if old.lfs else old.oid)
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    exchange.reply({"files": told, "commitOid": commit.oid})


def lfs_batch(exchange: Exchange, repo: str) -> None:
    writable(exchange, repo)
    peer, asked = exchange.peer, exchange.json()
    in_parts, objects = False, []
    for wanted in asked["objects"]:
        sha256, size = wanted["oid"], wanted["size"]
        told = {"oid": sha256, "size": size, "authenticated": True}
        if not peer.store.has(sha256):
            upload = {"href": peer.sign(f"/object/{sha256}"), "header": {}}
            if peer.multipart_over is not None and size > peer.multipart_over:
                in_parts, upload = True, multipart(exchange, sha256, size)
            told["actions"] = {"upload": upload, "verify": {"href": f"{peer.url}/lfs-verify"}}
        objects.append(told)
    transfer = "multipart" if in_parts else "basic"
    exchange.reply({"transfer": transfer, "objects": objects, "hash_algo": "sha256"})


def multipart(exchange: Exchange, sha256: str, size: int) -> dict[str, Any]:
    """Begin an upload in parts; the addresses of the parts stand in what LFS calls a header."""
    peer, name = exchange.peer, secrets.token_hex(8)
    peer.multiparts[name] = Multipart(sha256)
    numbers = range(1, -(-size // PART_BYTES) + 1)
    header = {f"{number:05d}": peer.sign(f"/part/{name}/{number}") for number in numbers}
    header["chunk_size"] = str(PART_BYTES)
    return {"href": f"{peer.url}/lfs-complete/{name}", "header": header}


def lfs_complete(exchange: Exchange, name: str) -> None:
    peer, asked = exchange.peer, exchange.json()
    upload = peer.multiparts[name]
    file, digest = peer.store.temporary(), hashlib.sha256()
    with file.open("wb") as stream:
        for part in asked["parts"]:
            tag, stored = upload.parts.get(part["partNumber"], ("", Path()))
            if part["etag"].strip('"') != tag:
                raise Refusal(400, f"InvalidPart {part['partNumber']}")
            data = stored.read_bytes()
            digest.update(data)
            stream.write(data)
    if digest.hexdigest() != upload.sha256:
        raise Refusal(400, "the sha256 of the parts is not the object's")
    os.replace(file, peer.store.object(upload.sha256))
    exchange.reply({"success": True})


def lfs_verify(exchange: Exchange) -> None:
    known_user(exchange)
    store, asked = exchange.peer.store, exchange.json()
    if not store.has(asked["oid"]):
        raise Refusal(404, "LFS object not found")
    if store.object(asked["oid"]).stat().st_size != asked["size"]:
        raise Refusal(400, "the size is another")
    exchange.reply({})


def commit(exchange: Exchange, repo: str, revision: str) -> None:
    """Apply one commit, whole or not at all."""
    peer, target = exchange.peer, writable(exchange, repo)
    if revision != "main":
        raise Refusal(404, f"{revision} is not a branch", "RevisionNotFound")
    header, changes = read_changes(exchange)
    added = {value["path"]: added_entry(exchange, key, value) for key, value in changes}
    with peer.store.lock:
        if not target.head.startswith(header.get("parentCommit") or ""):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = changed_tree(target, changes, added)
        author = known_user(exchange).name
        description = header.get("description", "")
        oid = peer.store.commit(target, tree, header["summary"], description, author).oid
    url = f"{peer.url}/{repo}/commit/{oid}"
    exchange.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def read_changes(exchange: Exchange) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """The header, and each change with its kind."""
    lines = [json.loads(line) for line in exchange.body().splitlines() if line.strip()]
    header: dict[str, Any] = {}
    for line in lines:
        header |= line["value"] if line["key"] == "header" else {}
    if not header.get("summary"):
        raise Refusal(400, "a commit needs a summary")
    return header, [(line["key"], line["value"]) for line in lines if line["key"] != "header"]


def added_entry(exchange: Exchange, kind: str, value: dict[str, Any]) -> Entry | None:
    """The entry of a file that is added; None for a deletion."""
    peer, path = exchange.peer, value["path"]
    if kind == "file":
        data = base64.b64decode(value["content"])
        check_content(exchange, path, data)
        return peer.store.add_file(data)
    if kind == "lfsFile":
        if not peer.obtain(value["oid"]):
            raise Refusal(400, NOT_UPLOADED + path)
        return peer.store.lfs_entry(value["oid"])
    return None


def check_content(exchange: Exchange, path: str, data: bytes) -> None:
    if any(token.encode() in data for token in exchange.peer.tokens):
        raise Refusal(400, SECRET_FOUND + path)
    errors, _ = cards.check(data.decode("utf-8", "replace")) if path == "README.md" else ([], [])
    if errors:
        raise Refusal(400, f"Invalid metadata in README.md: {errors[0]}")


def changed_tree(
    repo: Repo, changes: list[tuple[str, dict[str, Any]]], added: dict[str, Entry | None]
) -> dict[str, Entry]:
    tree = dict(repo.commits[repo.head].tree)
    for kind, value in changes:
        path, entry = value["path"], added[value["path"]]
        if entry is not None:
            tree[path] = entry
            continue
        if kind == "deletedFolder":
            gone = [name for name in tree if name.startswith(path.rstrip("/") + "/")]
        else:
            gone = [path] if path in tree else []
        if not gone:
            message = f"A file with this name doesn't exist: {path}"
            raise Refusal(404, message, "EntryNotFound")
        for name in gone:
            del tree[name]
    return tree


ROUTES = [
    route("POST", "/api/models/{repo}/preupload/{revision}", preupload),
    route("POST", "/{repo}.git/info/lfs/objects/batch", lfs_batch),
    route("POST", "/lfs-verify", lfs_verify),
    route("POST", "/lfs-complete/{name}", lfs_complete),
    route("POST", "/api/models/{repo}/commit/{revision}", commit),
]
