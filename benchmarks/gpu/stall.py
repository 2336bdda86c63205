"""Part 2: how long training stands still for a save, and what a step waits for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import launches
from benchmarks.gpu.launches import ROOT, Budget, LaunchError
from benchmarks.gpu.speed import Setting, measure
from benchmarks.gpu.table import Goal, Row, Table

ALL = ("none", "plain", "snapshot", "lazy", "dcp", "memcpy")
# Millions of parameters, ZeRO stage, rounds, arms. (Of 1.2 B the plain checkpoints, and DCP's, do
# not fit on a disk of 64 GB beside ours.) The first of them tells most.
RUNS = (
    (500, 2, 4, ALL),
    (500, 3, 3, ALL),
    (1240, 2, 3, ("none", "snapshot", "lazy", "memcpy")),
)
COUNTED = Setting("ZeRO-2, 134 M", "zero2", 134, 128, 4, warm=3, steps=5)


def run(table: Table, folder: Path, cpu: bool, budget: Budget, only: Sequence[str] = ()) -> None:
    """Add the rows of each run. `only`: its number in RUNS, or `waits`."""
    if not only or "waits" in only:
        for row in waits(folder, cpu, budget):
            table.add(row)
    for number, (millions, zero, rounds, arms) in enumerate(RUNS):
        if only and str(number) not in only:
            continue
        name = f"ZeRO-{zero}, bf16, {'smallest model' if cpu else f'{millions} M'}"
        try:
            summary = save_stall(folder, cpu, budget, millions, zero, rounds, arms)
        except LaunchError as error:
            table.add(Row(name, None, note=str(error), failed=budget.left > 1))
            continue
        for row in rows_of(name, summary):
            table.add(row)


def save_stall(
    folder: Path, cpu: bool, budget: Budget, millions: int, zero: int, rounds: int, arms: Any
) -> dict[str, Any]:
    """What benchmarks/save_stall.py says, all arms in turn in one run."""
    result = folder / f"stall-{millions}-{zero}.jsonl"
    command = [
        *(sys.executable, str(ROOT / "benchmarks/save_stall.py"), "--processes", "1"),
        *("--parameters", "1" if cpu else str(millions), "--zero", str(zero), "--dtype", "bf16"),
        *("--rounds", "1" if cpu else str(rounds), "--device", "cpu" if cpu else "cuda"),
        *(() if cpu else ("--length", "2048", "--rows", "8")),
        *("--folder", str(folder / "stall"), "--json", str(result), "--arms", *arms),
    ]
    launches.run(command, result.with_suffix(".log"), cpu, budget.left)
    summary: dict[str, Any] = json.loads(result.read_text().splitlines()[-1])
    return summary


def rows_of(name: str, summary: Mapping[str, Any]) -> Iterator[Row]:
    """A run's rows. Stalls: what the host waited, and what the step after it took longer for it:
    a copy that the device makes holds up the device, not the host."""
    step = summary["step after none"][0]
    yield _times(f"{name}: step", summary["step after none"])
    later = {}
    for arm in ("plain", "snapshot", "lazy", "dcp"):
        if arm not in summary:
            continue
        longer = max(0.0, summary[f"step after {arm}"][0] - step)
        later[arm] = summary[arm][0] + longer
        note = f"{_range(summary[arm])} on the host, and {longer:.3f} in the step after"
        yield Row(f"{name}: training later by, {arm}", later[arm], "s", note=note)
    plain = later.get("plain")
    for arm in ("snapshot", "lazy"):
        if plain is not None:
            times = plain / max(later[arm], 1e-6)
            yield Row(f"{name}: plain Trainer's stall, of {arm}'s", times, "x", Goal(">=", 55))
        writing = summary[f"step after {arm}"][0] / step
        yield Row(f"{name}: step while {arm} is written", writing, "x", Goal("<=", 1.05))
    copied = summary["snapshot bytes"][0] / 1e9 / summary["memcpy GB/s"][0]
    note = f"{summary['memcpy GB/s'][0]:.1f} GB/s into pinned memory, {copied:.3f} s"
    ratio = summary["snapshot"][0] / copied
    yield Row(f"{name}: snapshot, of a copy of its bytes", ratio, "x", Goal("<=", 1.1), note)
    share = 100 * later["lazy"] / step
    yield Row(f"{name}: lazy, of a step", share, "%", Goal("<", 2.0))
    yield Row(f"{name}: lazy, the longest", summary["lazy"][2], "s", Goal("<=", 0.2))


def waits(folder: Path, cpu: bool, budget: Budget) -> Iterator[Row]:
    """What a step waits for: TRL's own trainer, and keepstep's on top of it."""
    setting = COUNTED.small() if cpu else COUNTED
    what = f"{setting.name}: waits for the device in a step"
    try:
        counts = {
            arm: measure(setting, arm, folder, cpu, budget, count=True)["waits"]
            for arm in ("plain", "keepstep")
        }
    except LaunchError as error:
        yield Row(what, None, note=str(error), failed=budget.left > 1)
        return
    for arm, found in counts.items():
        told = ", ".join(f"{name} {count / setting.steps:g}" for name, count in found.items())
        yield Row(f"{what}, {arm}", sum(found.values()) / setting.steps, note=told)
    more = added(counts["plain"], counts["keepstep"]) / setting.steps
    yield Row(f"{what}, added by keepstep", more, goal=Goal("<=", 0))


def added(plain: Mapping[str, int], ours: Mapping[str, int]) -> int:
    """Waits of each kind that ours has more; fewer of one kind do not make up for another."""
    return sum(max(0, count - plain.get(name, 0)) for name, count in ours.items())


def _times(what: str, values: Sequence[float]) -> Row:
    return Row(what, values[0], "s", note=_range(values))


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"
