"""A vision-language model of 150,000 random weights, and rows with images: made by the tests."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.ranks import ROOT

COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (30, 60, 220), "white": (250,) * 3}
SIZE, PATCH = 32, 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def picture(number: int) -> tuple[bytes, str]:
    """A PNG of a square on a background, and what is on it; each number has another."""
    rng = random.Random(number)
    back, front = rng.sample(sorted(COLORS), 2)
    image = Image.new("RGB", (SIZE + number % 5, SIZE), COLORS[back])
    at = rng.randrange(SIZE // 2), rng.randrange(SIZE // 2)
    image.paste(COLORS[front], (*at, at[0] + 8, at[1] + 8))
    image.putpixel((0, 0), (number % 256, number // 256, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), f"a {front} square on {back}"


def turns(answer: str) -> dict[str, Any]:
    """As prompt and completion, of turns of plain text."""
    asked = {"role": "user", "content": "what is it?"}
    return {"prompt": [asked], "completion": [{"role": "assistant", "content": answer}]}


def write_rows(file: Path, count: int, first: int = 0) -> None:
    """JSONL whose rows name their images, which lie beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(first, first + count):
        png, answer = picture(number)
        (file.parent / f"{number}.png").write_bytes(png)
        rows.append({"images": [f"{number}.png"], **turns(answer)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_processor() -> Any:
    sys.path.insert(0, str(ROOT / "launch/examples"))
    import make_demo
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = make_demo.make_tokenizer([picture(n)[1] + " what is it?" for n in range(50)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_vision(folder: Path, dropout: float = 0.1, rows: int = 24) -> Path:
    """`model`, a Llava, and `data/{train,eval}.jsonl`, of `rows` and 8 rows."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    processor = make_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            attention_dropout=dropout,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_rows(folder / "data/train.jsonl", rows)
    write_rows(folder / "data/eval.jsonl", 8, first=100)
    return folder


def fields(vision: Path, output_dir: Path, **others: object) -> dict[str, object]:
    """Of a recipe with short steps: 4 of them are a pass on two processes."""
    return {
        "model_name_or_path": vision / "model",
        "dataset_name": vision / "data/train.jsonl",
        "eval_dataset_name": vision / "data/eval.jsonl",
        "assistant_only_loss": False,
        "max_length": 128,
        "max_steps": 8,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4,
        "output_dir": output_dir,
        **others,
    }
