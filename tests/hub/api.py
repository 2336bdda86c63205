"""The Hub's listener, but for what writes files: accounts, repositories, trees, downloads."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Any
from urllib.parse import parse_qs

from tests.hub import buckets, cards, commits
from tests.hub.access import commit_at, known_user, readable, writable
from tests.hub.exchange import Exchange, Refusal, reply_xet_token, route
from tests.hub.store import Entry, now, pointer


def whoami(exchange: Exchange) -> None:
    user = known_user(exchange)
    organizations = [
        {"type": "org", "id": f"id-{name}", "name": name, "fullname": name, "roleInOrg": "write"}
        for name in user.organizations
    ]
    token = {"displayName": "test", "role": user.role, "createdAt": now()}
    exchange.reply(
        {
            "type": "user",
            "id": f"id-{user.name}",
            "name": user.name,
            "fullname": user.name.title(),
            "isPro": False,
            "orgs": organizations,
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def check_read(exchange: Exchange, repo: str) -> None:
    readable(exchange, repo)
    exchange.reply({})


def check_write(exchange: Exchange, repo: str) -> None:
    writable(exchange, repo)
    exchange.reply({})


def create_repo(exchange: Exchange) -> None:
    peer, asked, user = exchange.peer, exchange.json(), known_user(exchange)
    owner = asked.get("organization") or user.name
    name = f"{owner}/{asked['name']}"
    url = f"{peer.url}/{name}"
    if not re.fullmatch(r"[\w.-]{1,96}", asked["name"]):
        raise Refusal(400, "Invalid repo name")
    if not user.may_write(name):
        message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
        raise Refusal(403, message)
    with peer.store.lock:
        if name in peer.store.repos:
            message = "You already created this model repo"
            raise Refusal(409, message, body={"error": message, "url": url})
        peer.store.create(name, private=asked.get("visibility") == "private")
    exchange.reply({"url": url, "name": name, "id": secrets.token_hex(12)})


def validate_card(exchange: Exchange) -> None:
    errors, warnings = cards.check(exchange.json()["content"])
    told = [[{"message": message} for message in messages] for messages in (errors, warnings)]
    exchange.reply({"errors": told[0], "warnings": told[1]}, 400 if errors else 200)


def repo_info(exchange: Exchange, repo: str, revision: str = "main") -> None:
    found = readable(exchange, repo)
    commit = commit_at(found, revision)
    readme = commit.tree.get("README.md")
    text = exchange.peer.store.object(readme.sha256).read_text() if readme else ""
    card = cards.metadata(text)
    exchange.reply(
        {
            "_id": hashlib.sha1(repo.encode()).hexdigest()[:24],
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": commit.oid,
            "createdAt": found.created,
            "lastModified": found.commits[found.head].date,
            "private": found.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "cardData": card,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "model-index": card.get("model-index"),
            "siblings": [sibling(exchange, *item) for item in sorted(commit.tree.items())],
        }
    )


def sibling(exchange: Exchange, path: str, entry: Entry) -> dict[str, Any]:
    if exchange.query.get("blobs", "").lower() != "true":
        return {"rfilename": path}
    told = {"rfilename": path, "size": entry.size, "blobId": entry.oid}
    return told | ({"lfs": {**lfs_facts(entry), "sha256": entry.sha256}} if entry.lfs else {})


def lfs_facts(entry: Entry) -> dict[str, Any]:
    size = len(pointer(entry.sha256, entry.size))
    return {"oid": entry.sha256, "size": entry.size, "pointerSize": size}


def told_file(exchange: Exchange, path: str, entry: Entry) -> dict[str, Any]:
    told = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    if entry.lfs:
        told["lfs"] = lfs_facts(entry)
        xet_hash = exchange.peer.xet.hash_of(entry.sha256)
        told |= {"xetHash": xet_hash} if xet_hash else {}
    return told


def told_folder(path: str) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode()).hexdigest()
    return {"type": "directory", "path": path, "oid": oid, "size": 0}


def tree(exchange: Exchange, repo: str, revision: str, path: str = "") -> None:
    commit = commit_at(readable(exchange, repo), revision)
    prefix = f"{path}/" if path else ""
    whole = exchange.query.get("recursive", "").lower() in ("true", "1")
    files, folders = [], set()
    for name, entry in sorted(commit.tree.items()):
        if not name.startswith(prefix):
            continue
        inner = name[len(prefix) :].split("/")[:-1]
        above = [prefix + "/".join(inner[:depth]) for depth in range(1, len(inner) + 1)]
        folders |= set(above if whole else above[:1])
        if whole or not inner:
            files.append(told_file(exchange, name, entry))
    if prefix and not files and not folders:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    exchange.reply(files + [told_folder(folder) for folder in sorted(folders)])


def paths_info(exchange: Exchange, repo: str, revision: str) -> None:
    """What stands at each path; a path where nothing stands is left out."""
    files, told = commit_at(readable(exchange, repo), revision).tree, []
    for path in parse_qs(exchange.body().decode()).get("paths", []):
        if path in files:
            told.append(told_file(exchange, path, files[path]))
        elif any(name.startswith(path.rstrip("/") + "/") for name in files):
            told.append(told_folder(path))
    exchange.reply(told)


def list_commits(exchange: Exchange, repo: str, revision: str) -> None:
    found = readable(exchange, repo)
    exchange.reply(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in found.history(commit_at(found, revision))
        ]
    )


def xet_write_token(exchange: Exchange, repo: str, revision: str) -> None:
    writable(exchange, repo)
    reply_xet_token(exchange)


def xet_read_token(exchange: Exchange, repo: str, revision: str) -> None:
    readable(exchange, repo)
    reply_xet_token(exchange)


def resolve(exchange: Exchange, repo: str, revision: str, path: str) -> None:
    """A file. One in LFS is in the storage: the answer says where, for both ways to get it."""
    peer, commit = exchange.peer, commit_at(readable(exchange, repo), revision)
    entry = commit.tree.get(path)
    headers = {"X-Repo-Commit": commit.oid}
    if entry is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    if not entry.lfs:
        file = peer.store.object(entry.sha256)
        exchange.reply_file(file, headers | {"ETag": f'"{entry.oid}"'})
        return
    headers |= {
        "Location": peer.sign(f"/object/{entry.sha256}"),
        "ETag": f'"{entry.sha256}"',
        "X-Linked-ETag": f'"{entry.sha256}"',
        "X-Linked-Size": str(entry.size),
    }
    xet_hash = peer.xet.hash_of(entry.sha256)
    if xet_hash:
        token = f"{peer.url}/api/models/{repo}/xet-read-token/{commit.oid}"
        plan = f"{peer.storage_url}/v1/reconstructions/{xet_hash}"
        link = f'<{token}>; rel="xet-auth", <{plan}>; rel="xet-reconstruction-info"'
        headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": token, "Link": link}
    exchange.reply(status=302, headers=headers)


ROUTES = [
    route("GET", "/api/whoami-v2", whoami),
    route("POST", "/api/repos/create", create_repo),
    route("POST", "/api/validate-yaml", validate_card),
    route("GET", "/api/models/{repo}", repo_info),
    route("GET", "/api/models/{repo}/revision/{revision}", repo_info),
    route("GET", "/api/models/{repo}/auth-check", check_read),
    route("GET", "/api/models/{repo}/auth-check/write", check_write),
    route("GET", "/api/models/{repo}/tree/{revision}", tree),
    route("GET", "/api/models/{repo}/tree/{revision}/{path}", tree),
    route("POST", "/api/models/{repo}/paths-info/{revision}", paths_info),
    route("GET", "/api/models/{repo}/commits/{revision}", list_commits),
    route("GET", "/api/models/{repo}/xet-write-token/{revision}", xet_write_token),
    route("GET", "/api/models/{repo}/xet-read-token/{revision}", xet_read_token),
    route("GET", "/{repo}/resolve/{revision}/{path}", resolve),
    *commits.ROUTES,
    *buckets.ROUTES,
]
