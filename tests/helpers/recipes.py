"""Command lines for small runs of the demo model."""

from __future__ import annotations

from pathlib import Path

LORA = {"use_peft": True, "lora_r": 8, "lora_dropout": 0.1, "lora_target_modules": "all-linear"}


def argv(demo: Path, output_dir: Path, **fields: object) -> list[str]:
    """The demo's recipe with short steps; `fields` win."""
    values: dict[str, object] = {
        "model_name_or_path": demo / "model",
        "dataset_name": demo / "data/train.jsonl",
        "eval_dataset_name": demo / "data/eval.jsonl",
        "output_dir": output_dir,
        "max_length": 64,
        "assistant_only_loss": True,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 4e-3,
        "warmup_steps": 2,
        "gradient_checkpointing": False,
        "eval_steps": 4,
        "save_steps": 4,
        "save_total_limit": 4,
        "logging_steps": 1,
        "report_to": "none",
        **fields,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]
