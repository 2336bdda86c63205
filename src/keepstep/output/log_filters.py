"""Known harmless third-party lines, silenced by name; nothing else is. Imports nothing slow.

Seen with transformers 5.23, trl 1.16, accelerate 1.15, deepspeed 0.19.8, torch 2.13.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib import import_module

WARNINGS = (
    # DeepSpeed calls names that torch 2.13 has renamed, at every step.
    r"`torch\.distributed\.\w+` is deprecated\. Please use",
    # TRL's SFTConfig sets the field that transformers 5.23 has renamed.
    r"`(is_)?gradient_checkpointing` is deprecated",
)
LOGS = (
    # DeepSpeed, at import, on a machine without a GPU.
    ("DeepSpeed", "Setting accelerator to CPU"),
    # Tied weights are stored once; Trainer's loader of plain checkpoints misses their second name.
    ("transformers.trainer", "missing keys in the checkpoint model loaded: ['lm_head.weight']"),
    # Settings that make a difference are compared by keepstep, and accepted by name.
    ("transformers.trainer_utils", "do not match the ones in the `trainer_state.json`"),
    # Trainer accumulates by itself, and tells Accelerate 1.
    ("accelerate.accelerator", "Gradient accumulation steps mismatch"),
)
# Read by the libraries at import.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"}
# Read by tqdm at import: the bars of datasets, transformers and huggingface_hub are as keepstep's,
# after two seconds, one line of 80 columns, gone in the end. (An empty text is its False.)
BARS = {
    "TQDM_DELAY": "2",
    "TQDM_LEAVE": "",
    "TQDM_BAR_FORMAT": "{desc:.24} {bar:8} {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left",
}
LOGGERS = ("trl", "accelerate", "peft", "DeepSpeed")


def silence() -> None:
    """Silence the lines above, and what a bar would flash; on other ranks than the main one,
    everything but errors.

    Call it before the slow imports: some of the lines are written by them. Ranks: any.
    """
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, text in LOGS:
        logging.getLogger(name).addFilter(_Without(text))
    for name, value in BARS.items():  # a person's own go before
        os.environ.setdefault(name, value)
    if os.environ.get("RANK", "0") != "0":
        warnings.filterwarnings("ignore")
        os.environ.update(QUIET)
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)


def silence_prints() -> None:
    """DeepSpeed prints "… built successfully" on every rank at every start. Ranks: any."""
    # Not `from deepspeed.comm import torch`: that name is PyTorch there.
    vars(import_module("deepspeed.comm.torch"))["print"] = lambda *args, **kwargs: None


class _Without(logging.Filter):
    """Lets everything pass that does not hold a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()
