"""One part of the GPU run: `benchmarks/gpu.sh 1`, 2 or 3 (python -m benchmarks.gpu 1).

1: every way to train, killed and carried on, bit for bit. 2: how long training stands still for a
save, and what a step waits for. 3: tokens per second, MFU, memory. Each adds its rows to one table,
`gpu.md` and `gpu.jsonl` in OUT, as it goes. Without a GPU a part says so and ends; with --cpu it
runs whole on the smallest model, to see that it works: what it measures then means nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.launches import Budget
from benchmarks.gpu.table import Table

PARTS = {
    "1": "correctness: killed and carried on",
    "2": "stall: what a save costs",
    "3": "speed and memory",
}
LOG_CHARACTERS = 20_000  # of each launch's log, its end
SECONDS = 540.0  # a part is to end within ten minutes, start and clearing up included


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="of the table")
    parser.add_argument(
        "--work", type=Path, help="of models and runs: a new folder, deleted at the end"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that the part may take")
    parser.add_argument("--cpu", action="store_true", help="the smallest model, without a GPU")
    parser.add_argument("--only", nargs="+", default=[], help="what holds one of these words")
    arguments = parser.parse_args(argv)
    if arguments.work is not None and arguments.work.exists():
        parser.error(f"--work: {arguments.work} is there, and would be deleted: name a new folder")
    return arguments


def main() -> int:
    arguments = parse()
    budget = Budget(arguments.seconds)
    title = f"Part {arguments.part}, {PARTS[arguments.part]}"
    if arguments.cpu:
        title += " (on CPU, to see that it runs: no figure means anything)"
    if not arguments.cpu:
        from benchmarks.gpu.machine import card

        if card() is None:
            print(f"{title}: skipped, there is no CUDA device here")
            return 0
    from benchmarks.gpu import correctness, machine, speed, stall

    run = {"1": correctness.run, "2": stall.run, "3": speed.run}[arguments.part]
    folder = (arguments.work or Path(tempfile.mkdtemp(prefix="keepstep-gpu-"))).resolve()
    folder.mkdir(parents=True, exist_ok=arguments.work is None)
    table = Table(arguments.out, title, machine.facts())
    try:
        run(table, folder, arguments.cpu, budget, arguments.only)
    finally:
        keep_logs(folder, arguments.out / f"logs-{arguments.part}.txt")
        shutil.rmtree(folder, ignore_errors=True)
    if not table.rows:
        print(f"--only {' '.join(arguments.only)}: part {arguments.part} has nothing of that name")
        return 2
    return 1 if table.failed else 0


def keep_logs(folder: Path, path: Path) -> None:
    """What a failed row is understood by, in one file."""
    with path.open("a", encoding="utf-8") as file:
        for log in sorted(folder.rglob("*.log")):
            text = log.read_text(errors="replace")[-LOG_CHARACTERS:]
            file.write(f"==> {log.relative_to(folder)}\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
