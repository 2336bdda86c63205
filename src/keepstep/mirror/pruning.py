"""What of a run's mirror is to go."""

from __future__ import annotations

from collections.abc import Collection

from keepstep.mirror.listing import Listed, look
from keepstep.mirror.owners import Owner, check
from keepstep.mirror.store import Store
from keepstep.policy.manifest import MANIFEST_NAME
from keepstep.policy.mirror import claims_left, folder_of, left_behind
from keepstep.policy.retention import Policy, plan_retention
from keepstep.run_folder.reader import RunFolder


def prune(
    store: Store,
    owner: Owner,
    run: RunFolder,
    policy: Policy,
    pinned: Collection[int],
    listed: Listed | None = None,
    coming: Collection[int] = (),
) -> list[int]:
    """Remove what the run's retention does not keep, and what uploads left that never ended.

    A checkpoint's manifest goes first: from then on it is not there. Nothing goes before what takes
    its place is whole.

    Args:
        listed: what is there now; None: that is looked up.
        coming: steps that this owner still sends: another machine's part may be there already.

    Returns:
        The steps that went.

    Raises:
        StoreError: of the store; DeposedError: another machine has the run.
    """
    listed = listed or look(store)
    names = listed.names
    records = run.records_of(list(listed.found.values()), pinned, policy.metric)
    gone = [d.step for d in plan_retention(records, policy) if not d.keep]
    check(store, owner)
    for step in gone:
        folder = listed.copies[step].folder
        store.delete([f"{folder}/{MANIFEST_NAME}"])
        store.delete(sorted(name for name in names if name.startswith(f"{folder}/")))
    awaited = {folder_of(step, owner.number, owner.token) for step in coming}
    for folder, objects in left_behind(names, owner.number, listed.copies.values()).items():
        if folder in awaited:
            continue
        if objects[0] == f"{folder}/{MANIFEST_NAME}":
            store.delete(objects[:1])
            store.delete(objects[1:])
        elif not _is_there(store, folder):
            store.delete(objects)
    store.delete(claims_left(names, owner.number))
    return gone


def _is_there(store: Store, folder: str) -> bool:
    """Whether a folder has a manifest though the listing does not show it: listings may lag."""
    try:
        store.get(f"{folder}/{MANIFEST_NAME}")
    except FileNotFoundError:
        return False
    return True
