"""SwanLab and Comet, offline: one tracker run over attempts that SIGKILL ends, points counted.

Where they are installed: neither is a part of the tests' environment. SwanLab brings twenty
packages, another protobuf among them; transformers imports comet_ml in every process that finds it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepstep.trainer.wandb_files import records
from tests.helpers.ranks import ROOT

ATTEMPT = """
import os, signal, sys
from pathlib import Path
from tests.trainer.test_trackers import Attempt
run, name, to, saves, how = sys.argv[1:]
attempt = Attempt(Path(run), [name])
attempt.train(int(to), saves=tuple(map(int, saves.split(","))))
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
attempt.end()
"""


def lacks(package: str) -> pytest.MarkDecorator:
    is_there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not is_there, reason=f"{package} is not installed")


def swanlab_losses(place: Path) -> Iterator[tuple[str, int]]:
    """The id of the run, and the step, of each point of the loss."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    for file in sorted(place.glob("swanlog/run-*/run-*.swanlab")):
        for data in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("scalar") and record.scalar.key == "train/loss":
                yield file.stem.removeprefix("run-"), int(record.scalar.step)


def comet_losses(place: Path) -> Iterator[tuple[str, int]]:
    for file in sorted(place.glob("comet/*.zip")):
        try:
            with zipfile.ZipFile(file) as archive:
                lines = archive.read("messages.json").splitlines()
        except (KeyError, zipfile.BadZipFile):  # a killed attempt's
            continue
        for message in map(json.loads, lines):
            metric = message["payload"].get("metric", {}) if "payload" in message else {}
            if metric.get("metricName") == "train/loss":
                yield file.name.partition("-")[0], int(metric["step"])


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        pytest.param("swanlab", swanlab_losses, marks=lacks("swanlab")),
        pytest.param("comet_ml", comet_losses, marks=lacks("comet_ml")),
    ],
)
def test_killed_and_stopped_and_killed(tmp_path: Path, name: str, losses: object) -> None:
    told = {
        "SWANLAB_MODE": "offline",
        "SWANLAB_LOG_DIR": str(tmp_path / "swanlog"),
        "SWANLAB_SAVE_DIR": str(tmp_path / "home"),
        "COMET_START_ONLINE": "false",
        "COMET_API_KEY": "none",  # transformers looks whether there is one
        "COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    given = [("5", "2,4", "killed"), ("7", "6", "killed"), ("10", "8,10", "ends")]
    given += [("13", "12", "killed"), ("16", "14,16", "ends")]
    for to, saves, how in given:
        command = [sys.executable, "-c", ATTEMPT, tmp_path / "run", name, to, saves, how]
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | told,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == (-9 if how == "killed" else 0), done.stderr
    points = list(losses(tmp_path))  # type: ignore[operator]
    assert len({run for run, _ in points}) == 1
    assert sorted(step for _, step in points) == list(range(1, 17))
