"""What `keepstep evaluate` has measured since a checkpoint was copied: a small object beside its
manifest, which stays as it is. Objects never change: what is measured later is a further object,
and holds all that was known. No owner is asked, since nothing that is there is touched.
"""

from __future__ import annotations

from collections.abc import Mapping

from keepstep.mirror.listing import later_evaluations, manifest_of
from keepstep.mirror.owners import there
from keepstep.mirror.store import Entry, Store
from keepstep.policy.manifest import ManifestError
from keepstep.policy.mirror import Copied, evaluations_of, next_evaluations
from keepstep.policy.strict import TextError
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.evaluations import (
    EVALUATIONS_NAME,
    evaluations_in,
    evaluations_text,
    is_same_checkpoint,
)
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import OddFileError, read_text


def send_evaluations(store: Store, run: RunFolder) -> list[int]:
    """Tell the mirror what the run folder knows of checkpoints that are on both.

    Returns:
        The steps of which something new was told.

    Raises:
        StoreError: of the store.
    """
    measured = {c.step: c for c in run.checkpoints() if c.evaluated}
    names = store.names() if measured else {}
    known = [one for one in there(store, names) if one.step in measured]
    return [one.step for one in known if _send(store, names, one, measured[one.step])]


def _send(store: Store, names: Mapping[str, Entry], one: Copied, checkpoint: Checkpoint) -> bool:
    try:
        manifest, _ = manifest_of(store, one)
        text = read_text(checkpoint.path / EVALUATIONS_NAME)
        metrics, rows = evaluations_in(text, checkpoint.manifest)
    except (ManifestError, FileNotFoundError, OddFileError, TextError):
        return False  # one of them was pruned, or is damaged: others tell that
    if not is_same_checkpoint(manifest, checkpoint.manifest):
        return False
    known = evaluations_of(one.folder, names)
    while True:
        before = later_evaluations(store, one.folder, known, manifest)
        told = ({}, {}) if before is None else evaluations_in(before.decode(), manifest)
        all_metrics, all_rows = manifest.metrics | told[0], told[1]
        if all_metrics | metrics == all_metrics and all_rows | rows == all_rows:
            return False
        content = evaluations_text(manifest, told[0] | metrics, told[1] | rows)
        name = next_evaluations(one.folder, known)
        if store.create(name, content):
            return True
        known = [name, *known]  # somebody else was faster: to what that says this is added
