"""What a launch trains: `python -m benchmarks.gpu.program ARM REPORT WARM STEPS COUNT [fields]`.

ARM: `plain`, TRL's SFTTrainer, or `keepstep`. WARM steps are not measured, the STEPS after them
are. COUNT: `count` has torch's profiler count what waits for the device; `-`: nothing slows the
steps. The report, JSON in the file REPORT, is what `Report` says.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from keepstep import train
from keepstep.output import log_filters
from keepstep.preflight.estimate import device_bytes
from keepstep.preflight.shapes import shapes_of, step_of, strategy_of
from keepstep.ranks import collectives, signals
from keepstep.recipe import model
from keepstep.recipe.config import ConfigError, Recipe
from keepstep.recipe.parse import parse_recipe
from keepstep.trainer.attempt import CurrentAttempt

# What the host waits for: calls of the CUDA runtime, and copies to memory that the host reads next.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COPY = "Memcpy DtoH"


@dataclass
class Report:
    """What one launch was measured to do.

    Attributes:
        seconds: of all measured steps together, until the device was done with them.
        steps: how many.
        tokens: that they learnt from.
        allocated: bytes of the device's memory at their height; `reserved`: with torch's cache.
        estimate: what preflight expects for `allocated`.
        matrices: parameters without the input embedding.
        layers, hidden, length: of the model, and tokens of a row.
        waits: by name, how often the host waited for the device in all measured steps.
    """

    arm: str
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    allocated: int = 0
    reserved: int = 0
    estimate: int = 0
    matrices: int = 0
    layers: int = 0
    hidden: int = 0
    length: int = 0
    waits: dict[str, int] = field(default_factory=dict)


def count_waits(names: Iterable[str]) -> dict[str, int]:
    """Of the events of a profile, by name: what waits for the device."""
    counts = dict.fromkeys((*WAITS, COPY), 0)
    for name in names:
        for known in counts:
            counts[known] += name == known or (known == COPY and name.startswith(COPY))
    return counts


def settle() -> None:
    """Wait for the device, so that a clock tells of work that is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Meter(TrainerCallback):
    """Measures steps, from the end of the last warm one to that of the last of all."""

    def __init__(self, report: Report, warm: int, steps: int, count: bool) -> None:
        self.report, self.warm, self.steps, self.count = report, warm, steps, count
        self.trainer: Any = None
        self._began, self._tokens = 0.0, 0
        self._profile: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warm:
            self._begin()
        elif state.global_step == self.warm + self.steps:
            self._end()

    def _begin(self) -> None:
        settle()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        if self.count:
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=kinds)
            self._profile.start()
        self._tokens = int(self.trainer._total_train_tokens)
        self._began = time.perf_counter()

    def _end(self) -> None:
        if self._profile is not None:  # before `settle`, which would be counted
            self._profile.stop()
            self.report.waits = count_waits(event.name for event in self._profile.events())
        settle()
        self.report.seconds = time.perf_counter() - self._began
        self.report.steps = self.steps
        self.report.tokens = int(self.trainer._total_train_tokens) - self._tokens
        if torch.cuda.is_initialized():
            self.report.allocated = torch.cuda.max_memory_allocated()
            self.report.reserved = torch.cuda.max_memory_reserved()


def describe(report: Report, recipe: Recipe) -> None:
    """What is known of the recipe before it is trained."""
    shapes, step = shapes_of(recipe), step_of(recipe)
    if shapes is None:
        raise ConfigError([])
    report.estimate = device_bytes(shapes, strategy_of(recipe), step)
    report.matrices = shapes.total - shapes.vocabulary * shapes.hidden
    report.layers, report.hidden, report.length = shapes.layers, shapes.hidden, step.length


def train_plain(recipe: Recipe, meter: Meter) -> None:
    inputs, _, _ = train.gather_inputs(recipe)
    del inputs["sources"], inputs["renamed"]  # told by keepstep's trainer
    trainer = SFTTrainer(**inputs, **model.trainer_arguments(recipe.model, recipe.training, None))
    meter.trainer = trainer
    trainer.add_callback(meter)
    trainer.train()


def train_keepstep(recipe: Recipe, meter: Meter) -> None:
    inputs, settings, problems = train.gather_inputs(recipe)
    if problems:
        raise ConfigError(problems)
    this = CurrentAttempt(recipe)
    with this:
        this.begin()
        this.choose(settings)
        meter.trainer = train.build_trainer(this, inputs)
        meter.trainer.add_callback(meter)
        meter.trainer.train()


def main(arm: str, path: str, warm: str, steps: str, count: str, *argv: str) -> None:
    log_filters.silence()
    log_filters.silence_prints()
    signals.install_handlers()
    recipe = parse_recipe([*argv, "--max_steps", str(int(warm) + int(steps))])
    report = Report(arm)
    describe(report, recipe)
    meter = Meter(report, int(warm), int(steps), count == "count")
    {"plain": train_plain, "keepstep": train_keepstep}[arm](recipe, meter)
    Path(path).write_text(json.dumps(asdict(report)))
    collectives.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
