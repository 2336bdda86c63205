"""`keepstep.export` and `keepstep.adopt`: the conversions as a program calls them, by path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from keepstep.convert import adopt as adopting
from keepstep.convert import export as exporting
from keepstep.convert.adopt import Adopted, AdoptError
from keepstep.convert.export import Exported
from keepstep.run_folder.checkpoint import Checkpoint
from keepstep.run_folder.reader import RunFolder

AnyPath = str | os.PathLike[str]


def export(
    checkpoint: Checkpoint | AnyPath,
    to: AnyPath,
    *,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    max_shard_size: str = "5GB",
    merge_adapter: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write a checkpoint's weights for inference: what `from_pretrained` reads, and no more.

        keepstep.export("runs/x/best", "models/x", dtype="bf16")

    The weights come from the checkpoint's weights file or, where it has none, from the optimizer's
    32 bit copies in DeepSpeed's shards. Memory does not grow with the model (it does with
    `merge_adapter`: the base model is loaded whole, on the CPU).

    Args:
        checkpoint: of a run, or its path: `RUN/checkpoint-500`, `RUN/best`, `RUN/latest`.
        to: a folder that is not there yet, in no place where a run would prune it.
        dtype: of the floating point weights; None: as they are stored (fp32 in the shards).
        max_shard_size: of one file, as in `500MB`. An adapter is always one file.
        merge_adapter: write the base model with the adapter in it. The base model comes from where
            the adapter's configuration says: a folder, or the Hub.
        progress: called with the bytes written so far, and in all.

    Returns:
        The files with their sizes in bytes, and the type of most weights.

    Raises:
        DamagedError: its files are not what was written. (Digests are compared if reading every
            byte takes less than a minute; always of shards that are read.)
        ExportError: it cannot be done as asked for. `to` does not exist then.
        ManifestError: there is no committed checkpoint at the path.
        UnreadableError: it cannot be read now.
        OSError: of the disk.

    Ranks: one process alone. (It is no part of a running attempt.)
    """
    folder = Path(to)
    exporting.check_request(folder, dtype, max_shard_size)
    found = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.at(checkpoint)
    found.verify(deep=None)
    asked: Any = {"dtype": dtype, "max_shard_size": max_shard_size, "progress": progress}
    return export_intact(found, folder, merge_adapter, **asked)


def export_intact(
    checkpoint: Checkpoint, folder: Path, merge_adapter: bool, **asked: Any
) -> Exported:
    """The same of a checkpoint whose files have been compared; it may be the files alone that an
    export reads. Raises as `export`."""
    work: Callable[..., Exported] = exporting.export
    if merge_adapter:
        from keepstep.convert.merge import export_merged as work  # transformers, too
    return work(checkpoint, folder, **asked)


def adopt(path: AnyPath, into: RunFolder | AnyPath) -> Adopted:
    """Copy a checkpoint that keepstep did not write into a new run folder, and commit it there.

        keepstep.adopt("out/checkpoint-500", into="runs/x")  # a run with output_dir runs/x goes on

    Args:
        path: a stock Trainer's `checkpoint-N`, or a universal checkpoint of DeepSpeed.
        into: the run folder; no run has used it yet.

    Returns:
        The committed checkpoint, and what could not be checked, a sentence each.

    Raises:
        AdoptError: there is no checkpoint with the state to go on from, or it is damaged, or `into`
            is a run already.
        OSError: of the disk.

    Ranks: one process alone.
    """
    run = into if isinstance(into, RunFolder) else RunFolder(into)
    if not Path(path).is_dir():
        raise AdoptError(f"there is no folder {path}")
    if run.private.is_symlink():
        raise AdoptError(f"{run.private} is a link, which is not followed")
    return adopting.adopt(Path(path), run)
