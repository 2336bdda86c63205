"""The same by TRL alone: `python -m benchmarks.gpu.plain REPORT WARM STEPS COUNT [fields]`.

As trl/scripts/sft.py (1.16) does, with a meter; arguments and report as in program.py. Nothing of
keepstep is imported: the time to the first step is that of a user who has never heard of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from benchmarks.gpu.meter import Meter, Report, finish
from datasets import load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

OURS = ("--keep_ranking",)  # fields of a benchmark's recipe that are keepstep's own


def main(path: str, warm: str, steps: str, count: str, *argv: str) -> None:
    report = Report("plain")
    meter = Meter(report, int(warm), int(steps), count == "count")
    pairs = zip(argv[::2], argv[1::2], strict=True)
    words = [word for pair in pairs if pair[0] not in OURS for word in pair]
    words += ["--max_steps", str(int(warm) + int(steps))]
    if not torch.cuda.is_available():  # else the config counts one process (transformers 5.23)
        words += ["--use_cpu", "True"]
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script, training, model = parser.parse_args_and_config(words)
    training.model_init_kwargs = {
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load_dataset("json", data_files=script.dataset_name, split="train"),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[meter],
    )
    meter.trainer = trainer
    trainer.train()
    finish(report, Path(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
