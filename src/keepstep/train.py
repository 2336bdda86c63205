"""The story of one attempt: parse, validate, choose the checkpoint, build, train, tell.

    accelerate launch --config_file accelerate_configs/zero3.yaml \\
        -m keepstep.train --config launch/recipes/demo.yaml [--any_field value]
"""

from __future__ import annotations

from . import noise, preemption

if __name__ == "__main__":  # before the slow imports, which take seconds and write to the log
    preemption.install_handlers()
    noise.silence()

import sys
from collections.abc import Sequence

from transformers import PrinterCallback

from . import distributed
from .checkpoint.manager import CheckpointManager
from .checkpoint.selection import SelectionError
from .config import ConfigError, Problem, Recipe, parse_recipe
from .console import RunReporter, farewell, introduce, say, show_library_bars
from .data import load_data
from .model import build_tokenizer, trainer_arguments
from .outcome import CONFIG_EXIT_STATUS, Outcome, ended
from .preflight import validate
from .trainer import KeepstepTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attempt; returns the exit status. Ranks: all."""
    noise.silence_prints()
    show_library_bars()
    try:
        recipe = parse_recipe(sys.argv[1:] if argv is None else argv)
        return attempt(recipe).exit
    except ConfigError as error:
        say(error.report())
        if distributed.is_main():
            Outcome("failed", "configuration", exit=CONFIG_EXIT_STATUS).tell_shell()
        return CONFIG_EXIT_STATUS
    finally:
        distributed.leave()


def attempt(recipe: Recipe) -> Outcome:
    """Train until the end, or until somebody asks for a stop. Ranks: all (collective)."""
    agree(validate(recipe))
    train_rows, evaluation_rows = load_data(recipe.data, recipe.training)
    tokenizer = build_tokenizer(recipe.model, recipe.training)

    manager = CheckpointManager(str(recipe.training.output_dir), recipe.training.policy())
    manager.start()
    try:
        checkpoint, choice = manager.choose(recipe.training.resume_from_checkpoint)
    except (SelectionError, distributed.RankError) as error:
        raise ConfigError([Problem(str(error))]) from error
    if checkpoint is not None:
        recipe.training.eval_on_start = False  # this step has been evaluated

    trainer = KeepstepTrainer(
        args=recipe.training,
        manager=manager,
        train_dataset=train_rows,
        eval_dataset=evaluation_rows,
        processing_class=tokenizer,
        **trainer_arguments(recipe.model, recipe.training),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunReporter(trainer))
    introduce(trainer, recipe, checkpoint, choice)

    step, planned = checkpoint.step if checkpoint else 0, trainer.planned_steps()
    if step < planned:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        step = trainer.state.global_step
    else:
        say(f"This run has made its {planned} steps already: there is nothing to train.")

    best = manager.best()
    outcome = ended(
        "preempted" if trainer.preempted else "finished",
        reason=trainer.preempted,
        global_step=step,
        best_step=best.step if best else None,
    )
    manager.end(outcome)
    farewell(trainer, outcome, best)
    return outcome


def agree(problems: Sequence[Problem]) -> None:
    """Fail on every rank when one of them sees a problem. Ranks: all (collective)."""
    seen = [problem for of_rank in distributed.gather(list(problems)) for problem in of_rank]
    if seen:
        raise ConfigError(dict.fromkeys(seen))


if __name__ == "__main__":
    sys.exit(main())
