"""Killed and carried on, bit for bit: the cases of a GPU, as data, and how one is tried.

A case is trained three times: straight; killed at a step or in a save; and on from there. What
the last checkpoints restore must have the same bytes: weights, optimizer, schedule, random numbers.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.gpu import launches
from benchmarks.gpu.launches import Budget, LaunchError

LORA = {"use_peft": True, "lora_r": 8, "lora_dropout": 0.1, "lora_target_modules": "all-linear"}
QLORA = {**LORA, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
STEPS, EVERY = 6, 2
LARGE = 1000  # millions of parameters: from there on a case is tried alone, and rows are long
STATE_BYTES = 14  # of a checkpoint per trained parameter, in bf16


@dataclass(frozen=True)
class Case:
    """One way to train, and the moment at which it is killed.

    Attributes:
        strategy: the accelerate config's name.
        millions: of parameters, a key of inputs.SHAPES.
        phase, step: of the kill; see killed.py.
        fields: of the recipe, beside those that all have.
        packages: that it needs.
    """

    name: str
    strategy: str
    millions: int = 30
    phase: str = "step"
    step: int = 5
    fields: Mapping[str, object] = field(default_factory=dict)
    packages: tuple[str, ...] = ()

    @property
    def trains_all(self) -> bool:
        return "use_peft" not in self.fields

    @property
    def disk_bytes(self) -> int:
        """Of the model, and of the two checkpoints that lie there at the same time."""
        model = 2 * self.millions * 1_000_000
        state = STATE_BYTES * self.millions * 1_000_000 if self.trains_all else 1 << 29
        return 2 * model + 2 * state


# The first of them tell most, should there be no time for all.
CASES = (
    Case("ZeRO-2, full, 30 M, killed at a step", "zero2"),
    Case("ZeRO-3, full, 30 M, killed in a save", "zero3", phase="write", step=4),
    Case("ZeRO-2, LoRA, 30 M, killed in a save", "zero2", phase="write", step=4, fields=LORA),
    Case("ZeRO-3, LoRA, 30 M, killed at a step", "zero3", fields=LORA),
    Case("DDP, full, 30 M, killed in a save", "ddp", phase="write", step=4),
    Case(
        "ZeRO-2, full, lazy saves, 30 M, killed in a save",
        "zero2",
        phase="write",
        step=4,
        fields={"async_save": "lazy"},
    ),
    Case(
        "ZeRO-3, full, 1.2 B, gradient checkpointing, killed in a save",
        "zero3",
        1240,
        "write",
        4,
        {"gradient_checkpointing": True, "async_save": "lazy"},
    ),
    Case("ZeRO-3 on the host, full, 30 M, killed at a step", "zero3_offload"),
    Case(
        "ZeRO-2, QLoRA, 30 M, killed at a step", "zero2", fields=QLORA, packages=("bitsandbytes",)
    ),
    Case("DDP, QLoRA, 30 M, killed in a save", "ddp", 30, "write", 4, QLORA, ("bitsandbytes",)),
    Case("ZeRO-2, full, 1.2 B, killed at a step", "zero2", 1240),
    Case("ZeRO-3, LoRA, 3.1 B, killed at a step", "zero3", 3140, fields=LORA),
)


def small(case: Case) -> Case:
    """The same on the smallest model: to see on CPU that the script works."""
    return replace(case, name=f"{case.name} (smallest model)", millions=1)


def recipe(case: Case, inputs: Path, output: Path, **fields: object) -> list[str]:
    """The command line of a case."""
    values: dict[str, object] = {
        "max_length": 512 if case.millions >= LARGE else 32,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_steps": EVERY,
        "save_total_limit": 1,
        "logging_steps": 1,
        **case.fields,
        **fields,
    }
    if case.strategy == "ddp" and case.trains_all:
        values["dtype"] = "float32"  # autocast: DDP has no masters of its own
    return launches.flags(inputs, output, values)


def try_case(case: Case, folder: Path, cpu: bool, budget: Budget) -> float:
    """Train it three times; returns the seconds that it took.

    Raises:
        LaunchError: a launch did not do what it should; or the ends differ: in which files.
    """
    began = time.monotonic()
    free = shutil.disk_usage(folder).free
    if free < case.disk_bytes:
        raise LaunchError(f"{case.disk_bytes / 1e9:.0f} GB of disk needed, {free / 1e9:.0f} free")
    sizes = (str(case.millions), "--words", str(512 if case.millions >= LARGE else 40))
    inputs = launches.made(folder, f"inputs-{case.millions}", cpu, budget.left, *sizes)
    place = folder / "".join(c if c.isalnum() else "-" for c in case.name)
    try:
        straight = _launch(case, inputs, place / "straight", cpu, budget, save_steps=STEPS)
        expected = end_of(straight)
        shutil.rmtree(straight)
        broken = place / "broken"
        _launch(case, inputs, broken, cpu, budget, phase=case.phase)
        _launch(case, inputs, broken, cpu, budget, phase="none", number=2)
        compare(expected, end_of(broken))
    finally:
        for run in ("straight", "broken"):  # the logs stay
            shutil.rmtree(place / run, ignore_errors=True)
    return time.monotonic() - began


def _launch(
    case: Case,
    inputs: Path,
    output: Path,
    cpu: bool,
    budget: Budget,
    phase: str = "none",
    number: int = 1,
    **fields: object,
) -> Path:
    command = launches.launch_command(
        case.strategy,
        cpu,
        *("-m", "benchmarks.gpu.killed", phase, str(case.step)),
        *recipe(case, inputs, output, **fields),
    )
    log = output.with_name(f"{output.name}-{number}.log")
    expected = "0" if phase == "none" else "any"
    told = launches.run(command, log, cpu, budget.left, expected=expected)
    if phase != "none" and f"killed in {phase} {case.step}" not in told:
        raise LaunchError(f"it was not killed in {phase} {case.step} ({log.name})")
    if number > 1 and "carrying on from checkpoint-" not in told:
        raise LaunchError(f"it did not carry on ({log.name})")
    return output


def end_of(run: Path) -> dict[str, str]:
    """Digests of all that the last checkpoint restores. (trainer_state.json holds times.)

    Raises:
        LaunchError: the run has not come to its last step.
    """
    from keepstep.run_folder.reader import RunFolder

    checkpoints = RunFolder(run).checkpoints()
    if not checkpoints or checkpoints[-1].step != STEPS:
        raise LaunchError(f"no checkpoint-{STEPS} in {run.name}")
    files = checkpoints[-1].manifest.files
    return {name: e.xxh3_128 for name, e in files.items() if name != "trainer_state.json"}


def compare(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises: LaunchError: files differ."""
    names = expected.keys() | found.keys()
    apart = sorted(name for name in names if expected.get(name) != found.get(name))
    if apart:
        raise LaunchError(f"{len(apart)} of {len(names)} files differ: {', '.join(apart[:4])}")
