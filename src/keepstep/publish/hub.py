"""One push: the pattern that survived every fault tried. Runs in a process of its own (push.py).

HEAD is read, our weights compared with those there, and everything is sent as one commit on top of
it; after any doubt (conflict, server error, lost answer) HEAD is read again. Facts of
huggingface_hub 2.4: `create_commit` is one commit, and is not retried; the client has no read
timeout, and honours `Retry-After` without a bound.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    set_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import default_client_factory

from ..checkpoint.storage import sizes_under
from .best import BEST_FILE, Best
from .bundle import sha256_of
from .card import license_of

T = TypeVar("T")
TRIES = 6
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds between tries
READ_TIMEOUT = 60.0  # seconds without a byte
LONGEST_WAIT = 30  # seconds that a server may ask for, per request
FATAL = (400, 401, 403, 404, 413, 422)
# Weights, and what says of which kind they are: what is there and not ours is of another model.
STALE = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "adapter_model.bin"),
    *("config.json", "adapter_config.json", "generation_config.json", "chat_template.jinja"),
    *("added_tokens.json", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
)


class PushError(Exception):
    """The push has failed: what happened, and what to do.

    Attributes:
        fatal: no further try can mend it: the token, the name, the content.
    """

    def __init__(self, text: str, fatal: bool) -> None:
        super().__init__(text)
        self.fatal = fatal


@dataclass(frozen=True)
class Target:
    """Where to: `owner/name`, and whether a new repository is to be private."""

    repo_id: str
    private: bool = True
    force: bool = False  # take the place of weights whose metric cannot be compared with ours


@dataclass(frozen=True)
class Pushed:
    """What came of a push.

    Attributes:
        outcome: published; present (these weights were there already); or refused (what is there
            is no worse).
        commit: the repository's HEAD with these weights, or with the better ones.
        reason: why refused.
        step: of the weights that are there now.
    """

    outcome: str
    commit: str
    step: int
    reason: str = ""


def bounded_client() -> Any:
    """huggingface_hub's HTTP client, that never waits for ever."""

    def shorten(response: Any) -> None:
        asked = response.headers.get("retry-after")
        if asked is not None and not (asked.isdecimal() and int(asked) <= LONGEST_WAIT):
            response.headers["retry-after"] = str(LONGEST_WAIT)
        response.headers.pop("ratelimit", None)  # as good as a Retry-After, to the client

    client = default_client_factory()
    client.timeout = READ_TIMEOUT
    client.event_hooks = {**client.event_hooks, "response": [shorten]}
    return client


def connect() -> HfApi:
    """With the token of the environment (`HF_TOKEN`)."""
    set_client_factory(bounded_client)
    return HfApi(library_name="keepstep")


def check(api: HfApi, target: Target, card: dict[str, Any], base: str | None) -> dict[str, Any]:
    """That we may write there; the repository is made if it does not exist.

    Args:
        card: metadata that were asked for; the Hub says whether it takes them.
        base: Hub name of the base model.

    Returns: `theirs`: what is published there already; `public`: it can be read by all; `license`:
        of the base model, if its card says.

    Raises:
        PushError: the token, the name or the metadata are wrong.
    """

    def look() -> dict[str, Any]:
        api.whoami()
        repo = _repo(api, target)
        api.auth_check(target.repo_id, write=True)
        ModelCard(f"---\n{ModelCardData(**card).to_yaml()}\n---\n").validate()
        theirs = remote_best(api, target, repo.sha)
        return {
            "theirs": theirs and asdict(theirs),
            "public": not repo.private,
            "license": base and license_of(base),
        }

    return _with_patience(target, look, tries=3)


def push(api: HfApi, target: Target, folder: Path, best: Best) -> Pushed:
    """Make `folder`'s files the ones of the repository's main branch, unless better ones are there.

    Raises:
        PushError: it could not be done.
    """
    tries, files = 0, sorted(sizes_under(folder))

    def once() -> Pushed:
        nonlocal tries
        tries += 1
        head = _repo(api, target).sha
        theirs = remote_best(api, target, head)
        verdict = best.compare(theirs)
        if verdict == "same":  # the texts beside them may be somebody's, or of another version
            _verify(api, target, best.weights, folder, best, head)
            return Pushed("published" if tries > 1 else "present", head, best.global_step)
        if verdict == "unlike" and not target.force:
            raise PushError(f"{target.repo_id}: {_refusal(best, theirs, verdict)}", fatal=True)
        if verdict == "theirs" and theirs is not None:
            return Pushed("refused", head, theirs.global_step, _refusal(best, theirs, verdict))
        info = api.create_commit(
            target.repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in files),
                *_removed(api, target, head, folder),
            ],
            commit_message=_title(best),
            commit_description=f"run {best.run_id}, by keepstep",
            parent_commit=head,
        )
        _verify(api, target, files, folder, best, info.oid)
        return Pushed("published", info.oid, best.global_step)

    return _with_patience(target, once)


def remote_best(api: HfApi, target: Target, revision: str) -> Best | None:
    """What `training/best.json` says at that revision; None: there is none, or none of ours."""
    with tempfile.TemporaryDirectory(prefix="keepstep-") as cache:
        try:
            path = api.hf_hub_download(
                target.repo_id, BEST_FILE, revision=revision, local_dir=cache
            )
        except RemoteEntryNotFoundError:  # not its kin: "no answer" is not "nothing there"
            return None
        return Best.from_json(Path(path).read_text())


def _repo(api: HfApi, target: Target) -> Any:
    """What the Hub says of the repository, which is made if it does not exist."""
    try:
        return api.repo_info(target.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        return api.repo_info(target.repo_id)


def _removed(
    api: HfApi, target: Target, head: str, folder: Path
) -> Iterator[CommitOperationDelete]:
    """Weights of another kind, or another number of shards; every other file of theirs stays."""
    for file in _files(api, target, head):
        stale = any(fnmatchcase(file.path, pattern) for pattern in STALE)
        if stale and "/" not in file.path and not (folder / file.path).exists():
            yield CommitOperationDelete(file.path)


def _files(api: HfApi, target: Target, revision: str) -> Iterable[RepoFile]:
    tree = api.list_repo_tree(target.repo_id, recursive=True, revision=revision)
    return [file for file in tree if isinstance(file, RepoFile)]


def _verify(
    api: HfApi, target: Target, names: Iterable[str], folder: Path, best: Best, revision: str
) -> None:
    """These files are there, byte for byte.

    Raises:
        OSError: one is not.
    """
    there = {file.path: file for file in _files(api, target, revision)}
    for name in names:
        if not _same(folder / name, there.get(name), best.weights.get(name)):
            raise OSError(f"{name} at {revision[:8]} is not what was sent")


def _same(path: Path, file: RepoFile | None, sha256: str | None) -> bool:
    """Whether the Hub's file is ours; `sha256`: of ours, if it is known already."""
    if file is None or file.size != path.stat().st_size:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == (sha256 or sha256_of(path)))
    content = path.read_bytes()
    return bool(file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _title(best: Best) -> str:
    if best.metric is None or best.value is None:
        return f"Step {best.global_step}"
    return f"Step {best.global_step}: {best.metric} {best.value:.4f}"


def _refusal(best: Best, theirs: Best | None, verdict: str) -> str:
    assert theirs is not None
    there = f"step {theirs.global_step} of run {theirs.run_id} ({_score(theirs)})"
    if verdict == "theirs":
        return f"{there} is there, which is no worse than {_score(best)}"
    return (
        f"{there} is there, which cannot be compared with {_score(best)}: another metric, other "
        "evaluation rows or another base model. `keepstep push --force` takes its place"
    )


def _score(best: Best) -> str:
    return "no metric" if best.value is None else f"{best.metric} {best.value:.4f}"


def _with_patience(target: Target, action: Callable[[], T], tries: int = TRIES) -> T:
    """Try again after what may pass; say at once what will not."""
    for number in range(1, tries + 1):
        try:
            return action()
        except PushError:
            raise
        except Exception as error:
            if reason := _fatal(target, error):
                raise PushError(reason, fatal=True) from error
            if number == tries:
                text = f"{target.repo_id}: {tries} tries, the last: {_brief(error)}"
                raise PushError(text, fatal=False) from error
            time.sleep(PAUSES[min(number, len(PAUSES)) - 1])
    raise AssertionError("unreachable")


def _fatal(target: Target, error: Exception) -> str | None:
    """What to say of an error that no further try can mend; None of any other."""
    if isinstance(error, HFValidationError):
        return f"{target.repo_id!r} is no repository name: owner/name"
    if isinstance(error.__cause__, HfHubHTTPError):  # "no answer", says the client of a 403
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):  # a ValueError: the card, as the client found it
        return f"{target.repo_id}: {_brief(error)}" if isinstance(error, ValueError) else None
    status = error.response.status_code
    if status not in FATAL:
        return None
    hint = {
        401: "the token is not accepted: export HF_TOKEN=… (or `hf auth login`)",
        403: "the token may not write there: one with write access to that name is needed",
        404: "no such repository for this token: is the name right, and the token's access?",
    }.get(status, "the Hub rejects what was sent")
    return f"{target.repo_id}: {status}: {hint} ({_brief(error)})"


def _brief(error: BaseException) -> str:
    """One line, without what a server may have echoed of a request."""
    if error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        return f"{str(error).splitlines()[0]}: {_brief(error.__cause__)}"
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300]
