"""What evaluations say of tokens is exact; several sets, and what ranks by them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepstep.run_folder.reader import Checkpoint, RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv

SETS = {"math": 13, "code": 3}  # rows: the last batch is never full, one set fills no batch at all
MEAN = "0.7*eval_math_loss + 0.3*eval_code_loss"
WRITTEN = "eval_math_loss*0.7 + eval_code_loss*0.3"


@pytest.fixture(scope="module")
def sets(still_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, rows = tmp_path_factory.mktemp("sets"), (still_demo / "data/eval.jsonl").read_text()
    lines, found = rows.splitlines(keepends=True), {}
    for name, count in SETS.items():
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
        found[name], lines = str(folder / f"{name}.jsonl"), lines[count:]
    return found


def recipe(demo: Path, run: Path, sets: dict[str, str], **fields: object) -> list[str]:
    fields = {"eval_datasets": json.dumps(sets), "metric_for_best_model": MEAN} | fields
    words = argv(demo, run, max_steps=4, eval_steps=2, save_steps=2, **fields)
    at = words.index("--eval_dataset_name")
    return words[:at] + words[at + 2 :]


def counted(checkpoint: Path, data: str) -> dict[str, float]:
    """As a stranger counts: a row at a time, over the assistant's tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    loss, right, tokens = 0.0, 0, 0
    for line in Path(data).read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(encoded["input_ids"][:64])
        mask = torch.tensor(encoded["assistant_masks"][:64])[1:].bool()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        loss += nll[mask].double().sum().item()
        right += int((logits.argmax(-1) == ids[1:])[mask].sum())
        tokens += int(mask.sum())
    return {"mean_token_accuracy": right / tokens, "perplexity": math.exp(loss / tokens)}


def check(checkpoint: Checkpoint, sets: dict[str, str]) -> None:
    for name, data in sets.items():
        for metric, value in counted(checkpoint.path, data).items():
            found = checkpoint.metrics[f"eval_{name}_{metric}"]
            if metric == "mean_token_accuracy":
                assert found == value, "counts are exact"
            else:
                assert found == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    "strategy",
    cases(["cpu_zero3", "cpu_zero2", "ddp", "one"], long=["cpu_zero2", "ddp", "one"]),
)
def test_several_sets(
    ranks: Ranks, still_demo: Path, sets: dict[str, str], tmp_path: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    alone = {"strategy": "ddp", "processes": 1} if strategy == "one" else {"strategy": strategy}
    told = ranks.run(recipe(still_demo, run, sets), **alone).output
    folder = RunFolder(run)
    assert folder.policy().metric == WRITTEN
    assert not folder.policy().greater_is_better
    assert "evaluation math: " in told, "where its rows come from"
    values = {}
    for checkpoint in folder.checkpoints():
        metrics = checkpoint.metrics
        values[checkpoint.step] = 0.7 * metrics["eval_math_loss"] + 0.3 * metrics["eval_code_loss"]
        assert metrics[WRITTEN] == pytest.approx(values[checkpoint.step], rel=1e-12)
        assert "eval_mean_token_accuracy" not in metrics, "of which set?"
    best = folder.best()
    assert best is not None
    assert best.step == min(values, key=lambda step: values[step])
    check(best, sets)
    assert f"({WRITTEN} " in told


@pytest.mark.parametrize("strategy", cases(["ddp", "cpu_zero3"], long=["cpu_zero3"]))
def test_packed_rows(ranks: Ranks, still_demo: Path, tmp_path: Path, strategy: str) -> None:
    """In one line without padding; those that fill up the last batch are in it, too."""
    run = tmp_path / "run"
    fields = {"packing": True, "per_device_eval_batch_size": 3, "attn_implementation": "eager"}
    words = argv(still_demo, run, max_steps=1, eval_steps=1, save_steps=1, **fields)
    ranks.run(words, strategy=strategy)
    both = RunFolder(run).checkpoints()[-1].metrics
    alone = tmp_path / "alone"
    again = ["--resume_from_checkpoint", str(run / "checkpoint-1"), "--resume_weights_only", "true"]
    words = argv(still_demo, alone, max_steps=1, eval_steps=1, save_steps=1, **fields)
    ranks.run(
        [*words, *again, "--learning_rate", "0", "--eval_on_start", "true"],
        strategy="ddp",
        processes=1,
    )
    one = RunFolder(alone).checkpoints()[-1].metrics
    for name in ("eval_mean_token_accuracy", "eval_perplexity", "eval_entropy"):
        assert one[name] == pytest.approx(both[name], rel=1e-5), name
    assert one["eval_mean_token_accuracy"] == both["eval_mean_token_accuracy"]
