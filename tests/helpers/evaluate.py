"""Evaluate checkpoints the way a stranger would: from_pretrained and a plain loop, no keepstep.

    python -m tests.helpers.evaluate EVAL.jsonl ROWS_PER_BATCH CHECKPOINT ...

prints one JSON line: checkpoint → evaluation loss over the assistant's tokens, the mean over
batches of the mean over a batch's tokens, as Trainer computes it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def evaluate(checkpoint: Path, rows: list[dict], batch_rows: int) -> float:
    adapter = (checkpoint / "adapter_config.json").exists()
    auto = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    losses = []
    for start in range(0, len(rows), batch_rows):
        total, tokens = 0.0, 0
        for row in rows[start : start + batch_rows]:
            encoded = tokenizer.apply_chat_template(
                row["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            ids = torch.tensor(encoded["input_ids"][:64])
            mask = torch.tensor(encoded["assistant_masks"][:64])[1:].bool()
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")
            total, tokens = total + nll[mask].sum().item(), tokens + int(mask.sum())
        losses.append(total / tokens)
    return sum(losses) / len(losses)


def evaluate_apart(data: Path, checkpoints: Iterable[Path], timeout: float = 300) -> dict:
    """Checkpoint → loss, by a fresh process that does not know keepstep; 8 rows a batch."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.evaluate", data, "8", *checkpoints],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=True,
    )
    return {Path(name): loss for name, loss in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    data, batch_rows, *checkpoints = sys.argv[1:]
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    print(json.dumps({c: evaluate(Path(c), rows, int(batch_rows)) for c in checkpoints}))


if __name__ == "__main__":
    main()
