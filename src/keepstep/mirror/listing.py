"""What a run's mirror holds, and what of it is to go."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from keepstep.mirror.store import Entry, Store
from keepstep.mirror.upload import Owner, check
from keepstep.policy.manifest import MANIFEST_NAME, Manifest, ManifestError
from keepstep.policy.mirror import Copied, copied, left_behind
from keepstep.policy.retention import Policy, plan_retention
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.reader import RunFolder


def checkpoints_on(
    store: Store, names: Mapping[str, Entry]
) -> tuple[dict[int, Checkpoint], dict[str, str]]:
    """By step, with their manifests; and those whose manifest cannot be taken: folder → why.

    Raises:
        StoreError: of the store.
    """
    found: dict[int, Checkpoint] = {}
    unreadable: dict[str, str] = {}
    for one in copied(names):
        try:
            manifest, _ = manifest_of(store, one)
        except (ManifestError, FileNotFoundError) as error:  # the newest owner takes it away
            unreadable[one.folder] = str(error)
        else:
            found[one.step] = Checkpoint(Path(one.folder), manifest)
    return found, unreadable


def manifest_of(store: Store, one: Copied) -> tuple[Manifest, bytes]:
    """It, and its text.

    Raises:
        ManifestError: it is not what was written.
    """
    text = store.get(f"{one.folder}/{MANIFEST_NAME}")
    manifest = Manifest.from_json(text.decode(errors="replace"))
    if manifest.global_step != one.step:
        raise ManifestError(f"{one.folder} is of step {manifest.global_step}")
    return manifest, text


def prune(
    store: Store, owner: Owner, run: RunFolder, policy: Policy, pinned: Collection[int]
) -> list[int]:
    """Remove what the run's retention does not keep, and what uploads of earlier owners left.

    A checkpoint's manifest goes first: from then on it is not there. Nothing goes before what takes
    its place is whole.

    Returns:
        The steps that went.

    Raises:
        StoreError: of the store; DeposedError: another machine has the run.
    """
    names = store.names()
    found, _ = checkpoints_on(store, names)
    records = run.records_of(list(found.values()), pinned, policy.metric)
    gone = [d.step for d in plan_retention(records, policy) if not d.keep]
    check(store, owner)
    for step in gone:
        folder = str(found[step].path)
        store.delete([f"{folder}/{MANIFEST_NAME}"])
        store.delete(sorted(name for name in names if name.startswith(f"{folder}/")))
    store.delete(left_behind(names, owner.number))
    return gone
