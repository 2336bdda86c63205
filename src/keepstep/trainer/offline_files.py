"""What the offline files of SwanLab and Comet hold of a run. (0.10 and 3.58.) A process that is
killed takes along what it had not written: of SwanLab up to a buffer of 8 KiB, of Comet all."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from keepstep.policy.tracking import OWN
from keepstep.trainer.wandb_files import records

Points = Iterator[tuple[int, str]]  # steps, and names


@dataclass(frozen=True)
class Newest:
    """The greatest step of the newest attempt that has written any; -1: none has.

    Attributes:
        names: what of that step is there: it may be torn.
    """

    step: int
    names: frozenset[str] = frozenset()


def newest_of_swanlab(folder: Path, run_id: str, own: Path) -> Newest | None:
    """None: there are no files of this run.

    Args:
        folder: with a folder for each attempt.
        own: this attempt's.
    """
    files = [f for f in folder.glob(f"run-*/run-{run_id}.swanlab") if f.parent != own]
    return _newest(files, _of_swanlab)


def newest_of_comet(folder: Path, key: str) -> Newest | None:
    """The same of archives, of which this attempt's, and what a killed one had begun, are empty."""
    files = list(folder.glob(f"{key}*.zip"))
    return _newest(files, _of_comet) if len(files) > 1 else None


def _newest(files: list[Path], points_of: Callable[[Path], Points]) -> Newest | None:
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        points = [(step, name) for step, name in points_of(file) if not name.startswith(OWN)]
        if points:
            newest = max(points)[0]
            return Newest(newest, frozenset(name for step, name in points if step == newest))
    return Newest(-1) if files else None


def _of_swanlab(file: Path) -> Points:
    kinds = import_module("swanlab.proto.swanlab.record.v1.record_pb2")  # no dependency
    for data in records(file.read_bytes()):
        record = kinds.Record()
        record.ParseFromString(data)
        if record.HasField("scalar"):
            yield int(record.scalar.step), record.scalar.key


def _of_comet(file: Path) -> Points:
    try:
        with zipfile.ZipFile(file) as archive:
            lines = archive.read("messages.json").splitlines()
    except (KeyError, zipfile.BadZipFile):
        return
    for line in lines:
        message = json.loads(line)
        if message.get("type") == "metric_msg":
            metric = message["payload"]["metric"]
            if metric.get("step") is not None:
                yield int(metric["step"]), metric["metricName"]
