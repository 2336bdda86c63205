"""Every benchmark that needs no GPU, one after the other, into one table (`make bench`).

    python benchmarks/all_on_cpu.py [--only WORD ...] [--small] [--rounds 3]

Each is run as it would be by hand, with models that two cores train in minutes. What it tells
becomes rows of `bench.md` and `bench.jsonl` in OUT, with date, machine, versions and load, beside
those of earlier days; the whole text goes to `logs.txt`. `--small`: the smallest sizes and one
round, to see that all of them run: no figure means anything then. The exit status is 1 when one
failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu.machine import facts
from benchmarks.gpu.table import Row, Table

HERE = Path(__file__).resolve().parent
TIMEOUT = 1800  # seconds of one benchmark
# Script → what it is run with, and with --small. REPEATED take --rounds, FOLDERS a --folder.
RUNS = {
    "many_manifests": (["1000"], ["10"]),
    "streams": (["20000"], ["300"]),
    "control_plane": (["8", "32"], ["2", "3"]),
    "many_ranks": (["64", "512"], ["4", "--rounds", "2"]),  # of saves, of which the last is told
    "throughput": (["--parameters", "30"], ["--parameters", "1", "--steps", "3"]),
    "save_stall": (["--parameters", "30"], ["--parameters", "1"]),
    "export": (["--parameters", "30"], ["--parameters", "1"]),
    "reshard": (["--parameters", "30"], ["--parameters", "1"]),
    "mirror": (["--parameters", "30"], ["--parameters", "1", "--steps", "6", "--every", "2"]),
    "carry_on": (["--parameters", "30"], ["--parameters", "1"]),
}
REPEATED = RUNS.keys() - {"many_ranks"}
FOLDERS = {"throughput", "save_stall", "export", "reshard", "mirror", "carry_on"}
# `name  1.234 s (1.0 to 2.0) …`: a median and its range; `  name: 1,234`: a count below a heading.
RANGE = re.compile(
    r"^(?P<what>\S.*?) +(?P<value>[\d.,]+) ?(?P<unit>[a-zA-Z/]*) +\((?P<range>.*?)\)(?P<rest>.*)$"
)
COUNT = re.compile(r"^ +(?P<what>.+): (?P<value>[\d.,]+)(?: (?P<unit>s))?(?P<rest>,? .*)?$")
OF_A_RUN = re.compile(r"^step +\d+/\d+ ")  # what a run that is measured says of itself
HEADING = re.compile(r"^\d+ ranks$")


def main() -> int:
    arguments = parse()
    machine = facts() | {"cores": str(os.cpu_count()), "load": f"{os.getloadavg()[0]:.1f}"}
    title = "All benchmarks on CPU" + (
        " (smallest sizes: no figure means a thing)" * arguments.small
    )
    chosen = [name for name in RUNS if not arguments.only or any(w in name for w in arguments.only)]
    if not chosen:
        print(f"--only {' '.join(arguments.only)}: there are {', '.join(RUNS)}")
        return 2
    table = Table(arguments.out, title, machine, name="bench")
    for name in chosen:
        code, text = run(name, arguments)
        with (arguments.out / "logs.txt").open("a", encoding="utf-8") as file:
            file.write(f"==> {name}: exit status {code}\n{text}\n")
        if code:
            end = " / ".join(text.strip().splitlines()[-2:])
            table.add(Row(name, None, note=f"exit status {code}; {end}"[:300], failed=True))
            continue
        for row in rows_of(name, text):
            table.add(row)
    return 1 if table.failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="those whose name has such a word")
    parser.add_argument("--small", action="store_true", help="the smallest sizes, one round")
    parser.add_argument("--rounds", type=int, default=3, help="of each, where --small is not given")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="of the table")
    return parser.parse_args()


def run(name: str, arguments: argparse.Namespace) -> tuple[int, str]:
    """One benchmark to its end: exit status, and what it told. What it made is removed."""
    words = [*RUNS[name][arguments.small]]
    if name in REPEATED:
        words += ["--rounds", "1" if arguments.small else str(arguments.rounds)]
    with tempfile.TemporaryDirectory(prefix="keepstep-bench-") as folder:
        if name in FOLDERS:
            words += ["--folder", f"{folder}/work"]
        command = [sys.executable, str(HERE / f"{name}.py"), *words]
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired as late:
            return 124, f"no end after {late.timeout} s"
    return done.returncode, f"{' '.join(words)}\n{done.stdout}"


def rows_of(name: str, text: str) -> Iterator[Row]:
    """What a benchmark's lines say in numbers; other lines stay in the log."""
    heading = ""
    for line in text.splitlines():
        if HEADING.match(line):
            heading = f"{line}, "
            continue
        if OF_A_RUN.match(line):
            continue
        found = RANGE.match(line.strip())
        if found is None:
            found = COUNT.match(line)
            if found is None:
                continue
        told = found.groupdict()
        what = " ".join(told["what"].split())
        note = "; ".join(part.strip(" ,") for part in (told.get("range"), told["rest"]) if part)
        prefix = heading if "range" not in told else ""
        value = float(told["value"].replace(",", ""))
        yield Row(f"{name}: {prefix}{what}", value, told["unit"] or "", note=note)


if __name__ == "__main__":
    sys.exit(main())
