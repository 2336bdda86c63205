"""Models of random weights and rows of random words, made on the machine: nothing is downloaded.

python -m benchmarks.gpu.inputs MILLIONS FOLDER [--device cuda] [--words 40]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

# Millions of parameters → hidden size, layers, heads (vocabulary 32,000, untied, MLP 8/3 hidden).
SHAPES = {
    1: (16, 1, 2),
    30: (320, 8, 5),
    134: (768, 12, 12),
    500: (1536, 14, 16),
    1240: (2048, 22, 16),
    3140: (3072, 26, 24),
}
VOCABULARY = 32_000
POSITIONS = 64


def make_inputs(
    folder: Path,
    shape: tuple[int, int, int],
    *,
    device: str = "cpu",
    words: int = 40,
    shortest: int | None = None,
    rows: int = 256,
) -> None:
    """A Llama with its tokenizer in `folder`/model, rows of so many words in `folder`/rows.jsonl.

    Args:
        folder: is made.
        shape: hidden size, layers, heads.
        device: where the weights are drawn: billions of them take minutes on a CPU.
        words: of a row, and tokens, but for the last one that TRL adds.
        shortest: rows have from so many words to `words`; None: all have `words`.
        rows: how many.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads = shape
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(POSITIONS, 2 * words),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    if device != "cpu":  # written as it will be trained, in half of the bytes
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    chance = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows):
            length = words if shortest is None else chance.randint(shortest, words)
            text = " ".join(f"w{chance.randrange(2, VOCABULARY)}" for _ in range(length))
            file.write(json.dumps({"text": text}) + "\n")


def save_tokenizer(folder: Path) -> None:
    """One token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("millions", type=int, choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--words", type=int, default=40)
    parser.add_argument("--shortest", type=int)
    parser.add_argument("--rows", type=int, default=256)
    arguments = vars(parser.parse_args())
    make_inputs(arguments.pop("folder"), SHAPES[arguments.pop("millions")], **arguments)


if __name__ == "__main__":
    main()
