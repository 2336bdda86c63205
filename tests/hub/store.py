"""What the peer keeps, on disk: objects by their content, repositories with their commits."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

MEBIBYTE = 1024 * 1024
BLOCK = 256 * 1024
LFS_FROM_BYTES = 10 * MEBIBYTE
# Of a new repository's .gitattributes, what a training run can write.
LFS_PATTERNS = [
    "*.bin",
    "*.ckpt",
    "*.gz",
    "*.h5",
    "*.model",
    "*.msgpack",
    "*.npy",
    "*.npz",
    "*.onnx",
    "*.pickle",
    "*.pkl",
    "*.pt",
    "*.pth",
    "*.safetensors",
    "*.tar",
    "*.zip",
    "*tfevents*",
]
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def blob_id(data: bytes) -> str:
    """Git's name for a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git itself holds of an LFS file."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return text.encode()


def goes_to_lfs(path: str, size: int) -> bool:
    name = path.rsplit("/", 1)[-1]
    return size >= LFS_FROM_BYTES or any(fnmatch.fnmatch(name, each) for each in LFS_PATTERNS)


@dataclass(frozen=True)
class Entry:
    """A file in a commit."""

    sha256: str
    size: int
    oid: str
    lfs: bool


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    tree: dict[str, Entry]


@dataclass
class Repo:
    name: str
    private: bool
    created: str = field(default_factory=now)
    head: str = ""
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        return self.name.replace("/", "--") + ".json"

    def find(self, revision: str) -> Commit | None:
        """The commit of `main`, or of an id or the beginning of one."""
        if revision == "main":
            return self.commits[self.head]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        return self.commits[found[0]] if len(found) == 1 else None

    def history(self, commit: Commit) -> Iterator[Commit]:
        """`commit` and what came before it, newest first."""
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit


class Store:
    """A folder with everything, so that another peer can go on with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        for name in ("objects", "repos", "temporary"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        loaded = [_load(file) for file in sorted((folder / "repos").glob("*.json"))]
        self.repos = {repo.name: repo for repo in loaded}

    def temporary(self) -> Path:
        return self.folder / "temporary" / secrets.token_hex(8)

    def object(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256

    def has(self, sha256: str) -> bool:
        return re.fullmatch("[0-9a-f]{64}", sha256) is not None and self.object(sha256).exists()

    def add_file(self, data: bytes) -> Entry:
        """Keep a file that git holds itself."""
        sha256 = hashlib.sha256(data).hexdigest()
        new = self.temporary()
        new.write_bytes(data)
        os.replace(new, self.object(sha256))
        return Entry(sha256, len(data), blob_id(data), lfs=False)

    def lfs_entry(self, sha256: str) -> Entry:
        """An entry for an object that was uploaded before."""
        size = self.object(sha256).stat().st_size
        return Entry(sha256, size, blob_id(pointer(sha256, size)), lfs=True)

    def create(self, name: str, private: bool) -> Repo:
        repo = Repo(name, private)
        self.repos[name] = repo
        attributes = {".gitattributes": self.add_file(ATTRIBUTES.encode())}
        self.commit(repo, attributes, "initial commit", "", "system")
        return repo

    def commit(
        self, repo: Repo, tree: dict[str, Entry], title: str, description: str, author: str
    ) -> Commit:
        """Put a commit on top of `main`. Two of the same content are still two commits."""
        oid = secrets.token_hex(20)
        parent = repo.head or None
        repo.commits[oid] = Commit(oid, parent, title, description, author, now(), tree)
        repo.head = oid
        new = self.temporary()
        new.write_text(json.dumps(dataclasses.asdict(repo)))
        os.replace(new, self.folder / "repos" / repo.file_name)
        return repo.commits[oid]


def _load(file: Path) -> Repo:
    stored = json.loads(file.read_text())
    for oid, commit in stored["commits"].items():
        tree = {path: Entry(**entry) for path, entry in commit["tree"].items()}
        stored["commits"][oid] = Commit(**{**commit, "tree": tree})
    return Repo(**stored)
