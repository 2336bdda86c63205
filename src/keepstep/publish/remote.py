"""What a repository on the Hub holds, compared file by file with what we have."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from keepstep.hub.client import HubError
from keepstep.output.printable import first_few
from keepstep.publish.best import BEST_FILE, UNREADABLE, Best
from keepstep.publish.bundle import sha256_of
from keepstep.run_folder.contents import sizes_under
from keepstep.run_folder.safe_read import SMALL, OddFileError, read_text

CARD = "README.md"
# Weights, and what says of which kind they are: what is there and not ours is of another model.
STALE = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "adapter_model.bin"),
    *("config.json", "adapter_config.json", "generation_config.json", "chat_template.jinja"),
    *("added_tokens.json", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
)
# Weights of any library, in any folder.
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack"),
    *("*.onnx", "*.tflite", "*.pkl"),
)


@dataclass(frozen=True)
class Target:
    """Where to.

    Attributes:
        repo_id: `owner/name`.
        private: what was asked for; None: a new repository is private, another is left as it is.
        force: take the place of a model that cannot be compared with ours, or is somebody's.
    """

    repo_id: str
    private: bool | None = None
    force: bool = False


@dataclass(frozen=True)
class Remote:
    """A repository at one commit.

    Attributes:
        head: the commit.
        private: whether it is hidden from others.
        files: all of them, by path.
        best: what `training/best.json` says; None: there is none.
    """

    head: str
    private: bool
    files: Mapping[str, RepoFile]
    best: Best | None


class Ours:
    """A folder of files that are to be in the repository.

    Attributes:
        folder: where they lie.
        sizes: path → bytes.
    """

    def __init__(self, folder: Path, best: Best) -> None:
        self.folder, self.sizes = folder, sizes_under(folder)
        self._sha256 = dict(best.weights)  # path → of what may be large, once it is known

    def is_same(self, name: str, there: RepoFile | None) -> bool:
        """Whether the Hub's file is ours, byte for byte."""
        if name not in self.sizes or there is None or there.size != self.sizes[name]:
            return False
        if there.lfs is not None:
            if name not in self._sha256:
                self._sha256[name] = sha256_of(self.folder / name)
            return bool(there.lfs.sha256 == self._sha256[name])
        content = (self.folder / name).read_bytes()
        return bool(
            there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        )

    def differing(self, files: Mapping[str, RepoFile]) -> list[str]:
        """Which of ours are not there, or not as they are here."""
        return [name for name in sorted(self.sizes) if not self.is_same(name, files.get(name))]

    def stale(self, files: Mapping[str, RepoFile]) -> list[str]:
        """Weights of another kind, or another number of shards; all else of theirs stays."""
        return sorted(name for name in files if name not in self.sizes and _is_stale(name))


def look(api: HfApi, target: Target) -> Remote:
    """What is there now; the repository is made if it does not exist.

    Raises:
        HubError: everybody can read it, and it was to be private.
    """
    try:
        told = api.repo_info(target.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(target.repo_id, private=target.private is not False, exist_ok=True)
        told = api.repo_info(target.repo_id)
    if target.private and not told.private:
        raise HubError(
            f"{target.repo_id} can be read by everybody, and private was asked for: make it "
            "private on the Hub, name another one, or ask for public",
            fatal=True,
        )
    head = str(told.sha)
    files = files_at(api, target, head)
    return Remote(head, bool(told.private), files, _best(api, target, head, files))


def files_at(api: HfApi, target: Target, revision: str) -> dict[str, RepoFile]:
    """Every file of the repository at a commit, by path."""
    tree = api.list_repo_tree(target.repo_id, recursive=True, revision=revision)
    return {file.path: file for file in tree if isinstance(file, RepoFile)}


def doubt_of(remote: Remote, ours: Ours | None = None) -> str | None:
    """Why a push must not take the place of what is there unasked; None: there is nothing, or it
    says what it is.

    Args:
        ours: what would be pushed; None: that is not known yet.
    """
    if remote.best is None:
        others = of_others(remote.files, ours)
        what = f"a model is there that keepstep did not publish ({first_few(others)})"
        return what if others else None
    if remote.best == UNREADABLE:
        return f"its {BEST_FILE} cannot be read, so that it cannot be compared with anything"
    for name, sha256 in sorted(remote.best.weights.items()):
        there = remote.files.get(name)
        if there is None or (there.lfs is not None and there.lfs.sha256 != sha256):
            return f"{name} there is not what its {BEST_FILE} speaks of"
    return None


def of_others(files: Mapping[str, RepoFile], ours: Ours | None = None) -> list[str]:
    """What of a model that is not ours a push would take the place of."""
    return sorted(
        name
        for name, file in files.items()
        if name not in (CARD, ".gitattributes")  # the Hub makes them with a new repository
        and (_is_stale(name) or _matches(name, WEIGHTS) or (ours and name in ours.sizes))
        and not (ours and ours.is_same(name, file))
    )


def _best(api: HfApi, target: Target, revision: str, files: Mapping[str, RepoFile]) -> Best | None:
    if BEST_FILE not in files:
        return None
    if files[BEST_FILE].size > SMALL:
        return UNREADABLE
    with tempfile.TemporaryDirectory(prefix="keepstep-") as cache:
        path = api.hf_hub_download(target.repo_id, BEST_FILE, revision=revision, local_dir=cache)
        try:
            return Best.from_json(read_text(Path(path)))
        except OddFileError:
            return UNREADABLE


def _is_stale(name: str) -> bool:
    return "/" not in name and _matches(name, STALE)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
