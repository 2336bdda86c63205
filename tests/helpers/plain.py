"""The stock Trainer's own save, of a trainer that is keepstep's otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from trl import SFTTrainer


def save_plain(trainer: Any, folder: Path) -> None:
    """Write `folder/checkpoint-N` as SFTTrainer does, rotation included. Ranks: all."""
    args, engine = trainer.args, trainer.deepspeed if trainer.is_deepspeed_enabled else None
    kept = args.output_dir, args.save_total_limit
    ours = engine.checkpoint_engine if engine else None
    kind, trainer.__class__ = trainer.__class__, SFTTrainer
    args.output_dir, args.save_total_limit = str(folder), 1
    try:
        if engine:
            engine.checkpoint_engine = TorchCheckpointEngine()
        trainer._save_checkpoint(trainer.model, None)
    finally:
        trainer.__class__ = kind
        args.output_dir, args.save_total_limit = kept
        if engine:
            engine.checkpoint_engine = ours
