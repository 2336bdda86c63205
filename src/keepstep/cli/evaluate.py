"""`keepstep evaluate`: what was not measured while a run trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepstep.cli import completers
from keepstep.cli.common import app, checkpoints_at, examples, fail, no_checkpoint
from keepstep.cli.start import PASS_ALL_ON, become
from keepstep.policy.manifest import step_of


@app.command(
    context_settings=PASS_ALL_ON,
    epilog=examples(
        "keepstep evaluate runs/mine recipe.yaml",
        'keepstep evaluate runs/mine recipe.yaml --eval_datasets \'{"law": "data/law.jsonl"}\'',
        "KEEPSTEP_PROCESSES=1 KEEPSTEP_CONFIG=ddp keepstep evaluate runs/mine/checkpoint-500 "
        "recipe.yaml",
    ),
)
def evaluate(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CHECKPOINT",
            help="A run folder: those of its checkpoints that lack a loss of these evaluation "
            "sets. Or one checkpoint-N of it.",
            autocompletion=completers.runs_or_checkpoints,
        ),
    ],
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE [--field value ...]",
            help="The run's recipe, and fields of it with other values. KEEPSTEP_PROCESSES and "
            "KEEPSTEP_CONFIG as for `keepstep launch`.",
        ),
    ],
) -> None:
    """Evaluate checkpoints afterwards; ranking, links and publishing follow."""
    folder, found = checkpoints_at(path)
    if not found and step_of(path.resolve().name) is not None:
        no_checkpoint(path, folder)
    if not found:
        fail(f"{path}: no committed checkpoint")
    become(
        "launch/train.sh",
        "keepstep evaluate",
        recipe,
        *context.args,
        KEEPSTEP_EVALUATE=str(path),
    )
