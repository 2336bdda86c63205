"""What a person reads of an attempt before its first step."""

from __future__ import annotations

import datasets
import transformers
from transformers.trainer_utils import has_length

from keepstep import __version__
from keepstep.data.rows import line as rows_line
from keepstep.output.printable import printable
from keepstep.output.units import be, counted
from keepstep.policy.batch import Dealt
from keepstep.policy.rewind import named
from keepstep.policy.selection import Choice
from keepstep.ranks import collectives
from keepstep.ranks.console import console, say
from keepstep.recipe.config import Recipe
from keepstep.run_folder.reader import Checkpoint
from keepstep.trainer.protocol import CheckpointedTrainer


def show_library_bars() -> None:
    """Progress bars of datasets and transformers: on a terminal, by the main process only."""
    if not (console.moves_cursor and collectives.is_main()):
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def introduce(
    trainer: CheckpointedTrainer, recipe: Recipe, checkpoint: Checkpoint | None, choice: Choice
) -> None:
    """What is about to run, on which rows; where it carries on from, and why not elsewhere."""
    args = trainer.args
    parameters, trained = trainer.parameter_counts()
    say(
        f"keepstep {__version__}: {args.output_dir}, attempt {trainer.manager.attempt}, "
        f"{args.parallel_layout}, {args.precision}"
    )
    name = recipe.model.model_name_or_path or type(trainer.model).__name__
    say(f"{name}: {parameters:,} parameters, {trained:,} trained; {args.batch}")
    tell_rows(trainer)
    for remark in trainer.remarks():
        say(remark)
    before = Dealt.from_json(trainer.start.manifest.dealt) if trainer.start else None
    if trainer.asked != args.batch and before is not None:
        kept = before.batch.rows == args.batch.rows
        reason = "as many rows as before" if kept else f"not {before.batch.rows}, as before"
        say(f"(the recipe says {trainer.asked}; {reason})")
    if trainer.rows.skipped:
        say(f"{named(sorted(trainer.rows.skipped))} of the training set: left out from here on")
    for step, why in choice.passed_by.items():
        say(f"checkpoint-{step} is passed by: {printable(why)}")
    if choice.under_way:
        say(f"resume_from_checkpoint: {args.resume_from_checkpoint} was done by an earlier attempt")
    if checkpoint is not None and choice.weights_only:
        say(f"starting at step 0 with the weights of checkpoint-{checkpoint.step}")
    elif checkpoint is not None:
        say(f"carrying on from checkpoint-{checkpoint.step}{_planned(trainer, checkpoint)}")


def tell_rows(trainer: CheckpointedTrainer) -> None:
    """Which rows come from where, and what became of them: a line for training, one for
    each evaluation set."""
    for what, source in trainer.sources.items():
        rows = trainer.train_dataset if what == "training" else trainer.eval_dataset
        if isinstance(rows, dict):
            rows = rows[what.removeprefix("evaluation ")]
        count = trainer.counts.get(what)
        if not has_length(rows):
            told = "a stream: rows are not counted"
        else:
            told = (
                f"{counted(len(rows), 'row')}, taken as they are" if count is None else str(count)
            )
        say(rows_line(what, printable(source), told))
    for told in dict.fromkeys(filter(None, trainer.renamed.values())):
        say(f"rows: {printable(told)}")


def _planned(trainer: CheckpointedTrainer, checkpoint: Checkpoint) -> str:
    before, planned = checkpoint.manifest.planned_steps, trainer.planned_steps()
    if before in (planned, 0):  # 0: not known, of one that was adopted
        return ""
    steps = f"{counted(planned, 'step')} {be(planned)}"
    return f"; {steps} planned now, not {before}: the learning rate's curve changes"
