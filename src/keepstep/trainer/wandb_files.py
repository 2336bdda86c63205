"""What W&B's offline files hold of a run. W&B (0.31) writes them in blocks of 32 KiB, and a process
that is killed takes along what it had not written, however long ago it was logged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7  # of a log as LevelDB has it; the file begins with a header of that size
WHOLE, LAST = 1, 4  # kinds of parts that end a record


def newest_step(folder: Path, run_id: str, own: Path, name: str) -> int | None:
    """The greatest value of `name` in the rows of the newest attempt that has written any; -1: none
    has. None: there are no files of this run.

    Args:
        folder: `wandb`, with a folder for each attempt.
        own: this attempt's file.
    """
    files = [f for f in folder.glob(f"offline-run-*-{run_id}*/run-{run_id}.wandb") if f != own]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        steps = [int(row[name]) for row in rows(file) if name in row]
        if steps:
            return max(steps)
    return -1 if files else None


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def records(data: bytes) -> Iterator[bytes]:
    """Whole records; the last one may be torn."""
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind == 0 or place > len(data):
            return
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
