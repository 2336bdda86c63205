"""One push: the pattern that survived every fault tried. Runs in a process of its own (push.py).

HEAD is read, our weights compared with those there, and everything is sent as one commit on top of
it; after any doubt (conflict, server error, lost answer) HEAD is read again. What is there already
is compared file by file, and mended if it has come to harm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
)

from keepstep.hub.client import HubError, brief, with_patience
from keepstep.hub.sending import Sending
from keepstep.output.printable import first_few
from keepstep.publish.best import Best
from keepstep.publish.card import license_of
from keepstep.publish.remote import CARD, Ours, Remote, Target, doubt_of, files_at, look


@dataclass(frozen=True)
class Pushed:
    """What came of a push.

    Attributes:
        outcome: published; present (all of it was there already); mended (the weights were those,
            and what differed beside them, or of them, is as it should be now); or refused (what is
            there is no worse).
        commit: the repository's HEAD with these weights, or with the better ones.
        step: of the weights that are there now.
        private: whether the repository is hidden from others.
        reason: why refused.
        mended: the files.
    """

    outcome: str
    commit: str
    step: int
    private: bool
    reason: str = ""
    mended: list[str] = field(default_factory=list)


def check(
    api: HfApi, target: Target, card: dict[str, Any], base: str | None, until: float = math.inf
) -> dict[str, Any]:
    """That we may write there; the repository is made if it does not exist.

    Args:
        card: metadata that were asked for; the Hub says whether it takes them.
        base: Hub name of the base model.
        until: when the time for it is over; on the monotonic clock, in seconds.

    Returns: `theirs`: what is published there already; `doubt`: why nothing would take its place
        unasked; `private`: it is hidden from others; `license` of the base model, if its card names
        one; `license_fault`: why that could not be read.

    Raises:
        HubError: the token, the name or the metadata are wrong.
    """

    def see() -> dict[str, Any]:
        api.whoami()
        remote = look(api, target)
        api.auth_check(target.repo_id, write=True)
        ModelCard(f"---\n{ModelCardData(**card).to_yaml()}\n---\n").validate()
        return {
            "theirs": remote.best and asdict(remote.best),
            "doubt": doubt_of(remote),
            "private": remote.private,
        }

    seen = with_patience(target.repo_id, see, tries=3, until=until)
    return {**seen, **_license(base, until)}


def push(
    api: HfApi,
    target: Target,
    folder: Path,
    best: Best,
    card_asked: bool = False,
    until: float = math.inf,
    sending: Sending | None = None,
) -> Pushed:
    """Make `folder`'s files the ones of the repository's main branch, unless better ones are there.

    Args:
        card_asked: somebody has asked for this card now: it takes the place of what people have
            written there, also beside weights that are there already.
        until: when the time for it is over; on the monotonic clock, in seconds.
        sending: counts what is sent.

    Raises:
        HubError: it could not be done.
    """
    ours, tries, sending = Ours(folder, best), 0, sending or Sending()

    def once() -> Pushed:
        nonlocal tries
        tries += 1
        remote = look(api, target)
        verdict = best.compare(remote.best)
        if not target.force and (reason := _refusal(best, remote, ours)):
            raise HubError(f"{target.repo_id}: {reason}", fatal=True)
        if verdict == "theirs" and remote.best is not None and doubt_of(remote) is None:
            step, reason = remote.best.global_step, _better(best, remote.best)
            return Pushed("refused", remote.head, step, remote.private, reason)
        again = verdict == "same"
        changed, stale = ours.differing(remote.files), ours.stale(remote.files)
        if again and not target.force:
            changed = [n for n in changed if not _is_theirs(n, best, remote, card_asked)]
        if again and not changed and not stale:
            outcome = "published" if tries > 1 else "present"
            return Pushed(outcome, remote.head, best.global_step, remote.private)
        with sending.counted():
            info = api.create_commit(
                target.repo_id,
                [
                    *(sending.add(name, folder / name) for name in changed),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=_title(best, changed + stale if again else ()),
                commit_description=f"run {best.run_id}, by keepstep",
                parent_commit=remote.head,
            )
        _verify(api, target, ours, changed, info.oid)
        outcome, mended = ("mended", changed + stale) if again else ("published", [])
        return Pushed(outcome, info.oid, best.global_step, remote.private, mended=mended)

    return with_patience(target.repo_id, once, until=until)


def _license(base: str | None, until: float) -> dict[str, str | None]:
    """What the base model's card says; that it cannot be read ends nothing."""
    try:
        found = None
        if base is not None:
            found = with_patience(base, lambda: license_of(base), tries=3, until=until)
    except HubError as error:
        return {"license": None, "license_fault": brief(error.__cause__ or error)}
    return {"license": found, "license_fault": None}


def _verify(api: HfApi, target: Target, ours: Ours, names: Iterable[str], revision: str) -> None:
    """These files are there, byte for byte.

    Raises:
        OSError: one is not.
    """
    there = files_at(api, target, revision)
    for name in names:
        if not ours.is_same(name, there.get(name)):
            raise OSError(f"{name} at {revision[:8]} is not what was sent")


def _title(best: Best, mended: Sequence[str]) -> str:
    title = f"Step {best.global_step}"
    if best.metric is not None and best.value is not None:
        title += f": {best.metric} {best.value:.4f}"
    return f"{title} (mended: {first_few(mended)})" if mended else title


def _is_theirs(name: str, best: Best, remote: Remote, card_asked: bool) -> bool:
    """Whether a text beside weights that are ours is left as it is: people write into the card, and
    another run may have made the same weights."""
    if name == CARD:
        return CARD in remote.files and not card_asked
    return name.startswith("training/") and remote.best != best


def _refusal(best: Best, remote: Remote, ours: Ours) -> str | None:
    """Why nothing takes the place of what is there unasked; None: it is worse, or ours."""
    verdict = best.compare(remote.best)
    if verdict == "same":
        return None
    what = None if verdict == "ours" and remote.best is not None else doubt_of(remote, ours)
    if what is None and verdict == "unlike" and remote.best is not None:
        what = (
            f"{_said(remote.best)} is there, which cannot be compared with {_score(best)}: "
            "another metric, other evaluation rows or another base model"
        )
    advice = "Name another repository, or let `keepstep push --force` take its place"
    return f"{what}. {advice}" if what else None


def _better(best: Best, theirs: Best) -> str:
    return f"{_said(theirs)} is there, which is no worse than {_score(best)}"


def _said(best: Best) -> str:
    return f"step {best.global_step} of run {best.run_id} ({_score(best)})"


def _score(best: Best) -> str:
    return "no metric" if best.value is None else f"{best.metric} {best.value:.4f}"
