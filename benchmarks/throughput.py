"""What keepstep costs while nothing is saved: against plain TRL, under the same launcher.

    python benchmarks/throughput.py --parameters 30 --rounds 5

trains a random Llama by TRL's SFTTrainer (`plain`: nothing of keepstep is imported) and by
keepstep's, with the same fields, rows and accelerate config, each in a launch of its own, in turn:
plain, keepstep, plain, … A launch's first steps are not measured; no checkpoint is saved. Figures
of a launch, medians and their range, and what keepstep's are of plain's, round by round, beside
what is aimed at:

`tokens/s`: of all processes, in the measured steps; `step`: the median step's seconds; `processor`:
its seconds a step, of all processes; `memory`: what a process held at its height, in GB (on a GPU
what was allocated there); `first step`: seconds from the start of the command to the end of step 1.

A machine that does something else beside changes seconds of the wall clock; those of the processor,
and ratios of neighbors, less. No goal ends it: one that is not reached is a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu.inputs import SHAPES
from benchmarks.gpu.launches import Budget
from benchmarks.gpu.speed import Setting, measure
from benchmarks.gpu.table import Goal

TIMEOUT = 600.0  # seconds of one launch
ARMS = ("plain", "keepstep")
# The processor's seconds have no goal of their own: they tell what a loaded machine does to a step.
GOALS = {
    "tokens/s": Goal(">=", 0.99),
    "step": Goal("<=", 1.01),
    "processor": None,
    "memory": Goal("<=", 1.02),
    "first step": Goal("<=", 1.0),
}


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is launched ends with it
    shutil.rmtree(arguments.folder, ignore_errors=True)
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    load = [os.getloadavg()[0]]
    values: dict[str, dict[str, list[float]]] = {arm: defaultdict(list) for arm in ARMS}
    trained: set[int] = set()
    try:
        for _ in range(arguments.rounds):
            for arm in ARMS:
                report = measure(
                    setting_of(arguments), arm, folder, cpu(arguments), Budget(TIMEOUT)
                )
                trained.add(report["tokens"])
                for name, value in figures(report).items():
                    values[arm][name].append(value)
            load.append(os.getloadavg()[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if len(trained) > 1:
        sys.exit(f"launches learnt from different numbers of tokens: {trained}; nothing compares")
    tell(arguments, values, load)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, choices=SHAPES, default=30, help="millions")
    parser.add_argument("--strategy", choices=("ddp", "zero2", "zero3"), default="zero2")
    parser.add_argument("--processes", type=int, default=2, help="of a launch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=4, help="of each process in a step")
    parser.add_argument("--warm", type=int, default=3, help="steps that are not measured")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a launch")
    parser.add_argument("--rounds", type=int, default=5, help="launches of each trainer")
    parser.add_argument("--folder", type=Path, default=Path("throughput.tmp"), help="is deleted")
    parser.add_argument("--json", type=Path, help="file that the result is added to")
    return parser.parse_args()


def setting_of(arguments: argparse.Namespace) -> Setting:
    return Setting(
        name="throughput",
        strategy=arguments.strategy,
        millions=arguments.parameters,
        length=arguments.length,
        rows=arguments.rows,
        warm=arguments.warm,
        steps=arguments.steps,
        processes=arguments.processes,
        fields={"dtype": "float32", "bf16": False} if cpu(arguments) else {},
    )


def cpu(arguments: argparse.Namespace) -> bool:
    return bool(arguments.device == "cpu")


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Of one launch."""
    return {
        "tokens/s": report["tokens"] / report["seconds"],
        "step": statistics.median(report["step_seconds"]),
        "processor": report["cpu_seconds"] / report["steps"],
        "memory": (report["allocated"] or report["resident"]) / 1e9,
        "first step": report["to_first_step"],
    }


def spread(values: list[float]) -> list[float]:
    """Median, least and largest."""
    return [statistics.median(values), min(values), max(values)]


def tell(
    arguments: argparse.Namespace,
    values: Mapping[str, Mapping[str, list[float]]],
    load: list[float],
) -> None:
    """Print medians, ranges and ratios; the same as one JSON line."""
    print(
        f"{arguments.parameters} M parameters, {arguments.strategy}, {arguments.processes} x "
        f"{arguments.rows} x {arguments.length} tokens, {arguments.steps} steps a launch; load of "
        f"the machine {min(load):.1f} to {max(load):.1f}, these launches included"
    )
    names = ("parameters", "strategy", "processes", "rows", "length", "steps", "rounds", "device")
    summary: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    summary["load"] = [round(value, 1) for value in load]
    for name, goal in GOALS.items():
        pairs = zip(values["plain"][name], values["keepstep"][name], strict=True)
        columns = {arm: spread(values[arm][name]) for arm in ARMS}
        columns["ratio"] = spread([ours / plain for plain, ours in pairs])
        for arm, found in columns.items():
            summary[f"{arm} {name}"] = [round(value, 4) for value in found]
            middle, least, most = found
            aim = ""
            if arm == "ratio" and goal is not None:
                aim = f"  goal {goal}: {'reached' if goal.holds(middle) else 'not reached'}"
            print(f"{name + ', ' + arm:22} {middle:9.3f}  ({least:.3f} to {most:.3f}){aim}")
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
