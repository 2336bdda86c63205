"""The story of one attempt: parse, validate, build, choose, train, tell.

    accelerate launch --config_file accelerate_configs/zero3.yaml \\
        -m keepstep.train --config launch/recipes/demo.yaml [--any_field value]
"""

from __future__ import annotations

from . import noise, preemption

if __name__ == "__main__":  # before the slow imports, which take seconds and write to the log
    preemption.install_handlers()
    noise.silence()

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback

from . import __version__, distributed
from .checkpoint.manager import CheckpointManager
from .checkpoint.runfolder import Committed
from .checkpoint.selection import Choice, SelectionError
from .config import ConfigError, Problem, Recipe, parse_recipe
from .console import RunReporter, show_library_bars
from .data import load_data
from .model import build_tokenizer, trainer_arguments
from .preflight import validate
from .trainer import KeepstepTrainer

# What `status.json` says of the end of an attempt, and the exit status that goes with it.
FINISHED, PREEMPTED, CONFIG, FAILED = 0, 75, 2, 70

console = Console(stderr=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one attempt; returns the exit status. Ranks: all."""
    show_library_bars(console.is_terminal and distributed.is_main())
    try:
        recipe = parse_recipe(sys.argv[1:] if argv is None else argv)
        return attempt(recipe)
    except ConfigError as error:
        _say(error.report())
        _tell_shell({"outcome": "failed", "reason": "configuration", "exit": CONFIG})
        return CONFIG
    finally:
        distributed.leave()


def attempt(recipe: Recipe) -> int:
    """Train until the end, or until somebody asks for a stop."""
    _agree(validate(recipe))
    train_rows, evaluation_rows = load_data(recipe.data, recipe.training)
    tokenizer = build_tokenizer(recipe.model, recipe.training)
    manager = CheckpointManager(recipe.training.output_dir or "", recipe.training.policy())
    manager.start()
    checkpoint, choice = _choose(manager, recipe)

    trainer = KeepstepTrainer(
        args=recipe.training,
        manager=manager,
        train_dataset=train_rows,
        eval_dataset=evaluation_rows,
        processing_class=tokenizer,
        **trainer_arguments(recipe.model, recipe.training),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunReporter(trainer, console))
    _introduce(trainer, recipe, checkpoint, choice)

    planned = trainer.planned_steps()
    if checkpoint is not None and checkpoint.step >= planned:
        _say(f"This run is finished: {checkpoint.step} of {planned} steps. Nothing to train.")
        return _end(manager, trainer, FINISHED, checkpoint.step)
    trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    return _end(
        manager, trainer, PREEMPTED if trainer.preempted else FINISHED, trainer.state.global_step
    )


def _agree(problems: Sequence[Problem]) -> None:
    """Fail on every rank when one of them sees a problem. Ranks: all (collective)."""
    seen = [p for of_rank in distributed.gather(list(problems)) for p in of_rank]
    if seen:
        raise ConfigError(dict.fromkeys(seen))


def _choose(manager: CheckpointManager, recipe: Recipe) -> tuple[Committed | None, Choice]:
    """The checkpoint to carry on from; without one, evaluation at the start makes sense."""
    try:
        checkpoint, choice = manager.choose(recipe.training.resume_from_checkpoint)
    except (SelectionError, distributed.RankError) as error:
        raise ConfigError([Problem(str(error))]) from error
    if checkpoint is not None:
        recipe.training.eval_on_start = False  # this step has been evaluated
    return checkpoint, choice


def _introduce(
    trainer: KeepstepTrainer, recipe: Recipe, checkpoint: Committed | None, choice: Choice
) -> None:
    """What is about to run, in four lines."""
    args = trainer.args
    stage = f"ZeRO-{trainer.zero_stage}" if trainer.zero_stage else "DDP"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    strategy = f"{stage}, {precision}" if args.world_size > 1 or trainer.zero_stage else precision
    counts = [getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()]
    trained = sum(
        getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    _say(
        f"keepstep {__version__}: {args.output_dir}, attempt {_attempt(trainer.manager)}, "
        f"{args.world_size} processes, {strategy}"
    )
    _say(
        f"model {recipe.model.model_name_or_path}: {sum(counts):,} parameters, {trained:,} trained; "
        f"batch {batch} over all processes"
    )
    for step, why in choice.passed_by.items():
        _say(f"passed by checkpoint-{step}: {why}")
    if checkpoint is not None:
        _say(f"resuming from checkpoint-{checkpoint.step}")


def _attempt(manager: CheckpointManager) -> int:
    return manager.writer.attempt if distributed.is_main() else 0


def _end(manager: CheckpointManager, trainer: KeepstepTrainer, code: int, step: int) -> int:
    """Write how the attempt ended, and tell. Ranks: all (collective)."""
    best = manager.best()
    outcome = {FINISHED: "finished", PREEMPTED: "preempted"}[code]
    status: dict[str, Any] = {
        "outcome": outcome,
        "reason": trainer.preempted,
        "global_step": step,
        "best_step": best.step if best else None,
        "exit": code,
    }
    distributed.on_main_process("writing status", lambda: manager.writer.write_status(status))
    manager.record("end", **status)
    _tell_shell(status)
    output_dir = trainer.args.output_dir
    if code == PREEMPTED:
        _say(
            f"Stopped on request ({trainer.preempted}) after step {step}; the state is saved. "
            "Run the same command again to go on."
        )
    else:
        metric = manager.policy.metric
        _say(f"Finished: {step} steps.")
        if best is not None and metric:
            _say(f"Best: {best.path} ({metric} {best.manifest.metrics[metric]:.4f})")
        _say(f"Checkpoints: keepstep ls {output_dir}")
        _say(f"Use it:      AutoModelForCausalLM.from_pretrained('{output_dir}/best')")
    return code


def _tell_shell(status: dict[str, Any]) -> None:
    """launch/train.sh asks for a copy of the status: launchers hide their workers' exit status."""
    path = os.environ.get("KEEPSTEP_STATUS_FILE")
    if path and distributed.is_main():
        Path(path).write_text(json.dumps(status) + "\n")


def _say(text: str) -> None:
    if distributed.is_main():
        console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
