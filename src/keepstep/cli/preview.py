"""`keepstep preview`: rows as the model will see them, before hours are spent on them."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from keepstep.cli.check import PASS_ON, RecipeArgument, parse
from keepstep.cli.common import app, console, examples
from keepstep.output import log_filters
from keepstep.output.loading import loading
from keepstep.output.printable import quoted
from keepstep.output.units import counted

if TYPE_CHECKING:
    from keepstep.preflight.preview import Preview

STAND_IN_THE_WAY = {"data", "model", "field", "number"}  # errors, of what rows depend on
OPENS, CLOSES = "⟦", "⟧"  # what is trained on stands between them


@app.command(
    context_settings=PASS_ON, epilog=examples("keepstep preview recipe.yaml --max_length 512")
)
def preview(
    context: typer.Context,
    recipe: RecipeArgument,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of each part to show.")] = 1,
) -> None:
    """Show the first rows as the model will see them, and how many are cut or dropped."""
    log_filters.silence()
    with loading(console):
        import datasets

        from keepstep.data.dataset import load_data  # torch and TRL: seconds to import
        from keepstep.preflight.inspection import inspect
        from keepstep.preflight.kernels import kernels_here
        from keepstep.preflight.preview import previews
        from keepstep.preflight.validate import validate
        from keepstep.recipe.config import ConfigError
        from keepstep.recipe.model import build_tokenizer

    if not console.moves_cursor:
        datasets.disable_progress_bars()
    try:
        asked = parse(recipe, context.args)
        wrong = [problem for problem in validate(asked) if problem.severity == "error"]
        if any(problem.code in STAND_IN_THE_WAY for problem in wrong):
            raise ConfigError(wrong)
        data = load_data(asked.data, asked.training)
        tokenizer = build_tokenizer(asked.model, asked.training)
        problems = inspect(data, tokenizer, asked).problems
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            raise ConfigError(errors)
        for problem in problems:
            console.tell_lines(f"warning: {problem.told()}")
        for seen in previews(data, tokenizer, asked, rows):
            console.tell_whole(_told(seen))
        kernels = kernels_here(asked)
        if kernels is not None:
            console.tell_lines(f"speed, here: {kernels.line}")
        if wrong:  # nothing that rows depend on
            console.tell_lines(
                f"warning: a run refuses this recipe: keepstep check {quoted(recipe)}"
            )
    except ConfigError as error:
        console.tell_lines(error.report())
        raise typer.Exit(2) from error


def _told(seen: Preview) -> str:
    all_of = "" if seen.whole else "the first "
    lines = [f"{seen.what}: {seen.source}: {all_of}{seen.count}"]
    if seen.renamed:
        lines.append(f"rows: {seen.renamed}")
    lengths = seen.lengths
    told = f"{lengths[0]:,} to {lengths[-1]:,} tokens, half of them at most {median(lengths):,.0f}"
    lines.append(f"lengths: {told}{', packed' if seen.packed else ''}")
    for number, row in enumerate(seen.rows, 1):
        lost = f"; {row.lost:,} more are cut" if row.lost else ""
        lines.append("")
        lines.append(
            f"row {number}: {counted(row.tokens, 'token')}, {row.trained:,} of them trained on "
            f"({OPENS}so{CLOSES}){lost}{'' if row.trained else ': nothing is left to train on'}"
        )
        lines.append("".join(f"{OPENS}{t}{CLOSES}" if on else t for on, t in row.spans))
    return "\n".join([*lines, ""])
