"""`keepstep export URL`: fetched beside the target, compared, exported as from a disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from keepstep.cli import on_mirror
from keepstep.cli.common import console, ended_by_signals
from keepstep.output.terminal import progress_bar
from keepstep.output.units import counted, human_bytes
from keepstep.run_folder.storage import Storage

if TYPE_CHECKING:
    from keepstep.convert.export import Exported


def export_from_mirror(
    url: str, to: Path, *, dtype: str | None, max_shard_size: str, merge_adapter: bool
) -> None:
    """
    Raises:
        ExportError: it cannot be done; `to` does not exist then, nor what was fetched.
        OSError: of the disk.
    """
    from keepstep.convert.api import export_intact
    from keepstep.convert.export import ExportError, check_request, files_for
    from keepstep.mirror.exporting import bytes_for_export, fetch_for_export
    from keepstep.mirror.fetching import room_for, scratch_folder

    check_request(to, dtype, max_shard_size)
    precision = "fp32" if merge_adapter else dtype  # in which it is merged
    with ended_by_signals(), on_mirror.looking(url) as found:
        run, source, storage = found.one_run(), found.checkpoint(), Storage()
        name, manifest = source.path.name, source.manifest
        if merge_adapter and not manifest.adapter:
            raise ExportError(f"{name} is a whole model: there is nothing to merge")
        total = sum(entry.bytes for entry in files_for(manifest).values())
        place = to.with_name(f".{to.name}.fetched")
        with room_for(bytes_for_export(manifest), to), scratch_folder(place, storage) as scratch:
            with on_mirror.reading(run, total, f"fetching {name}"):
                fetched, whole = fetch_for_export(
                    run, source.step, precision, scratch / name, storage
                )
            if whole:
                _export_apart(fetched.path, to, dtype, max_shard_size, merge_adapter)
                return
            with progress_bar(console, f"exporting {name}") as progress:
                asked: Any = {"dtype": dtype, "max_shard_size": max_shard_size}
                made = export_intact(fetched, to, merge_adapter, **asked, progress=progress)
    tell_exported(to, made)


def tell_exported(to: Path, made: Exported) -> None:
    """What an export has written."""
    size = human_bytes(sum(made.files.values()))
    console.tell(f"{to}: {counted(len(made.files), 'file')}, {size}, {made.dtype}")


def _export_apart(
    checkpoint: Path, to: Path, dtype: str | None, max_shard_size: str, merge_adapter: bool
) -> None:
    """By a process of its own: shards are unpickled, and this one knows the store's credentials."""
    flags = ["--to", str(to), "--max_shard_size", max_shard_size]
    flags += [] if dtype is None else ["--dtype", dtype]
    flags += ["--merge_adapter"] if merge_adapter else []
    code = "from keepstep.cli import command; command()"
    child = subprocess.Popen([sys.executable, "-c", code, "export", str(checkpoint), *flags])
    try:
        status = child.wait()
    except BaseException:
        child.terminate()  # it puts away what it has begun
        child.wait()
        raise
    if status:
        raise typer.Exit(status)
