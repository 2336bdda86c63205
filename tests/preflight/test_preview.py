"""Rows as the model will see them: `keepstep preview`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from tests.helpers.recipes import argv

CHAT = {
    "messages": [
        {"role": "user", "content": "seven"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "eight"},
        {"role": "assistant", "content": "8"},
    ]
}
SEEN = (
    "<|im_start|>user\nseven<|im_end|>\n<|im_start|>assistant\n⟦7<|im_end|>⟧\n"
    "<|im_start|>user\neight<|im_end|>\n<|im_start|>assistant\n⟦8<|im_end|>⟧\n"
)
ALPACA = {"instruction": "Say it.", "input": "7", "output": "seven"}


def preview(
    demo: Path, tmp_path: Path, *rows: Any, flags: tuple[str, ...] = (), **more: Any
) -> Any:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1")
    fields = {"eval_strategy": "no", "keep_ranking": "recency", "max_length": 100} | more
    others = argv(demo, tmp_path / "run", **{"dataset_name": file} | fields)
    return CliRunner().invoke(app, ["preview", str(recipe), *others, *flags])


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_what_is_trained_on_is_marked(demo: Path, tmp_path: Path) -> None:
    told = preview(demo, tmp_path, CHAT, CHAT)
    assert told.exit_code == 0, told.output
    assert "training: " in told.output
    assert "rows.jsonl: 2 rows, 2 used, 0 cut, 0 dropped" in told.output
    assert SEEN in told.output
    assert told.output.count("<|im_start|>user\nseven") == 1
    told = preview(demo, tmp_path, CHAT, CHAT, flags=("--rows", "2"))
    assert told.output.count(SEEN) == 2


def test_rows_that_are_cut_and_dropped(demo: Path, tmp_path: Path) -> None:
    """Within 22 tokens, one row has its first answer, the other none."""
    long = {"messages": [{"role": "user", "content": "a b c d e f g h"}, CHAT["messages"][1]]}
    told = preview(demo, tmp_path, CHAT, long, max_length=22).output
    assert "2 rows, 1 used, 1 cut, 1 dropped" in told
    assert "lengths: 34 to 42 tokens, half of them at most 38" in told
    assert "row 1: 22 tokens, 2 of them trained on (⟦so⟧); 20 more are cut" in told
    assert "⟦8" not in told
    told = preview(demo, tmp_path, CHAT, long, max_length=22, flags=("--max_length", "100")).output
    assert "2 rows, 2 used, 0 cut, 0 dropped" in told
    assert "more are cut" not in told


def test_alpaca_and_a_stream(demo: Path, tmp_path: Path) -> None:
    told = preview(
        demo, tmp_path, ALPACA, assistant_only_loss=False, streaming=True, max_steps=5
    ).output
    assert "rows: alpaca: instruction, input, output" in told
    assert "user\nSay it.\n\n7<|im_end|>\n<|im_start|>assistant\n⟦seven<|im_end|>" in told


def test_packed_rows(demo: Path, tmp_path: Path) -> None:
    told = preview(demo, tmp_path, CHAT, CHAT, packing=True).output
    assert "2 rows, 2 used, 0 cut, 0 dropped\n" in told
    assert ", packed" in told
    assert SEEN in told
    told = preview(demo, tmp_path, CHAT, CHAT, packing=True, max_length=22).output
    assert "2 rows, 2 used, 2 cut, 0 dropped\n" in told
    assert "row 1: 22 tokens, 2 of them trained on (⟦so⟧); 20 more are cut" in told


def test_mistakes_are_told(demo: Path, tmp_path: Path) -> None:
    told = preview(demo, tmp_path, {"story": "a"})
    assert told.exit_code == 2
    assert "column_names: {text: story}" in told.output
    told = preview(demo, tmp_path, {"text": "a"})
    assert told.exit_code == 2
    assert "assistant_only_loss" in told.output
    told = preview(demo, tmp_path, CHAT, max_lenght=5)
    assert told.exit_code == 2
    assert "max_lenght" in told.output


def test_a_recipe_that_a_run_would_refuse(demo: Path, tmp_path: Path) -> None:
    """What rows depend on is told in the same words; the rest keeps nobody from seeing rows."""
    told = preview(demo, tmp_path, CHAT, dataset_name="gone.jsonl")
    assert told.exit_code == 2
    assert "dataset_name: there is no gone.jsonl" in told.output
    told = preview(demo, tmp_path, CHAT, max_length=-5)
    assert told.exit_code == 2
    assert "max_length: -5 is not above 0" in told.output
    told = preview(demo, tmp_path, CHAT, resume_from_checkpoint="newest")
    assert told.exit_code == 0
    assert SEEN in told.output
    assert f"a run refuses this recipe: keepstep check {tmp_path}/recipe.yaml" in told.output


def test_a_row_further_on_that_cannot_be_used(demo: Path, tmp_path: Path) -> None:
    pair = {"prompt": "q", "completion": "a"}
    rows = [*[pair] * 102, {"prompt": "q", "completion": None}]
    told = preview(demo, tmp_path, *rows, streaming=True, max_steps=1, assistant_only_loss=False)
    assert told.exit_code == 2, told.output
    assert "the training rows cannot be made into tokens" in told.output


def test_a_row_that_nothing_is_left_of(demo: Path, tmp_path: Path) -> None:
    """Packed, too: its place in a packed row teaches nothing."""
    long = {"prompt": "word " * 200, "completion": "a"}
    short = {"prompt": "q", "completion": "a"}
    fields: dict[str, Any] = {"assistant_only_loss": False, "packing": True, "max_length": 20}
    told = preview(demo, tmp_path, long, short, **fields)
    assert "2 rows, 1 used, 0 cut, 1 dropped" in told.output
    assert "more are cut: nothing is left to train on" in told.output
