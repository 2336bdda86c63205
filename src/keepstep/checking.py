"""`keepstep check`: what can be known of a recipe before it is launched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import noise
from .checkpoint.runfolder import RunFolder
from .commands import JsonOption, app, console
from .report import step_seconds


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE [--field value ...]")],
    walltime: Annotated[
        float | None, typer.Option(help="Seconds that a batch job would have.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with a recipe, without launching it; exit status 2 when anything is."""
    noise.silence()
    from .config import ConfigError  # torch and TRL: seconds to import
    from .parsing import parse_recipe
    from .preflight import validate

    found: dict[str, Any] = {"recipe": str(recipe), "output_dir": None, "warnings": []}
    try:
        parsed = parse_recipe(["--config", str(recipe), *context.args])
        training = parsed.training
        found["output_dir"] = training.output_dir and str(Path(training.output_dir).absolute())
        problems = validate(parsed)
        if walltime is not None and training.output_dir:
            found["warnings"] = list(
                _short_of_time(RunFolder(training.output_dir), parsed, walltime)
            )
    except ConfigError as error:
        problems = error.problems
    found["problems"] = [str(problem) for problem in problems]
    lines = [f"warning: {text}" for text in found["warnings"]]
    lines.append(ConfigError(problems).report() if problems else f"{recipe}: no problem found")
    found["report"] = "\n".join(lines)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        console.print(found["report"], highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(2 if problems else 0)


def _short_of_time(run: RunFolder, recipe: Any, walltime: float) -> Iterator[str]:
    """What a job of so many seconds would lose; steps are as long as they have been."""
    training, step = recipe.training, step_seconds(run)
    intervals = [training.save_interval_seconds or float("inf")]
    by_steps = training.save_strategy == "steps" and training.save_steps >= 1
    if by_steps and step is not None:
        intervals.append(training.save_steps * step)
    if walltime / 2 < min(intervals) < float("inf"):
        yield (
            f"a save every {min(intervals):.0f} s in jobs of {walltime:.0f} s: a job that dies "
            "may lose all of its work\n    Hint: save_interval_seconds: "
            f"{max(60, round(walltime / 10)):.0f}"
        )
