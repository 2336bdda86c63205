"""The classic lesson on checkpoints, made true: what is kept, which is best, resume from it.

    python launch/examples/checkpoint_demo.py runs/checkpoint-demo

A GPT-2-shaped model from a config (no download) is trained with LoRA on four texts, evaluated and
saved every two steps; two checkpoints are kept. Then a new trainer resumes from the best one.
"""

import shutil
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from keepstep import KeepstepConfig, KeepstepTrainer

TRAIN = [
    "A checkpoint is a promise that the work so far is not lost.",
    "The best checkpoint is not always the last one.",
    "Save often enough, and keep the ones that matter.",
    "A resumed run goes on as if nothing had happened.",
]
EVALUATION = [
    "The last checkpoint is a promise that the run goes on.",
    "Keep the best checkpoint, and the last one.",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAIN + EVALUATION, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def make_trainer(run: Path, epochs: int) -> KeepstepTrainer:
    """A trainer for the run folder; nothing says yet where it begins."""
    set_seed(0)
    tokenizer = make_tokenizer()
    shape = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    return KeepstepTrainer(
        model=GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **tokens)),
        args=KeepstepConfig(
            output_dir=str(run),
            num_train_epochs=epochs,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=5e-3,
            max_length=64,
            eval_steps=2,
            save_steps=2,
            save_total_limit=2,
            logging_steps=2,
            gradient_checkpointing=False,
            report_to="none",
            seed=0,
        ),
        train_dataset=Dataset.from_dict({"text": TRAIN}),
        eval_dataset=Dataset.from_dict({"text": EVALUATION}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
        ),
    )


def tell(trainer: KeepstepTrainer) -> None:
    kept = [checkpoint.path.name for checkpoint in trainer.manager.run.checkpoints()]
    best = trainer.manager.best()
    assert best is not None
    print(f"kept: {', '.join(kept)}")
    print(f"best: {best.path.name}, eval_loss {best.manifest.metrics['eval_loss']:.4f}")


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/checkpoint-demo")
    shutil.rmtree(run, ignore_errors=True)

    print("Two epochs of two steps:")
    trainer = make_trainer(run, epochs=2)
    trainer.train()
    tell(trainer)

    print("A new trainer, from the best checkpoint, for one epoch more:")
    trainer = make_trainer(run, epochs=3)
    trainer.train(resume_from_checkpoint="best")
    assert trainer.start is not None
    print(f"resumed at step {trainer.start.step}")
    tell(trainer)
    sys.exit(trainer.outcome.exit)


if __name__ == "__main__":
    main()
