"""Part 3: tokens per second, what share of the card's peak they are, and memory against preflight's
estimate."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import launches
from benchmarks.gpu.launches import Budget, LaunchError
from benchmarks.gpu.machine import card, flops_per_token, lacks, peak_tflops
from benchmarks.gpu.table import Goal, Row, Table

LORA = {"use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear"}
LEAST_SECONDS = 30  # a launch is not begun with less


@dataclass(frozen=True)
class Setting:
    """What is trained to be measured.

    Attributes:
        strategy: the accelerate config's name.
        millions: of parameters, a key of inputs.SHAPES.
        length, rows: tokens of a row, rows of a process in a step.
        mixed: rows are of all lengths up to that.
        warm, steps: not measured, and measured.
        fields: of the recipe, beside those that all have.
        packages: that it needs.
        processes: of the launch.
    """

    name: str
    strategy: str
    millions: int
    length: int
    rows: int
    mixed: bool = False
    warm: int = 5
    steps: int = 15
    fields: Mapping[str, object] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    processes: int = 1

    def small(self) -> Setting:
        """The same on the smallest model: to see on CPU that the script works."""
        name = f"{self.name} (smallest model)"
        return replace(self, name=name, millions=1, length=32, rows=2, warm=1, steps=2)


MAIN = Setting("ZeRO-2, 1.2 B, 8 x 2,048 tokens, SDPA", "zero2", 1240, 2048, 8)
OTHERS = (
    replace(
        MAIN,
        name="the same, Liger kernels",
        fields={"use_liger_kernel": True},
        packages=("liger_kernel",),
    ),
    replace(
        MAIN,
        name="ZeRO-3, gradient checkpointing, 1.2 B, 16 x 2,048 tokens",
        strategy="zero3",
        rows=16,
        fields={"gradient_checkpointing": True},
    ),
    replace(MAIN, name="the same as first, rows of all lengths, padded", mixed=True),
    replace(
        MAIN,
        name="the same as first, rows of all lengths, packed (wrapped)",
        mixed=True,
        fields={"packing": True, "packing_strategy": "wrapped"},
    ),
    replace(
        MAIN,
        name="the same as first, rows of all lengths, packed (bfd), flash attention",
        mixed=True,
        fields={"packing": True, "attn_implementation": "flash_attention_2"},
        packages=("flash_attn",),
    ),
    replace(MAIN, name="ZeRO-2, LoRA, 1.2 B, 8 x 2,048 tokens", fields=LORA),
)
IN_TURN = ("plain", "keepstep", "plain", "keepstep")


def run(table: Table, folder: Path, cpu: bool, budget: Budget, only: Sequence[str] = ()) -> None:
    """Add the rows: TRL's trainer and keepstep's in turn, then what changes them. `only`: `main`,
    or a word of a setting's name."""
    if not only or "main" in only:
        compare(table, MAIN.small() if cpu else MAIN, folder, cpu, budget)
    for setting in OTHERS:
        if only and not any(word in setting.name for word in only):
            continue
        lacking = lacks(*setting.packages)
        if lacking is None and cpu and setting.packages:
            lacking = "skipped: on CPU"
        if lacking is None and budget.left < LEAST_SECONDS:
            lacking = "not run: the part's time is used up"
        if lacking is not None:
            table.add(Row(setting.name, None, note=lacking))
            continue
        setting = setting.small() if cpu else setting
        for row in _of_one(setting, folder, cpu, budget):
            table.add(row)


def compare(table: Table, setting: Setting, folder: Path, cpu: bool, budget: Budget) -> None:
    """Both trainers in turn."""
    rates: dict[str, list[float]] = {"plain": [], "keepstep": []}
    report: dict[str, Any] = {}
    for arm in IN_TURN[: 2 if cpu else None]:
        try:
            report = measure(setting, arm, folder, cpu, budget)
        except LaunchError as error:
            table.add(Row(f"{setting.name}, {arm}", None, note=str(error), failed=budget.left > 1))
            continue
        rates[arm].append(report["tokens"] / report["seconds"])
    for arm, found in rates.items():
        if found:
            note = f"of {', '.join(f'{rate:,.0f}' for rate in found)}"
            value = statistics.median(found)
            table.add(Row(f"{setting.name}, {arm}", value, "tokens/s", note=note))
    if all(rates.values()):
        ratio = statistics.median(rates["keepstep"]) / statistics.median(rates["plain"])
        table.add(Row(f"{setting.name}, keepstep of plain", ratio, "x", Goal(">=", 0.99)))
        rate = statistics.median(rates["keepstep"])
        for row in (*share_of_peak(setting, report, rate), *memory(setting, report)):
            table.add(row)


def _of_one(setting: Setting, folder: Path, cpu: bool, budget: Budget) -> Iterator[Row]:
    try:
        report = measure(setting, "keepstep", folder, cpu, budget)
    except LaunchError as error:
        yield Row(setting.name, None, note=str(error), failed=budget.left > 1)
        return
    rate = report["tokens"] / report["seconds"]
    yield Row(setting.name, rate, "tokens/s", note=f"{report['seconds']:.2f} s")
    if "use_peft" not in setting.fields and not setting.mixed:
        yield from share_of_peak(setting, report, rate)
    yield from memory(setting, report)


def share_of_peak(setting: Setting, report: Mapping[str, Any], rate: float) -> Iterator[Row]:
    """MFU: the FLOPs that the tokens need, of those that the card has by its data sheet."""
    name = card()
    peak = None if name is None else peak_tflops(name)
    if peak is None:
        yield Row(f"{setting.name}: MFU", None, note="the peak of this card is not known")
        return
    sizes = (report[key] for key in ("matrices", "layers", "hidden", "length"))
    reached = rate * flops_per_token(*sizes) / 1e12
    note = f"{reached:.0f} of {peak:g} TFLOP/s (dense bf16, data sheet); see machine.py"
    yield Row(f"{setting.name}: MFU", 100 * reached / peak, "%", Goal(">=", 45), note)


def memory(setting: Setting, report: Mapping[str, Any]) -> Iterator[Row]:
    """What preflight expected, against what was allocated at its height."""
    measured, expected = report["allocated"], report["estimate"]
    what = f"{setting.name}: memory, off by"
    if not measured:
        yield Row(what, None, note=f"nothing on a device; {expected / 1e9:.2f} GB are expected")
        return
    note = (
        f"{expected / 1e9:.2f} GB expected, {measured / 1e9:.2f} allocated, "
        f"{report['reserved'] / 1e9:.2f} with torch's cache"
    )
    off = 100 * abs(expected / measured - 1)
    yield Row(what, off, "%", Goal("<=", 10), note)


def measure(
    setting: Setting, arm: str, folder: Path, cpu: bool, budget: Budget, count: bool = False
) -> dict[str, Any]:
    """Launch it; the report (see meter.py), and `to_first_step`: seconds from the launch on.

    Raises:
        LaunchError: it did not come to its end.
    """
    inputs = _inputs(setting, folder, cpu, budget)
    place = folder / "speed" / "".join(c if c.isalnum() else "-" for c in f"{setting.name} {arm}")
    number = len(list(place.glob("*.log"))) + 1
    place.mkdir(parents=True, exist_ok=True)
    report = place / f"{number}.json"
    module = {"plain": "benchmarks.gpu.plain", "keepstep": "benchmarks.gpu.program"}[arm]
    program = ("-m", module, str(report), str(setting.warm))
    command = launches.launch_command(
        setting.strategy,
        cpu,
        *(*program, str(setting.steps), "count" if count else "-"),
        *recipe(setting, inputs, place / f"run-{number}"),
        processes=setting.processes,
    )
    began = time.time()
    launches.run(command, place / f"{number}.log", cpu, budget.left)
    found: dict[str, Any] = json.loads(report.read_text())
    return found | {"to_first_step": found["first_step"] - began}


def recipe(setting: Setting, inputs: Path, output: Path) -> list[str]:
    """The command line of a setting; nothing is saved, nothing logged."""
    values: dict[str, object] = {
        "attn_implementation": "sdpa",
        "max_length": setting.length,
        "per_device_train_batch_size": setting.rows,
        "save_strategy": "no",
        "logging_steps": 10_000,
        **setting.fields,
    }
    return launches.flags(inputs, output, values)


def _inputs(setting: Setting, folder: Path, cpu: bool, budget: Budget) -> Path:
    """A model and rows, made once."""
    kind = f"speed-{setting.millions}-{setting.length}{'-mixed' if setting.mixed else ''}"
    sizes = [str(setting.millions), "--words", str(setting.length)]
    sizes += ["--shortest", str(setting.length // 16)] if setting.mixed else []
    sizes += ["--rows", "1024" if setting.mixed else "256"]
    return launches.made(folder, kind, cpu, budget.left, *sizes)
