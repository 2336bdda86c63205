"""A run's history beside its checkpoints on a mirror: what a new machine needs of the run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from keepstep.mirror.store import Store
from keepstep.policy.mirrored import RETENTION, history_in, retention_text
from keepstep.policy.retention import Policy
from keepstep.run_folder.events import read_lines
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage


def history_to_send(run: RunFolder, policy: Policy, pinned: Collection[int]) -> dict[str, bytes]:
    """The history as it is now, and what the mirror is to keep: object's name → content."""
    there = {name: path.read_bytes() for name, path in run.history().items() if path.exists()}
    return {**there, RETENTION: retention_text(policy, pinned)}


def take_history(run: RunFolder, storage: Storage, store: Store, names: Iterable[str]) -> None:
    """Into a folder that has none of its own, or is behind: another machine has had the run
    meanwhile, or has been the one that writes it down. Of a log that is behind, what the run has
    gone back from is unknown, and would be gone on from.

    Raises:
        StoreError: of the store.
        OSError: of the disk.
    """
    newest = history_in(names)  # an owner may have been killed before its own was complete
    files = run.history()
    if run.run_id() is not None:
        if not _is_behind(run, store, newest.get(run.events.name)):
            return
        del files[run.identity.name]
    for name, path in files.items():
        if name in newest:
            storage.replace(path, store.get(newest[name]))


def _is_behind(run: RunFolder, store: Store, log: str | None) -> bool:
    """Whether there are later attempts in the log that is on the mirror."""
    if log is None:
        return False
    there, _ = read_lines(store.get(log).decode(errors="replace"))
    return _last_attempt(there) > _last_attempt(run.log())


def _last_attempt(events: Iterable[Mapping[str, Any]]) -> int:
    return max((event["attempt"] for event in events), default=0)
