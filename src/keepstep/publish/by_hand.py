"""`keepstep push`: what a run could not, or did not want to, publish itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..checkpoint.reading import ABSENT, OddFileError, read_object
from ..checkpoint.runfolder import Committed, RunFolder
from ..checkpoint.storage import Storage
from ..checkpoint.strict import TextError, build
from .bundle import freeze
from .hub import Target
from .process import push_of


class PushFailedError(Exception):
    """The push has failed: what happened, and what to do."""


def push_best(
    run: RunFolder,
    repo_id: str | None,
    *,
    public: bool,
    force: bool,
    timeout: float,
    dry_run: bool,
    card: dict[str, Any] | None = None,
) -> list[str]:
    """Publish the best checkpoint of `run`; returns what to tell.

    Raises:
        PushFailedError: it is not there.
    """
    best, target = best_of(run), _target(run, repo_id, public)
    target = replace(target, force=force)
    place, storage = run.private / "publish-by-hand", Storage()
    if place.exists():
        storage.remove(place)
    storage.make_folder(place)
    try:
        frozen = freeze(best, place / best.path.name, storage, copy=True)
        log = run.publishing / "push.log"
        storage.make_folder(run.publishing)
        job = push_of(
            frozen.path, best.step, run.policy(), target, timeout, log, dry_run=dry_run, card=card
        )
        try:
            answer = job.wait()
        finally:
            job.stop()
    finally:
        storage.remove(place)
    return _told(answer, target, best)


def best_of(run: RunFolder) -> Committed:
    """The best committed checkpoint; the newest, where nothing ranks them."""
    policy = run.policy()
    alive = [record.step for record in run.records(None) if not record.abandoned]
    best = run.best(policy)
    if best is None and alive and not policy.metric:
        best = run.checkpoint(max(alive))
    if best is None:
        raise PushFailedError(f"{run.path} has no best checkpoint")
    return best


def _target(run: RunFolder, repo_id: str | None, public: bool) -> Target:
    name, private = repo_id, True
    try:
        stored = read_object(run.target)
        name = name or build(str | None, stored.get("repo_id"), "repo_id")
        private = build(bool, stored.get("private", True), "private")
    except ABSENT:
        pass
    except (OSError, OddFileError, TextError) as error:
        if not name:
            hint = "name the repository: --repo_id owner/name"
            raise PushFailedError(f"{run.target} cannot be believed: {error}: {hint}") from error
    if not name:
        raise PushFailedError(f"{run.path} was not to be published: name it: --repo_id owner/name")
    return Target(name, private=not public and private)


def _told(answer: dict[str, Any], target: Target, best: Committed) -> list[str]:
    if "error" in answer:
        raise PushFailedError(f"not published: {answer['error']}")
    if answer["outcome"] == "would publish":
        title = (
            f"{best.path.name} to {target.repo_id} ({'private' if target.private else 'public'}):"
        )
        return [title, *(f"  {name}" for name in answer["files"])]
    if answer["outcome"] == "refused":
        raise PushFailedError(f"not published to {target.repo_id}: {answer['reason']}")
    verb = "published" if answer["outcome"] == "published" else "already there"
    return [f"{target.repo_id}: {verb}, step {answer['step']}, commit {answer['commit'][:8]}"]
