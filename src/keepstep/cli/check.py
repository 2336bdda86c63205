"""`keepstep check | estimate`: what can be known of a run before it is launched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepstep.cli.common import JsonOption, above_zero, app, console, examples, fail
from keepstep.cli.rows import CheckReport, Estimate, EstimateRow
from keepstep.cli.tables import step_seconds
from keepstep.output import log_filters
from keepstep.output.loading import loading
from keepstep.output.table import Column, Table
from keepstep.output.units import counted, human_bytes
from keepstep.policy.auto_interval import AutoInterval, costs_of, seconds_apart
from keepstep.run_folder.reader import RunFolder

if TYPE_CHECKING:
    from keepstep.preflight.launch import Launch
    from keepstep.recipe.config import Problem, Recipe

LEAVE_NO_SIZE = {"run", "model", "adapter", "size", "launch"}  # errors without which none is known
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE [--field value ...]", help="A recipe, and fields of it with other values."
    ),
]
Processes = Annotated[
    int,
    typer.Option("--num_processes", min=1, help="The number of processes of the launch, in all."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config_file",
        help="The accelerate config of the launch; without it the launch is not looked at.",
    ),
]


@dataclass
class Seen:
    """What has been looked at, and what has not: the rest may hold mistakes."""

    looked_at: list[str] = field(default_factory=list)
    not_looked_at: list[str] = field(default_factory=list)
    speed: list[str] = field(default_factory=list)

    def told(self) -> list[str]:
        """In lines, each item in one of its own where they are many."""
        lists = {"speed, here:  ": self.speed, "looked at:    ": self.looked_at}
        lists["not looked at:"] = self.not_looked_at
        return [f"{name} {item}" for name, items in lists.items() for item in items]


@app.command(
    context_settings=PASS_ON,
    epilog=examples("keepstep check recipe.yaml --num_processes 8 --learning_rate 1e-4"),
)
def check(
    context: typer.Context,
    recipe: RecipeArgument,
    num_processes: Processes = 1,
    config_file: ConfigFile = None,
    walltime: Annotated[
        float | None,
        typer.Option(
            "--walltime",
            help="The seconds that a batch job would have; warns if it could not save in time.",
            callback=above_zero,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look for mistakes in a recipe without launching it; exit status 2 says there are some."""
    log_filters.silence()
    with loading(console):
        from keepstep.recipe.config import ConfigError  # torch and TRL: seconds to import

    parsed, seen = None, Seen()
    try:
        parsed = parse(recipe, context.args)
        problems = list(_problems(parsed, num_processes, config_file, seen))
        if walltime is not None and not any(p.code == "run" for p in problems):
            problems += _short_of_time(parsed, walltime)
    except ConfigError as error:
        problems = error.problems
    errors = [problem for problem in problems if problem.severity == "error"]
    lines = [f"warning: {p.told()}" for p in problems if p not in errors]
    lines.append(ConfigError(errors).report() if errors else f"{recipe}: no mistake found")
    lines += seen.told()
    if as_json:
        folder = parsed.training.output_dir if parsed else None
        found = CheckReport(
            recipe=str(recipe),
            output_dir=str(Path(folder).absolute()) if folder else None,
            hang_timeout=int(parsed.training.hang_timeout_seconds) if parsed else None,
            mirror=parsed.training.mirror_url if parsed else None,
            node_local=bool(parsed and parsed.training.node_local),
            problems=tuple(problems),
            looked_at=tuple(seen.looked_at),
            not_looked_at=tuple(seen.not_looked_at),
            report="\n".join(lines),
        )
        typer.echo(json.dumps(found.as_dict(), indent=1))
    else:
        console.tell_lines("\n".join(lines))
    raise typer.Exit(2 if errors else 0)


@app.command(
    context_settings=PASS_ON,
    epilog=examples("keepstep estimate recipe.yaml --num_processes 8"),
)
def estimate(
    context: typer.Context,
    recipe: RecipeArgument,
    num_processes: Processes = 1,
    config_file: ConfigFile = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory for each device, and what checkpoints take, under every strategy."""
    log_filters.silence()
    with loading(console):
        from keepstep.preflight import estimate as sizes
        from keepstep.preflight.launch import launch_in
        from keepstep.preflight.probes import disk_speed
        from keepstep.preflight.shapes import shapes_of, step_of, strategy_of
        from keepstep.recipe.config import ConfigError

    try:
        parsed = parse(recipe, context.args)
        sequences = launch_in(config_file, parsed).sequences if config_file else 1
    except ConfigError as error:
        fail(*error.report().removeprefix("keepstep: ").split("\n"))
    shapes = shapes_of(parsed)
    if shapes is None:
        fail(
            f"the shapes of {parsed.model.model_name_or_path} cannot be had from its config.json",
            "    Hint: one on the Hub asks for the network, and, if it is gated, for HF_TOKEN; "
            "offline, put its config.json into a folder: --model_name_or_path FOLDER",
        )
    training = parsed.training
    weights, limit = training.save_weights != "never", training.policy().limit
    speed, step = disk_speed(Path(str(training.output_dir or "."))), step_of(parsed)
    rows = []
    asked = replace(strategy_of(parsed, num_processes), sequences=sequences)
    for strategy in sizes.alternatives(asked):
        size = sizes.checkpoint_bytes(shapes, strategy, weights)
        rows.append(
            EstimateRow(
                strategy=strategy.name,
                device_bytes=sizes.device_bytes(shapes, strategy, step),
                host_bytes=sizes.host_bytes(shapes, strategy),
                checkpoint_bytes=size,
                disk_bytes=None if limit is None else (limit + 1) * size,
                save_seconds=size / speed if speed else None,
            )
        )
    if as_json:
        told = Estimate(shapes.total, shapes.trained, speed, num_processes, tuple(rows))
        typer.echo(json.dumps(told.as_dict(), indent=1))
        return
    console.table_that_fits(partial(_table, rows, limit))
    processes = counted(num_processes, "process")
    shared = f", shared by {sequences} (evaluations: whole rows)" if sequences > 1 else ""
    console.tell(
        f"{shapes.total:,} parameters, {shapes.trained:,} trained; {processes}, "
        f"{step.rows} x {step.length} tokens each{shared}. The disk writes {human_bytes(speed)} a "
        "second now; training stops for a part of a save only. Memory is a rough figure: "
        "activations depend on the model, and Python and the libraries take 0.6 GB a process of "
        "host memory.",
    )


def _table(rows: list[EstimateRow], limit: int | None, narrow: bool) -> Table:
    memory, seconds = ("memory", "save") if narrow else ("memory per device", "one save")
    table = Table(
        Column("strategy", least=16, elide="middle"),
        Column(memory, "right", worth=5),
        Column("host" if narrow else "host memory", "right", worth=2),
        Column("checkpoint", "right", worth=4),
        Column("disk" if narrow else f"disk ({limit} + 1)", "right", worth=3),
        Column(seconds, "right", worth=1),
    )
    for row in rows:
        counts = (row.device_bytes, row.host_bytes, row.checkpoint_bytes, row.disk_bytes)
        cells = ["" if count is None else human_bytes(count) for count in counts]
        took = row.save_seconds
        table.add_row(row.strategy, *cells, "" if took is None else f"{took:.1f} s")
    return table


def parse(recipe: Path, flags: list[str]) -> Recipe:
    """The recipe with these fields of it changed, as a launch reads it."""
    with loading(console):
        from keepstep.preflight.validate import validate
        from keepstep.recipe.parse import parse_recipe

    return parse_recipe(["--config", str(recipe), *flags], launched=False, validate=validate)


def _problems(
    recipe: Recipe, processes: int, config_file: Path | None, seen: Seen
) -> Iterator[Problem]:
    """Every problem, of the recipe, its rows and this machine; the Hub's only when it has been
    named."""
    with loading(console):
        from transformers.utils import is_torch_tf32_available

        from keepstep.preflight.kernels import kernels_here
        from keepstep.preflight.launch import check_launch, launch_in
        from keepstep.preflight.model import check_model_of
        from keepstep.preflight.probes import see_together
        from keepstep.preflight.validate import validate
        from keepstep.recipe.config import ConfigError
        from keepstep.trainer.publish_callback import Publishing

    problems, launch = [*validate(recipe), *check_model_of(recipe)], None
    seen.looked_at.append("the recipe's fields")
    if config_file is None:
        seen.not_looked_at.append("how it is launched: no --config_file is given")
    else:
        try:
            launch = launch_in(config_file, recipe)
            problems += [p for p in check_launch(launch, recipe) if p not in problems]
            seen.looked_at.append(f"{config_file}")
        except ConfigError as error:
            problems += error.problems
    yield from problems
    kernels = kernels_here(recipe)
    seen.speed += [kernels.line] if kernels else []
    if recipe.training.tf32 and not is_torch_tf32_available():  # a login node, say
        seen.not_looked_at.append("tf32: true, for this machine has no GPU that could do it")
    wrong = {p.code for p in problems if p.severity == "error"}
    if wrong & {"data", "model"}:
        seen.not_looked_at.append("the rows, until dataset and model are there")
    else:
        yield from _rows(recipe, processes, seen)
    if not recipe.training.output_dir or wrong & LEAVE_NO_SIZE:
        seen.not_looked_at.append("disk and memory of this machine")
        return
    yield from see_together(Path(recipe.training.output_dir))
    yield from _sizes(recipe, processes, launch, seen)
    if not any(p.code == "hub" for p in problems):
        yield from Publishing(recipe).check()
    seen.not_looked_at.append("the model's weights, other machines, and what training does")


def _sizes(recipe: Recipe, processes: int, launch: Launch | None, seen: Seen) -> Iterator[Problem]:
    """Whether the model has room in memory, and its checkpoints on the disk."""
    from keepstep.preflight.probes import check_model
    from keepstep.preflight.shapes import shapes_of, strategy_of

    shapes = shapes_of(recipe)
    if shapes is None:
        seen.not_looked_at.append("memory and disk: the model's config.json cannot be had")
        return
    strategy = replace(strategy_of(recipe), processes=processes)
    if launch is not None:
        strategy = replace(
            strategy,
            stage=launch.stage,
            offload_optimizer=launch.offloaded("optimizer") != "none",
            offload_parameters=launch.offloaded("param") != "none",
            sequences=launch.sequences,
        )
    yield from check_model(recipe, shapes, strategy)
    seen.looked_at.append("disk and memory of this machine, for the model's shapes")


def _rows(recipe: Recipe, processes: int, seen: Seen) -> Iterator[Problem]:
    """The first rows of local data, as they are and as tokens."""
    from keepstep.data.common import STREAM_SAMPLE
    from keepstep.data.dataset import load_data
    from keepstep.preflight.inspection import inspect
    from keepstep.recipe.config import ConfigError
    from keepstep.recipe.data_files import looks_local
    from keepstep.recipe.model import build_tokenizer

    names = [recipe.data.dataset_name, recipe.data.eval_dataset_name]
    names += list((recipe.data.eval_datasets or {}).values())
    names += [part.path for part in recipe.data.datasets if not part.data_files]
    remote = [name for name in names if name and not looks_local(name)]
    if remote:
        seen.not_looked_at.append(f"the rows of {', '.join(remote)}, which are on the Hub")
        return
    try:
        data = load_data(recipe.data, recipe.training, sample=True)
    except ConfigError as error:
        yield from error.problems
        return
    for what, part in data.parts.items():
        seen.looked_at.append(f"{what} rows, at most {STREAM_SAMPLE}, of {part.source}")
    seen.not_looked_at.append("the rows after those; a launch looks at each, and counts them")
    try:
        tokenizer = build_tokenizer(recipe.model, recipe.training)
        found = inspect(data, tokenizer, recipe, processes)
    except ConfigError as error:
        if looks_local(str(recipe.model.model_name_or_path)):
            yield from error.problems
        seen.not_looked_at.append("what the tokenizer makes of the rows: there is none at hand")
        return
    yield from found.problems
    count = ", ".join(f"{rows} {what}" for what, rows in found.tokenised.items())
    seen.looked_at.append(f"rows as tokens: {count}")


def _short_of_time(recipe: Recipe, walltime: float) -> list[Problem]:
    """What a job of so many seconds would lose; steps are as long as they have been."""
    from keepstep.recipe.config import Problem

    training = recipe.training
    run = RunFolder(training.output_dir or ".")
    step, interval = step_seconds(run), training.save_interval
    if isinstance(interval, AutoInterval):
        interval = seconds_apart(interval, costs_of(run.saves().values()))
    intervals = [interval or float("inf")]
    by_steps = training.save_strategy == "steps" and training.save_steps >= 1
    if by_steps and step is not None:
        intervals.append(training.save_steps * step)
    if not walltime / 2 < min(intervals) < float("inf"):
        return []
    hint = f"save_interval_seconds: {max(60, round(walltime / 10)):.0f}"
    if isinstance(training.save_interval, AutoInterval):
        hint = f"a higher max_save_overhead, or {hint}"
    return [
        Problem(
            f"a save every {min(intervals):.0f} s in jobs of {walltime:.0f} s: a job that dies "
            "may lose all of its work",
            hint,
            "walltime",
            "warning",
        )
    ]
