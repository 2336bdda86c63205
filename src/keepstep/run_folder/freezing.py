"""A second name for each file of a checkpoint, so that pruning cannot take the bytes away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from keepstep.policy.manifest import MANIFEST_NAME
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.contents import sizes_of
from keepstep.run_folder.storage import Storage


def freeze(
    checkpoint: Checkpoint,
    folder: Path,
    storage: Storage,
    wanted: Sequence[str],
    copy: bool = False,
) -> Checkpoint:
    """These files of `checkpoint`, in `folder`, a new one.

    `copy`: where the file system has no second names, copy; that may take long.

    Raises:
        OSError: as of a checkpoint that has just been pruned.
    """
    manifest = checkpoint.manifest
    sizes = sizes_of(checkpoint.path, wanted)
    for name in sizes:
        if sizes[name] is None:
            raise OSError(f"{name} of step {checkpoint.step} is no regular file")
    if folder.exists():
        storage.remove(folder)
    for name in wanted:
        storage.make_folder((folder / name).parent)
        storage.link(checkpoint.path / name, folder / name, or_copy=copy)
    files = {name: manifest.files[name] for name in wanted}
    frozen = replace(manifest, files=files, metrics=checkpoint.metrics)
    storage.write(folder / MANIFEST_NAME, frozen.to_json().encode())
    return Checkpoint(folder, frozen)
