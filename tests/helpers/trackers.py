"""What trackers hold, read by their own means: TensorBoard's reader, W&B's records, and the local
stores of MLflow and trackio."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

from keepstep.trainer.wandb_files import records
from tests.helpers.waiting import PATIENCE


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve of a folder, as TensorBoard shows it: name → (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = read.Tags()["scalars"]
    return {name: [(p.step, p.value) for p in read.Scalars(name)] for name in names}


def wandb_rows(folder: Path, killed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """The rows of all offline files in a folder, oldest first: run id → rows. A process of W&B's
    own writes them, and goes on when the run's has ended: all but those `killed` get an end."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + PATIENCE
    while True:
        rows: dict[str, list[dict[str, Any]]] = {}
        own, open_ones = [], 0
        for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
            open_ones += 1
            for data in records(file.read_bytes()):
                record = Record()
                record.ParseFromString(data)
                what = record.WhichOneof("record_type")
                if what == "run":
                    own = rows.setdefault(record.run.run_id, [])
                elif what == "history":
                    items = record.history.item
                    named = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                    own.append(named)
                open_ones -= what == "exit"
        if open_ones <= killed or time.monotonic() > deadline:
            return rows
        time.sleep(0.05)


def mlflow_points(store: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Each metric of each run: the run's tag → name → (step, value)."""
    from mlflow import MlflowClient

    client, found = MlflowClient(store), {}
    for run in client.search_runs(["0"]):
        names = run.data.metrics
        points = {n: client.get_metric_history(run.info.run_id, n) for n in names}
        found[run.data.tags["keepstep.run"]] = {
            name: sorted((p.step, p.value) for p in of) for name, of in points.items()
        }
    return found


def trackio_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each run: name → rows."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in folder.glob("*.db"):
        with sqlite3.connect(file) as database:
            for name, values in database.execute("SELECT run_name, metrics FROM metrics"):
                rows.setdefault(name, []).append(json.loads(values))
    return rows


def steps_of(rows: list[dict[str, Any]], name: str) -> list[int]:
    """The steps that have a value of this name."""
    return [int(row["train/global_step"]) for row in rows if name in row]


def twice(steps: list[int]) -> list[int]:
    return [step for step, count in Counter(steps).items() if count > 1]
