"""`keepstep push`: what a run could not, or did not want to, publish itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from keepstep.errors import KeepstepError
from keepstep.hub.client import NO_TOKEN, name_fault, offline
from keepstep.output.printable import quoted
from keepstep.output.progress import Phase, Shown, phases
from keepstep.policy.strict import TextError, build
from keepstep.publish.bundle import freeze
from keepstep.publish.card import fault_of
from keepstep.publish.process import push_of, shows_of
from keepstep.publish.remote import Target
from keepstep.run_folder.reader import Checkpoint, RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_object
from keepstep.run_folder.storage import Storage

LOCK_SECONDS = 1.0


class PushFailedError(KeepstepError):
    """The push has failed: what happened, and what to do.

    Attributes:
        may_pass: the same again may do, later: the Hub has not answered, say.
    """

    def __init__(self, text: str, may_pass: bool = False) -> None:
        super().__init__(text)
        self.may_pass = may_pass


def push_best(
    run: RunFolder,
    repo_id: str | None,
    *,
    private: bool | None = None,
    force: bool = False,
    timeout: float,
    dry_run: bool = False,
    card: dict[str, Any] | None = None,
    progress: Callable[[str], Shown] = lambda text: contextlib.nullcontext(),
    waiting: Callable[[str], Shown] = lambda text: contextlib.nullcontext(),
) -> list[str]:
    """Publish the best checkpoint of `run`; returns what to tell.

    Args:
        private: what is asked for; None: as the run was told to, else a new repository is private.
        card: metadata over the recipe's.
        progress, waiting: what shows how far it is (see `shows_of`).

    Raises:
        PushFailedError: it is not there.
    """
    target = replace(_target(run, repo_id, private), force=force)
    if fault := _fault(target, card or {}, dry_run):
        raise PushFailedError(f"not published: {fault}")
    best, storage = best_of(run), Storage()
    shows = shows_of(best.path.name, target.repo_id, progress, waiting)
    with _alone(run, storage), phases(shows) as tell:
        answer = _pushed(run, best, target, storage, timeout, tell, dry_run=dry_run, card=card)
    return _told(answer, target, best)


def _fault(target: Target, card: dict[str, Any], dry_run: bool) -> str | None:
    """What is known to be wrong before a byte is read."""
    fault = name_fault(target.repo_id) or fault_of(card)
    if fault or dry_run:
        return fault
    if variable := offline():
        return f"{variable} is set: unset it"
    return None if get_token() else NO_TOKEN


@contextlib.contextmanager
def _alone(run: RunFolder, storage: Storage) -> Iterator[None]:
    """Of two at once the second would take the files from under the first one."""
    began = time.monotonic()
    with storage.locked(run.private / "push.lock", LOCK_SECONDS) as alone:
        # (A file system without locks says so at once.)
        if not alone and time.monotonic() - began >= LOCK_SECONDS:
            told = f"another `keepstep push {quoted(run.path)}` is at work: wait for it"
            raise PushFailedError(told, may_pass=True)
        yield


def _pushed(
    run: RunFolder,
    best: Checkpoint,
    target: Target,
    storage: Storage,
    timeout: float,
    tell: Callable[[Phase], None],
    **more: Any,
) -> dict[str, Any]:
    """What came of it."""
    place = run.private / "publish-by-hand"
    if place.exists():
        storage.remove(place)
    storage.make_folder(place)
    try:
        try:
            frozen = freeze(best, place / best.path.name, storage, copy=True)
        except FileNotFoundError as error:
            what = f"{Path(str(error.filename)).name} of {best.path.name} is missing"
            raise PushFailedError(f"not published: {what}: damaged, or pruned just now") from error
        log = run.publishing / "push.log"
        storage.make_folder(run.publishing)
        more |= {"waited_for": True}
        job = push_of(frozen.path, best.step, run.policy(), target, timeout, log, **more)
        try:
            return job.wait(tell=tell)
        finally:
            job.stop()
    finally:
        storage.remove(place)


def best_of(run: RunFolder) -> Checkpoint:
    """The best committed checkpoint; the newest, where nothing ranks them."""
    policy = run.policy()
    alive = [r.step for r in run.records(None) if r.is_finite and not r.abandoned]
    best = run.best(policy)
    if best is None and alive and not policy.metric:
        best = run.checkpoint(max(alive))
    if best is None:
        raise PushFailedError(f"{run.path} has no best checkpoint")
    return best


def _target(run: RunFolder, repo_id: str | None, private: bool | None) -> Target:
    name = repo_id
    try:
        stored = read_object(run.target)
        name = name or build(str | None, stored.get("repo_id"), "repo_id")
        if private is None and name == stored.get("repo_id"):
            private = build(bool | None, stored.get("private"), "private")
    except ABSENT:
        pass
    except (OSError, OddFileError, TextError) as error:
        if not name:
            hint = "name the repository: --repo_id owner/name"
            raise PushFailedError(f"{run.target} cannot be believed: {error}: {hint}") from error
    if not name:
        raise PushFailedError(f"{run.path} was not to be published: name it: --repo_id owner/name")
    return Target(name, private)


def _told(answer: dict[str, Any], target: Target, best: Checkpoint) -> list[str]:
    if "error" in answer:
        raise PushFailedError(f"not published: {answer['error']}", answer.get("fatal") is False)
    if answer["outcome"] == "would publish":
        what = "public" if target.private is False else "private"
        if not target.private:
            what += ", if it is new"
        return [f"{best.path.name} to {target.repo_id} ({what}):", *_indented(answer["files"])]
    if answer["outcome"] == "refused":
        raise PushFailedError(f"not published to {target.repo_id}: {answer['reason']}")
    verb = {"present": "already there"}.get(answer["outcome"], answer["outcome"])
    told = [f"{target.repo_id}: {verb}, step {answer['step']}, commit {answer['commit'][:8]}"]
    told += _indented(answer["mended"])
    left = "it was made before, and is left as it is"
    if target.private is None and not answer["private"]:
        told.append(f"{target.repo_id} can be read by everybody: {left}")
    if target.private is False and answer["private"]:
        told.append(f"{target.repo_id} is private: {left}; the Hub's page of it changes that")
    return told


def _indented(names: list[str]) -> list[str]:
    return [f"  {name}" for name in names]
