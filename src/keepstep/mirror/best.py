"""The best checkpoint comes along with the newest: on a new machine, too, a run ends with it, and
publishes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from keepstep.mirror.download import fetch
from keepstep.mirror.listing import Listed
from keepstep.mirror.store import Store
from keepstep.output.progress import Tell, nobody
from keepstep.policy.manifest import folder_name
from keepstep.policy.retention import Policy, best_step, plan_retention
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage


def bring_best(
    run: RunFolder,
    storage: Storage,
    store: Store,
    staging: Path,
    policy: Policy,
    listed: Listed,
    tell: Tell = nobody,
) -> Checkpoint | None:
    """The best of all checkpoints on disk and mirror into the run folder, if that lacks it, and
    would keep it. (What it holds already is known: see `download.bring`.)

    Args:
        staging: a folder of the run that a later attempt sweeps.
        policy: the run folder's.
        listed: what is on the mirror.
        tell: how far it is.

    Returns:
        It; None: it is there, nothing ranks, or the next save would prune it.

    Raises:
        StoreError, TextError: it cannot be had.
        OSError: of the disk.
    """
    here = {checkpoint.step: checkpoint for checkpoint in run.checkpoints()}
    all_of_them = {**listed.found, **here}
    records = run.records_of(list(all_of_them.values()), run.pinned(), policy.metric)
    best = best_step(records, policy)
    kept = {decision.step for decision in plan_retention(records, policy) if decision.keep}
    target = run.path / folder_name(best or 0)
    if best is None or best not in kept or best not in listed.copies or target.exists():
        return None
    fetched = fetch(store, listed.copies[best], staging / target.name, storage, tell=tell)
    storage.rename(fetched.path, target)
    return replace(fetched, path=target)
