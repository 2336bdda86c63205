"""A bad recipe ends in one message of the main process, exit status 2, before a model is loaded."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv

FSDP2 = Path(str(files("trl") / "accelerate_configs/fsdp2.yaml"))
MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown field": ({"max_step": 3}, ["unknown flag --max_step", "did you mean `max_steps`?"]),
    "missing file": ({"dataset_name": "no/such/file.jsonl"}, ["there is no no/such/file.jsonl"]),
    "wrong type": ({"learning_rate": "fast"}, ["'fast' is not a value of type float"]),
    "no usable column": (
        {"dataset_name": "DEMO/odd.jsonl"},
        ["the training data has no column to train on, but answer, question"],
    ),
    "no model": (
        {"model_name_or_path": "./nowhere"},
        ["./nowhere is no folder with a config.json"],
    ),
    "several": (
        {"eval_strategy": "no", "dataset_name": "no/such/file.jsonl", "eval_split_fraction": 2},
        ["3 problems", "there is no", "eval_split_fraction: 2.0", "nothing to rank them by"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_message(ranks: Ranks, demo: Path, workspace: Path, mistake: str) -> None:
    fields, expected = MISTAKES[mistake]
    (demo / "odd.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 4)
    fields = {name: str(v).replace("DEMO", str(demo)) for name, v in fields.items()}
    output_dir = workspace / "never-made"
    run = ranks.start(argv(demo, output_dir, **fields))
    assert run.wait() == [2, 2]
    for text in expected:
        assert text in run.output
    assert "Traceback" not in run.output
    assert run.output.count("keepstep: the recipe has") == 1
    assert len(run.output.splitlines()) <= 9
    assert not output_dir.exists()


def test_rows_that_the_chat_template_refuses(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """One far down, which is met when all are prepared: while the main process does, the other
    waits for its turn."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    bad = [{"role": "user", "content": "forbidden"}, turns[1]]
    rows = [*[{"messages": turns}] * 20, {"messages": bad}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = json.loads((demo / "model/tokenizer_config.json").read_text()).get("chat_template")
    template = template or (demo / "model/chat_template.jinja").read_text()
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0].content == 'forbidden' %}{{ raise_exception('no such words') }}"
        "{% endif %}" + template
    )
    fields = {"dataset_name": tmp_path / "x.jsonl", "chat_template_path": tmp_path / "strict.jinja"}
    run = ranks.start(argv(demo, tmp_path / "run", **fields), strategy="ddp")
    assert run.wait() == [2, 2]
    assert "training rows cannot be made into tokens: TemplateError: no such words" in run.output
    assert "Traceback" not in run.output
    assert run.output.count("keepstep: the recipe has") == 1


def test_a_launch_that_shares_out_in_another_way(ranks: Ranks, demo: Path, workspace: Path) -> None:
    output_dir = workspace / "never-made"
    run = ranks.start(argv(demo, output_dir), strategy=str(FSDP2))
    assert run.wait() == [2, 2]
    assert "FSDP (fully sharded data parallelism) is not supported [launch]" in run.output
    assert "Traceback" not in run.output
    assert run.output.count("keepstep: the recipe has") == 1
    assert not output_dir.exists()
