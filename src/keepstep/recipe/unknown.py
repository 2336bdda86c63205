"""What was meant by a field that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from keepstep.recipe.problems import Problem

# What other trainers, older libraries and habit call it.
MEANT = {
    **dict.fromkeys(("lr", "learningrate", "base_lr"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "train_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps", "total_steps", "max_train_steps"), "max_steps"),
    **dict.fromkeys(
        ("batch_size", "train_batch_size", "per_device_batch_size", "micro_batch_size", "bs"),
        "per_device_train_batch_size",
    ),
    **dict.fromkeys(("eval_batch_size", "test_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(
        ("gradient_accumulation", "grad_accum", "accumulation_steps", "grad_accumulation_steps"),
        "gradient_accumulation_steps",
    ),
    **dict.fromkeys(("model", "model_name", "model_id", "base_model"), "model_name_or_path"),
    **dict.fromkeys(
        ("dataset", "data", "data_path", "train_file", "train_data", "dataset_path"), "dataset_name"
    ),
    **dict.fromkeys(
        ("eval_dataset", "eval_data", "validation_file", "eval_file", "val_data"),
        "eval_dataset_name",
    ),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len", "seq_length", "seq_len"),
        "max_length",
    ),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("evaluation_strategy", "evals_per_epoch"), "eval_strategy"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "lr_scheduler_type"),
    **dict.fromkeys(("optimizer", "optimizer_type"), "optim"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("grad_clip", "gradient_clipping", "clip_grad"), "max_grad_norm"),
    **dict.fromkeys(("torch_dtype", "precision"), "dtype"),
    **dict.fromkeys(("lora_rank", "r", "rank"), "lora_r"),
    **dict.fromkeys(("alpha",), "lora_alpha"),
    **dict.fromkeys(("target_modules", "lora_target"), "lora_target_modules"),
    **dict.fromkeys(("modules_to_save",), "lora_modules_to_save"),
    **dict.fromkeys(("lora", "peft"), "use_peft"),
    **dict.fromkeys(("flash_attention", "use_flash_attention_2"), "attn_implementation"),
    **dict.fromkeys(("out", "output", "out_dir", "run_dir", "save_dir"), "output_dir"),
    **dict.fromkeys(("resume", "checkpoint"), "resume_from_checkpoint"),
    **dict.fromkeys(("save_every", "checkpoint_every"), "save_steps"),
    **dict.fromkeys(("save_interval", "checkpoint_interval"), "save_interval_seconds"),
    **dict.fromkeys(("eval_every",), "eval_steps"),
    **dict.fromkeys(("log_every",), "logging_steps"),
    **dict.fromkeys(("early_stopping", "patience"), "early_stopping_patience"),
    **dict.fromkeys(("val_size", "eval_split", "val_set_size"), "eval_split_fraction"),
    **dict.fromkeys(("no_cuda",), "use_cpu"),
    **dict.fromkeys(("group_by_length",), "train_sampling_strategy"),
    **dict.fromkeys(("chat_template",), "chat_template_path"),
    **dict.fromkeys(("hub_repo", "repo_id", "hub_repo_id"), "hub_model_id"),
    **dict.fromkeys(("random_seed",), "seed"),
}
# What is asked for in another way.
INSTEAD = {
    "env": "environment variables are set in the shell, before the launch",
    "overwrite_output_dir": "keepstep overwrites nothing: resume_from_checkpoint: never",
    "num_processes": "the launcher's: KEEPSTEP_PROCESSES, or accelerate launch --num_processes",
    "config_file": "the launcher's: KEEPSTEP_CONFIG, or accelerate launch --config_file",
    "mixed_precision": "the launcher's; in a recipe it is `bf16: true` or `fp16: true`",
    "evaluate_during_training": "`eval_strategy: steps`",
}


def close_to(name: str, known: Collection[str]) -> str | None:
    """The field that was meant, as far as that can be told."""
    plain = name.replace("-", "_").lower()
    if plain in known:
        return plain
    meant = MEANT.get(plain)
    if meant in known:
        return meant
    close = difflib.get_close_matches(plain, known, n=1)
    return close[0] if close else None


def unknown(name: str, value: Any, known: Collection[str], kind: str) -> Problem:
    """A field, or a flag, that there is not; and what there is."""
    what = f"unknown {kind}{name}"
    if isinstance(value, Mapping):
        inside = [n for n in map(str, value) if close_to(n, known)]
        if inside:
            told = ", ".join(inside[:3]) + (", …" if len(inside) > 3 else "")
            return Problem(what, f"a recipe has no sections: write {told} at its top level")
    instead = INSTEAD.get(name.replace("-", "_"))
    if instead:
        return Problem(what, instead)
    meant = close_to(name, known)
    return Problem(what, f"did you mean `{meant}`?" if meant else "`--help` lists every field.")
