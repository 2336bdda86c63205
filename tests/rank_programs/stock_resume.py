"""Resume a keepstep checkpoint with TRL's own SFTTrainer: stock_resume.py CHECKPOINT [fields]."""

from __future__ import annotations

import gc
import sys

from trl import SFTTrainer

from keepstep import train
from keepstep.ranks import collectives
from keepstep.recipe import model
from keepstep.recipe.parse import parse_recipe


def resume(checkpoint: str, argv: list[str]) -> None:
    """The trainer is gone when this returns: DDP must not outlive its process group."""
    recipe = parse_recipe(argv)
    inputs, _, _ = train.gather_inputs(recipe)
    del inputs["sources"], inputs["renamed"]  # told by keepstep's trainer
    arguments = model.trainer_arguments(recipe.model, recipe.training, None)
    trainer = SFTTrainer(**inputs, **arguments)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        for entry in trainer.state.log_history:
            if collectives.is_main() and "loss" in entry:
                print(f"stock {entry['step']} {entry['loss']}", flush=True)
    except RuntimeError as error:
        print(f"stock refuses: {str(error)[:200]}", flush=True)


resume(sys.argv[1], sys.argv[2:])
gc.collect()
collectives.leave()
