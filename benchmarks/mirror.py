"""What a mirror costs training, and how fast it is filled.

    python benchmarks/mirror.py --parameters 30 --rounds 3

trains a random Llama on 2 processes (ZeRO-3 on CPU), with a mirror and without, each in a launch of
its own, in turn; the store is an S3 server on the loopback, kept in memory by a process beside,
which stands for another machine, and so is given what training leaves of the same cores (by the
idle class, and by its session's share where the kernel has autogroups). Then one of the checkpoints
is uploaded by a plain client (obstore's own multipart upload, nothing compared) and by keepstep, in
turn.

`stall`: seconds that training stands still for a save; `step`: seconds of a step between the first
and the last save, saves included; `upload`: MB a second; `processor`: seconds of the uploader's, a
GB. Medians, their range, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu import launches
from benchmarks.gpu.inputs import SHAPES, make_inputs

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds of a launch
ARMS = ("without", "with")
SERVER = """
import contextlib, os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
with contextlib.suppress(OSError):  # ranks have sessions of their own
    open("/proc/self/autogroup", "w").write("19")
from tests.mirror.server import S3Server
print(S3Server().url, flush=True)
sys.stdin.read()
"""


def main() -> None:
    arguments = parse()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    values: dict[str, list[float]] = defaultdict(list)
    try:
        make_inputs(folder, SHAPES[arguments.parameters])
        with server() as environment:
            for turn in range(arguments.rounds):
                for arm in ARMS:
                    mirror = f"s3://bucket/{turn}" if arm == "with" else None
                    for name, value in launched(arguments, folder / arm, mirror, environment):
                        values[f"{name}, {arm}"].append(value)
            os.environ.update(environment)
            for turn in range(arguments.rounds):
                for name, value in uploaded(folder / "with", f"s3://bucket/uploads-{turn}"):
                    values[name].append(value)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tell(arguments, values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, choices=SHAPES, default=30, help="millions")
    parser.add_argument("--processes", type=int, default=2, help="of a launch")
    parser.add_argument("--steps", type=int, default=40, help="of a launch")
    parser.add_argument("--every", type=int, default=10, help="steps from save to save")
    parser.add_argument("--rounds", type=int, default=3, help="launches of each kind, uploads too")
    parser.add_argument("--folder", type=Path, default=Path("mirror.tmp"), help="is deleted")
    parser.add_argument("--json", type=Path, help="file that the result is added to")
    return parser.parse_args()


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """A store, and what a user of it has set."""
    paths = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield {
            "AWS_ENDPOINT_URL": process.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
    finally:
        process.communicate("", timeout=TIMEOUT)


def launched(
    arguments: argparse.Namespace, run: Path, mirror: str | None, environment: Mapping[str, str]
) -> Iterator[tuple[str, float]]:
    """One run to its end: (what, seconds)."""
    shutil.rmtree(run, ignore_errors=True)
    fields: dict[str, object] = {
        **{"dtype": "float32", "bf16": False, "max_length": 32, "per_device_train_batch_size": 1},
        **{"max_steps": arguments.steps, "save_steps": arguments.every, "save_total_limit": 2},
        **({"mirror": mirror} if mirror else {}),
    }
    words = ["-m", "keepstep.train", *launches.flags(run.parent, run, fields)]
    command = launches.launch_command("zero3", True, *words, processes=arguments.processes)
    launches.run(command, run.with_suffix(".log"), True, TIMEOUT, variables=environment)
    lines = (run / ".keepstep/events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    commits = [event for event in events if event["event"] == "commit"]
    copies = [event for event in events if event["event"] == "mirror"]
    if any("error" in event for event in copies) or bool(copies) != (mirror is not None):
        sys.exit(f"copies that are not there: {copies}")
    for event in commits[:-1]:  # the last one is made in the foreground
        yield "stall", event["stall"]
    begin, end = (datetime.fromisoformat(commits[n]["time"]) for n in (0, -2))
    yield "step", (end - begin).total_seconds() / (commits[-2]["step"] - commits[0]["step"])


def uploaded(run: Path, url: str) -> Iterator[tuple[str, float]]:
    """The run's newest checkpoint: (what and by whom, MB/s or processor seconds a GB)."""
    import obstore

    from keepstep.mirror.object_store import ObjectStore
    from keepstep.mirror.owners import claim
    from keepstep.mirror.stores import open_store
    from keepstep.mirror.upload import Upload
    from keepstep.run_folder.reader import RunFolder

    newest = RunFolder(run).latest()
    assert newest is not None
    size = newest.manifest.total_bytes / 1e6
    plain, ours = open_store(f"{url}/plain"), open_store(f"{url}/keepstep")
    began, used = time.perf_counter(), time.process_time()
    assert isinstance(plain, ObjectStore)
    for name in newest.manifest.files:
        obstore.put(plain._writes, name, newest.path / name)
    yield "upload, plain", size / (time.perf_counter() - began)
    yield "processor, plain", (time.process_time() - used) / size * 1e3
    began, used = time.perf_counter(), time.process_time()
    Upload(ours, claim(ours, "0123456789ab"), newest).run({})
    yield "upload, keepstep", size / (time.perf_counter() - began)
    yield "processor, keepstep", (time.process_time() - used) / size * 1e3


def tell(arguments: argparse.Namespace, values: Mapping[str, list[float]]) -> None:
    """Print medians, ranges and ratios; the same as one JSON line."""
    print(f"{arguments.parameters} M parameters, ZeRO-3, {arguments.processes} processes")
    summary: dict[str, Any] = {n: getattr(arguments, n) for n in ("parameters", "rounds", "steps")}
    for name, (first, second) in {
        "stall": ARMS,
        "step": ARMS,
        "upload": ("plain", "keepstep"),
        "processor": ("plain", "keepstep"),
    }.items():
        unit = {"upload": " MB/s", "processor": " s/GB"}.get(name, " s")
        medians = []
        for arm in (first, second):
            found = values[f"{name}, {arm}"]
            medians.append(statistics.median(found))
            summary[f"{name}, {arm}"] = [medians[-1], min(found), max(found)]
            told = f"({min(found):.3f} to {max(found):.3f})"
            print(f"{f'{name}, {arm}':22} {medians[-1]:9.3f}{unit}  {told}")
        summary[f"{name}, ratio"] = medians[1] / medians[0]
        print(f"{f'{name}, ratio':22} {medians[1] / medians[0]:9.3f}")
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
