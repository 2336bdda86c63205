"""A run's history beside its checkpoints on a mirror: what a new machine needs of the run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from keepstep.mirror.store import Store
from keepstep.policy.mirrored import RETENTION, history_in, retention_text
from keepstep.policy.retention import Policy
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage


def history_to_send(run: RunFolder, policy: Policy, pinned: Collection[int]) -> dict[str, bytes]:
    """The history as it is now, and what the mirror is to keep: object's name → content."""
    there = {name: path.read_bytes() for name, path in _files(run).items() if path.exists()}
    return {**there, RETENTION: retention_text(policy, pinned)}


def take_history(run: RunFolder, storage: Storage, store: Store, names: Iterable[str]) -> None:
    """Into a folder that has none of its own.

    Raises:
        StoreError: of the store.
        OSError: of the disk.
    """
    if run.run_id() is not None:
        return
    newest = history_in(names)  # an owner may have been killed before its own was complete
    for name, path in _files(run).items():
        if name in newest:
            storage.replace(path, store.get(newest[name]))


def _files(run: RunFolder) -> dict[str, Path]:
    """run.json is the last: with it a folder is the run's."""
    return {
        "samples.jsonl": run.samples_file,
        "trackers.json": run.trackers,
        "events.jsonl": run.events,
        "run.json": run.identity,
    }
