"""What a script gives to KeepstepTrainer, each kind in a run: inputs.py FOLDER DEMO CASE…

Each case is trained straight through, and in another run folder interrupted after step 3 and
carried on by a new trainer of the same process.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from keepstep import KeepstepConfig, KeepstepTrainer
from tests.helpers.folders import final_digests

FOLDER, DEMO, *CASES = sys.argv[1:]
ROWS = Dataset.from_json(f"{DEMO}/data/train.jsonl")
EVALUATION = Dataset.from_json(f"{DEMO}/data/eval.jsonl")
LORA = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


class Interrupted(TrainerCallback):
    """A person's Ctrl-C after step 3."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(f"{DEMO}/model", dtype=torch.float32)


def of_plain_text(row: dict[str, Any]) -> str:
    return " = ".join(message["content"] for message in row["messages"])


def accuracy(predictions: Any) -> dict[str, float]:
    guessed, labels = predictions.predictions[:, :-1], predictions.label_ids[:, 1:]
    return {"hits": float(np.mean(guessed[labels != -100] == labels[labels != -100]))}


def own_optimizers() -> dict[str, Any]:
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3, betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return {"model": trained, "optimizers": (optimizer, schedule)}


def given(case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments, and the config's fields."""
    if case == "object":
        return {"model": model()}, {}
    if case == "adapter":
        return {"peft_config": LoraConfig(**LORA)}, {}
    if case == "adapted":
        torch.manual_seed(0)
        return {"model": get_peft_model(model(), LoraConfig(**LORA))}, {}
    if case == "half-adapter":  # as TRL casts one over a quantized model
        torch.manual_seed(0)
        half = model().to(torch.bfloat16)
        return {"model": get_peft_model(half, LoraConfig(**LORA), autocast_adapter_dtype=False)}, {}
    if case == "collator":
        tokenizer = AutoTokenizer.from_pretrained(f"{DEMO}/model")
        pad = tokenizer.pad_token_id
        return {"data_collator": DataCollatorForLanguageModeling(pad, pad_to_multiple_of=16)}, {}
    if case == "metrics":
        metric = {"metric_for_best_model": "hits", "greater_is_better": True}
        argmax = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
        return {"compute_metrics": accuracy} | argmax, metric
    if case == "formatting":
        return {"formatting_func": of_plain_text}, {}
    if case == "stream":
        return {"train_dataset": ROWS.to_iterable_dataset()}, {}
    if case == "several":
        parts = {"even": EVALUATION.shard(2, 0), "odd": EVALUATION.shard(2, 1)}
        return {"eval_dataset": parts}, {"metric_for_best_model": "eval_odd_loss"}
    if case == "optimizers":
        return own_optimizers(), {}
    if case == "optimizer-class":
        return {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})}, {}
    if case == "no-evaluation":
        return {"eval_dataset": None}, {}
    raise ValueError(case)


def trained(case: str, run: Path, *callbacks: TrainerCallback) -> KeepstepTrainer:
    arguments, fields = given(case)
    known: dict[str, Any] = {
        **{"max_steps": 6, "save_steps": 2, "max_length": 64, "per_device_train_batch_size": 4},
        **{"learning_rate": 4e-3, "logging_steps": 1, "report_to": "none"},
        **{"gradient_checkpointing": False, "greater_is_better": False, "output_dir": str(run)},
    }
    args = KeepstepConfig(**known | fields)
    arguments = {
        **{"model": f"{DEMO}/model", "train_dataset": ROWS, "eval_dataset": EVALUATION},
        **{"callbacks": list(callbacks), "args": args},
    } | arguments
    trainer = KeepstepTrainer(**arguments)
    trainer.train()
    return trainer


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def same(straight: Path, broken: Path) -> bool:
    """Whether the last checkpoints hold the same, bit for bit. (Of a text that stands twice in a
    pickle, it depends on where the texts came from whether the second is a reference.)"""
    digests, others = final_digests(straight, 6), final_digests(broken, 6)
    apart = [name for name in digests | others if digests.get(name) != others.get(name)]
    pairs = [
        [torch.load(run / "checkpoint-6" / name) for run in (straight, broken)]
        for name in apart
        if name == "optimizer.pt"
    ]
    return len(pairs) == len(apart) and all(equal(*pair) for pair in pairs)


for case in CASES:
    straight, broken = Path(FOLDER) / case, Path(FOLDER) / f"{case}-broken"
    handler = signal.getsignal(signal.SIGINT)
    trained(case, straight)
    interrupted = trained(case, broken, Interrupted())
    carried_on = trained(case, broken)
    assert signal.getsignal(signal.SIGINT) is handler
    assert carried_on.start is not None
    outcomes = interrupted.outcome.outcome, carried_on.start.step, carried_on.outcome.outcome
    ranking = carried_on.manager.policy.ranking
    print(f"case {case}: {outcomes} {same(straight, broken)} {ranking}", flush=True)
