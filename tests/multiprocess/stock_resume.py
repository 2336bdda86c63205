"""Resume a keepstep checkpoint with TRL's own SFTTrainer: stock_resume.py CHECKPOINT [fields]."""

from __future__ import annotations

import sys

from trl import SFTTrainer

from keepstep import distributed, model, train
from keepstep.parsing import parse_recipe

CHECKPOINT, *ARGV = sys.argv[1:]
recipe = parse_recipe(ARGV)
inputs, _, _ = train.gather_inputs(recipe)
trainer = SFTTrainer(
    args=recipe.training, **inputs, **model.trainer_arguments(recipe.model, recipe.training, None)
)
try:
    trainer.train(resume_from_checkpoint=CHECKPOINT)
    for entry in trainer.state.log_history:
        if distributed.is_main() and "loss" in entry:
            print(f"stock {entry['step']} {entry['loss']}", flush=True)
except RuntimeError as error:
    print(f"stock refuses: {str(error)[:200]}", flush=True)
distributed.leave()
