"""What an export needs of a checkpoint on a mirror: its weights files or, without, all of it."""

from __future__ import annotations

from pathlib import Path

from keepstep.convert.export import files_for, is_weights, shards_are_wanted
from keepstep.mirror.fetching import fetch_files, fetch_whole
from keepstep.mirror.view import MirroredRun
from keepstep.policy.manifest import Manifest
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.storage import Storage


def fetch_for_export(
    run: MirroredRun, step: int, dtype: str | None, folder: Path, storage: Storage
) -> tuple[Checkpoint, bool]:
    """It in `folder`, each file compared with its digest.

    Args:
        dtype: that is asked for: where the weights files are less precise, the shards are read.

    Returns:
        The checkpoint, and whether it is there as a whole: its shards have to be unpickled.

    Raises:
        StoreError, TextError: it is not what was written.
        ExportError: its weights files are not understood.
        OSError: of the disk.
    """
    manifest = run.checkpoint_at(step).manifest
    wanted = files_for(manifest)
    if wanted != manifest.files:
        found = fetch_files(run, step, wanted, folder, storage)
        if not shards_are_wanted(found, dtype):
            return found, False
        storage.remove(folder)
    return fetch_whole(run, step, folder, storage), True


def bytes_for_export(manifest: Manifest) -> int:
    """Room that it takes on the disk: what is fetched and, as far as that is known, written."""
    files = files_for(manifest)
    weights = sum(entry.bytes for name, entry in files.items() if is_weights(name))
    return sum(entry.bytes for entry in files.values()) + weights
