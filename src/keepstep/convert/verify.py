"""Whether an export is what its checkpoint holds: read back from the disk, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from keepstep.convert.companions import companions
from keepstep.convert.export import (
    PRECISIONS,
    ExportError,
    FileWeights,
    as_written,
    contents,
    is_weights,
    open_weights,
)
from keepstep.run_folder.contents import digest_of, names_under
from keepstep.run_folder.files import CHUNK
from keepstep.run_folder.listed import only_listed
from keepstep.run_folder.reader import Checkpoint
from keepstep.save.snapshot_memory import aligned

Progress = Callable[[int, int], None]


def digests_under(folder: Path) -> dict[str, str]:
    """Every file below a folder: path relative to it → xxh3-128 of its content."""
    return {name: digest_of(folder / name) for name in sorted(names_under(folder))}


def verify_export(
    checkpoint: Checkpoint, folder: Path, dtype: str | None, progress: Progress
) -> None:
    """Compare every tensor, bit by bit, and every other file.

    Raises:
        ExportError: they differ.
    """
    with only_listed(checkpoint) as shown:
        source, _ = open_weights(checkpoint, shown, dtype)
        written = weights_in(folder)
        wanted = {name: as_written(entry, dtype) for name, entry in source.entries.items()}
        if written.entries != wanted:
            odd = sorted(name for name in {*wanted, *written.entries})
            odd = [name for name in odd if wanted.get(name) != written.entries.get(name)]
            raise ExportError(f"{folder}: other tensors than exported: {odd[0]}", path=folder)
        total, done = sum(entry.nbytes for entry in wanted.values()), 0
        memory, other = aligned(CHUNK), aligned(CHUNK)
        for name, entry in wanted.items():
            pairs = zip(
                contents(source, name, entry, memory),
                contents(written, name, entry, other),
                strict=True,
            )
            for ours, theirs in pairs:
                if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                    raise ExportError(f"{folder}: {name} is not what was exported", path=folder)
                done += ours.nbytes
                progress(done, total)
    expected = companions(checkpoint, dtype and str(PRECISIONS[dtype]))
    for name, content in expected.items():
        if (folder / name).read_bytes() != content:
            raise ExportError(f"{folder}: {name} is not what was exported", path=folder)


def verify_merged(folder: Path, progress: Progress) -> None:
    """Read every tensor of a merged model; its weights are nowhere else to be compared with.

    Raises:
        ExportError: one cannot be read, or is not finite.
    """
    written, memory = weights_in(folder), aligned(CHUNK)
    if not written.entries:
        raise ExportError(f"{folder} holds no weights", path=folder)
    total, done = sum(entry.nbytes for entry in written.entries.values()), 0
    for name, entry in written.entries.items():
        for part in contents(written, name, entry, memory):
            if entry.dtype.is_floating_point and not part.isfinite().all():
                raise ExportError(f"{folder}: {name} is not finite", path=folder)
            done += part.nbytes
            progress(done, total)


def weights_in(folder: Path) -> FileWeights:
    """Raises: ExportError: a file is none that can be loaded."""
    paths = sorted(folder / name for name in names_under(folder) if is_weights(name))
    for path in paths:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path} cannot be loaded: {error}", path=path) from error
    return FileWeights(paths)
