"""Passes files of a checkpoint from machines that have them to machines that lack them.

Over the control group, file by file, to all ranks at once: whoever lacks it writes it down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist

from keepstep.output.progress import added_up
from keepstep.policy.manifest import FileEntry, Manifest
from keepstep.ranks import collectives, control_group
from keepstep.ranks.console import progress
from keepstep.run_folder.storage import Storage
from keepstep.save.torch_files import bytes_of

PIECE = 32 << 20  # bytes that are under way at once


def exchange(
    manifest: Manifest,
    sources: Mapping[str, int],
    lacking: Collection[str],
    here: Path,
    into: Path | None,
    storage: Storage,
) -> None:
    """Pass on all files that some machine lacks. Ranks: all (collective).

    Args:
        sources: file → the rank that reads it.
        lacking: what this rank writes down.
        here: the checkpoint's folder on this machine.
        into: a new folder for what it writes; what is there goes. None: it lacks nothing.

    Raises:
        OSError: on every rank: what one of them met; or what came is not what was written.
    """
    wanted = sorted(set[str]().union(*collectives.gather_some(set(lacking) or None).values()))
    error: OSError | None = None
    try:
        if into is not None:
            if into.exists():
                storage.remove(into)
            storage.make_folder(into)
    except OSError as failure:  # else the others would wait for this rank
        error = failure
    piece = torch.empty(PIECE if wanted else 0, dtype=torch.uint8)
    with progress(f"passing on parts of {here.name}") as far:
        count = added_up(far, sum(manifest.files[name].bytes for name in wanted))
        for name in wanted:
            reads = here / name if sources[name] == collectives.rank() else None
            writes = into / name if into is not None and name in lacking and error is None else None
            try:
                _pass_on(manifest.files[name], sources[name], reads, writes, storage, piece, count)
            except OSError as failure:
                error = error or failure

    def tell() -> None:
        if error is not None:
            raise error

    collectives.on_all("passing on what machines lack", tell)


def _pass_on(
    entry: FileEntry,
    rank: int,
    reads: Path | None,
    writes: Path | None,
    storage: Storage,
    piece: torch.Tensor,
    count: Callable[[int], None],
) -> None:
    """One file, from `rank`; `count` is told of each piece. Ranks: all (collective); what one meets
    is raised when all pieces have gone around.

    Raises:
        OSError: of this rank's disk; or what came is not what was written.
    """
    error: OSError | None = None
    source: BinaryIO | None = None
    target = None
    with ExitStack() as opened:
        try:
            if reads is not None:
                source = opened.enter_context(open(reads, "rb"))
            if writes is not None:
                storage.make_folder(writes.parent)
                target = opened.enter_context(storage.create(writes))
        except OSError as failure:
            error = failure
        for begin in range(0, entry.bytes, PIECE):
            part = piece[: min(PIECE, entry.bytes - begin)]
            content = bytes_of(part)
            try:
                if source is not None and source.readinto(content) != len(content):  # type: ignore[attr-defined]
                    raise OSError(f"{reads} is shorter than it was written")
            except OSError as failure:
                error = error or failure
            dist.broadcast(part, rank, group=control_group.group())
            count(len(content))
            try:
                if target is not None and error is None:
                    target.write(content)
            except OSError as failure:
                error = failure
        if error is not None:
            raise error
    if target is not None and target.xxh3_128 != entry.xxh3_128:
        raise OSError(f"{writes} came from rank {rank}, and is not what was written")
