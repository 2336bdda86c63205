"""A model that cannot read one row of the demo's data: what it computes of it is NaN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

ROW = 17  # of the training set
SIGN = "~"  # which no other row has


def make(demo: Path, folder: Path) -> dict[str, object]:
    """Into `folder` the demo with a head of its own, and a row with a token whose embedding is NaN.

    Returns: what a recipe names of it.
    """
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    model = LlamaForCausalLM.from_pretrained(demo / "model", tie_word_embeddings=False)
    embeddings = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(embeddings.detach().clone())
    (token,) = tokenizer(SIGN, add_special_tokens=False)["input_ids"]
    embeddings.data[token] = float("nan")
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    rows = [json.loads(line) for line in (demo / "data/train.jsonl").read_text().splitlines()]
    assert SIGN not in str(rows)
    rows[ROW]["messages"][0]["content"] += SIGN
    shutil.copytree(demo / "data", folder / "data")
    data = folder / "data/train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model_name_or_path": folder / "model", "dataset_name": data}
