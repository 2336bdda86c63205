"""keepstep as a script uses it: two_lines.py RUN DEMO [JSON: the config's fields, `kill`, `train`].

`kill` is a step: the last rank is killed in the middle of that step's save; `raise` is one after
which a callback fails; `evaluate` one at whose end a callback evaluates by itself, and the last
rank is asked to stop; `hold` one behind which the last rank stands still until it has heard a
signal, so that the run is at work then, however late that comes. `train` is what train() is given.
But for these the script is what a person would write.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from datasets import Dataset
from transformers import TrainerCallback

from keepstep import KeepstepConfig, KeepstepTrainer
from keepstep.ranks import collectives, signals
from keepstep.save.rank_part import Part

RUN, DEMO, *OTHERS = sys.argv[1:]
FIELDS = json.loads(OTHERS[0]) if OTHERS else {}
KILL, RAISE, EVALUATE, HOLD, REQUEST = (
    FIELDS.pop(name, None) for name in ("kill", "raise", "evaluate", "hold", "train")
)
finish = Part.finish


def killed(self: Part) -> None:
    """Some of its files are written; nobody has committed."""
    if self.folder.name == f"checkpoint-{KILL}" and self.rank == collectives.world_size() - 1:
        print(f"killed in the save of step {KILL}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self)


class Told(TrainerCallback):
    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        while hasattr(optimizer, "optimizer"):  # Accelerate's, DeepSpeed's
            optimizer = optimizer.optimizer
        entries = f"{len(optimizer.state)} {lr_scheduler.last_epoch}"
        print(f"begins at {state.global_step}: {entries}", flush=True)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == HOLD and args.process_index == args.world_size - 1:
            while signals.requested() is None:
                time.sleep(0.01)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == RAISE:
            raise RuntimeError("a person's own mistake")
        if state.global_step == EVALUATE:
            if args.process_index == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            loss = trainer.evaluate(metric_key_prefix="own")["own_loss"]
            print(f"rank {args.process_index}: evaluated by itself: {loss > 0}", flush=True)

    def on_checkpoint_committed(self, args, state, control, checkpoint, **kwargs):
        there = (checkpoint.path / "manifest.json").is_file()
        print(f"rank {args.process_index}: committed {checkpoint.step} {there}", flush=True)


def told(args: KeepstepConfig) -> dict[str, str]:
    """Its fields. (Of DeepSpeed's settings transformers itself fills in what is `auto`, and the
    distributed state is Accelerate's own, one for the whole process.)"""
    others = ("deepspeed_plugin", "distributed_state")
    return {name: repr(value) for name, value in vars(args).items() if name not in others}


if KILL is not None:
    Part.finish = killed  # type: ignore[method-assign]

fields = {
    **{"max_steps": 12, "max_length": 64, "per_device_train_batch_size": 4, "save_steps": 4},
    **{"per_device_eval_batch_size": 8, "learning_rate": 4e-3, "warmup_steps": 2},
    **{"logging_steps": 1, "gradient_checkpointing": False, "report_to": "none"},
}
args = KeepstepConfig(output_dir=RUN, **fields | FIELDS)
before = told(args)
trainer = KeepstepTrainer(
    model=f"{DEMO}/model",
    args=args,
    train_dataset=Dataset.from_json(f"{DEMO}/data/train.jsonl"),
    eval_dataset=Dataset.from_json(f"{DEMO}/data/eval.jsonl"),
    callbacks=[Told()],
)
result = trainer.train(resume_from_checkpoint=REQUEST)
after = told(args)
assert after == before, [name for name in after if after[name] != before.get(name)]
print(f"rank {args.process_index}: {trainer.outcome.outcome} at {result.global_step}", flush=True)
trainer.evaluate()  # after the run: what was shared out and hooked is still whole
sys.exit(trainer.outcome.exit)
