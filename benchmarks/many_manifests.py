"""How long do listing and selection take with thousands of checkpoints?

    python benchmarks/many_manifests.py 10000 --rounds 5

Writes so many committed checkpoints of 15 small files each, of a run on 2 processes, and
prints medians (min to max): a cold listing (every manifest parsed), a warm one (as
inside a run: a stat each), selecting what `auto` takes, and the whole command `keepstep ls`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from keepstep.policy.manifest import FileEntry, Manifest, folder_name
from keepstep.policy.retention import Policy
from keepstep.policy.selection import choose
from keepstep.run_folder.keeping import now
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter

POLICY = Policy(None, "metric", "eval_loss")


def make(run: Path, count: int) -> None:
    writer = RunWriter(RunFolder(run), POLICY, Storage())
    writer.start()
    digest = xxhash.xxh3_128_hexdigest(b"x")
    names = [f"file-{index}.pt" for index in range(15)]
    for step in range(1, count + 1):
        folder = run / folder_name(step)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"x")
        manifest = Manifest(
            run_id=writer.run_id,
            attempt=1,
            parent=None,
            global_step=step,
            epoch=step / 100,
            samples=step * 16,
            metrics={"eval_loss": 1 + 1 / step},
            world_size=2,
            zero_stage=3,
            dtype="float32",
            adapter=False,
            planned_steps=count,
            settings={f"setting_{index}": index for index in range(25)},
            health={"finite": True},
            versions={f"library_{index}": "1.0.0" for index in range(8)},
            saved_at=now(),
            save_seconds=0.1,
            files={name: FileEntry(i % 2, 1, digest) for i, name in enumerate(names)},
        )
        (folder / "manifest.json").write_text(manifest.to_json())


def measure(title: str, rounds: int, action: Callable[[], object]) -> None:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    low, high = min(seconds), max(seconds)
    print(f"{title:34} {statistics.median(seconds):7.3f} s  ({low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=10_000, help="checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    count, rounds = arguments.count, arguments.rounds
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        make(run, count)
        print(f"{count} checkpoints of 15 files, 2 processes")
        measure("listing, cold", rounds, lambda: RunFolder(run).checkpoints())
        warm = RunFolder(run)
        warm.checkpoints()
        measure("listing, inside a run", rounds, warm.checkpoints)
        measure("retention plan, inside a run", rounds, warm.retention)
        verify = lambda step: warm.faults(warm.checkpoint(step), deep=True)  # noqa: E731
        measure(
            "auto, sizes and digests verified",
            rounds,
            lambda: choose("auto", warm.situation("auto", POLICY, verify, 3)),
        )
        code = "import sys; from keepstep.cli import command; command()"
        command = [sys.executable, "-c", code, "ls", name]
        measure(
            "keepstep ls, sizes verified",
            rounds,
            lambda: subprocess.run(command, capture_output=True, check=True),
        )


if __name__ == "__main__":
    main()
