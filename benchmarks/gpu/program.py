"""What a launch trains: `python -m benchmarks.gpu.program REPORT WARM STEPS COUNT [fields]`.

WARM steps are not measured, the STEPS after them are. COUNT: `count` has torch's profiler count
what waits for the device; `-`: nothing slows the steps. The report, JSON in the file REPORT, is
what `meter.Report` says. plain.py is the same by TRL alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.meter import Meter, Report, finish

from keepstep import train
from keepstep.output import log_filters
from keepstep.preflight.estimate import device_bytes
from keepstep.preflight.shapes import shapes_of, step_of, strategy_of
from keepstep.ranks import collectives, signals
from keepstep.recipe.config import ConfigError, Recipe
from keepstep.recipe.parse import parse_recipe
from keepstep.trainer.attempt import CurrentAttempt


def describe(report: Report, recipe: Recipe) -> None:
    """What is known of the recipe before it is trained."""
    shapes, step = shapes_of(recipe), step_of(recipe)
    if shapes is None:
        raise ConfigError([])
    report.estimate = device_bytes(shapes, strategy_of(recipe), step)
    report.matrices = shapes.total - shapes.vocabulary * shapes.hidden
    report.layers, report.hidden, report.length = shapes.layers, shapes.hidden, step.length


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


def main(path: str, warm: str, steps: str, count: str, *argv: str) -> None:
    log_filters.silence()
    log_filters.silence_prints()
    signals.install_handlers()
    recipe = parse_recipe([*argv, "--max_steps", str(int(warm) + int(steps))])
    report = Report("keepstep")
    describe(report, recipe)
    meter = Meter(report, int(warm), int(steps), count == "count")
    train_keepstep(recipe, meter)
    finish(report, Path(path))
    collectives.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
