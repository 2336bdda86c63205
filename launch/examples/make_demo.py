"""Make the demo's model and data from nothing: no download, the same bytes every time.

    python launch/examples/make_demo.py .demo

writes `.demo/model` (a Llama of 853,120 parameters with random weights, and a byte-level BPE
tokenizer trained on the spot) and `.demo/data/{train,eval}.jsonl`: three small tasks with exact
answers (a date in words, a number in words, a 24-hour time in 12-hour form). The training set is
small on purpose: the model overfits, so that the best checkpoint is not the last one.
"""

import argparse
import json
import random
from pathlib import Path

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def number_in_words(n: int) -> str:
    """0 to 9999 in English words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (f" {number_in_words(n % 100)}" if n % 100 else "")
    return f"{ONES[n // 1000]} thousand" + (f" {number_in_words(n % 1000)}" if n % 1000 else "")


def ordinal_in_words(n: int) -> str:
    """1 to 31 in English words: twenty-first."""
    if n > 20 and n % 10:
        return f"{TENS[n // 10]}-{ordinal_in_words(n % 10)}"
    irregular = {1: "first", 2: "second", 3: "third", 5: "fifth", 8: "eighth", 9: "ninth"}
    irregular |= {12: "twelfth", 20: "twentieth", 30: "thirtieth"}
    return irregular.get(n) or f"{number_in_words(n)}th"


def date_task(rng: random.Random) -> tuple[str, str]:
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    words = f"{ordinal_in_words(day)} of {MONTHS[month - 1]} {number_in_words(year)}"
    return f"{year}-{month:02}-{day:02}", words


def number_task(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(0, 9999)
    return f"{n}", number_in_words(n)


def clock_task(rng: random.Random) -> tuple[str, str]:
    hour, minute = rng.randint(0, 23), rng.randint(0, 59)
    return f"{hour:02}:{minute:02}", (
        f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}"
    )


def make_rows(count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """`count` different questions, the three tasks in turn, in `messages` layout."""
    rng = random.Random(seed)
    tasks = [date_task, number_task, clock_task]
    answers: dict[str, str] = {}
    while len(answers) < count:
        question, answer = tasks[len(answers) % 3](rng)
        answers.setdefault(question, answer)
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in answers.items()
    ]


def write_jsonl(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_model(tokenizer, seed: int, dropout: float, layers: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def make(
    folder: Path, train_rows: int = 64, dropout: float = 0.0, seed: int = 0, layers: int = 4
) -> None:
    """Write model, tokenizer and data under `folder`; the same arguments give the same bytes."""
    rows = make_rows(train_rows + 96, seed)
    # Interleaved tasks: a plain cut keeps all three on both sides, and no question on both.
    write_jsonl(folder / "data/train.jsonl", rows[:train_rows])
    write_jsonl(folder / "data/eval.jsonl", rows[train_rows:])
    tokenizer = make_tokenizer([m["content"] for row in rows for m in row["messages"]])
    tokenizer.save_pretrained(folder / "model")
    make_model(tokenizer, seed, dropout, layers).save_pretrained(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train_rows", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.0, help="attention dropout")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.train_rows, arguments.dropout, arguments.seed)
    print(f"Model and data are in {arguments.folder}")


if __name__ == "__main__":
    main()
