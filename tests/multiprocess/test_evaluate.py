"""Checkpoints evaluated afterwards: the value that the run itself had, beside the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import keepstep
from keepstep.run_folder.evaluations import EVALUATIONS_NAME
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv

PROGRAM = Path(keepstep.__file__).parent / "evaluate.py"
SHORT = {"max_steps": 4, "eval_steps": 2, "save_steps": 2}

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "zero3-bf16": ("cpu_zero3", {"bf16": True}),
    "zero2-shards": ("cpu_zero2", {"bf16": True, "save_weights": "never"}),
    "ddp-lora": ("ddp", LORA),
    "zero3-lora": ("cpu_zero3", LORA),
    "ddp": ("ddp", {}),
}
LONG = ["zero2-shards", "ddp-lora", "zero3-lora", "ddp"]


def measured(folder: Path) -> dict[str, float]:
    """Without what is of time."""
    found = json.loads((folder / EVALUATIONS_NAME).read_text())["metrics"]
    return without_time(found)


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    return {n: v for n, v in metrics.items() if not n.endswith(("runtime", "_per_second"))}


@pytest.mark.parametrize(
    "case", cases(["zero3-bf16", "zero2-shards", "ddp-lora", "zero3-lora", "ddp"], long=LONG)
)
def test_the_value_is_the_runs_own(ranks: Ranks, demo: Path, tmp_path: Path, case: str) -> None:
    strategy, fields = CASES[case]
    run = tmp_path / "run"
    words = argv(demo, run, **SHORT, **fields)
    ranks.run(words, strategy=strategy)
    before = {c.step: c.manifest.to_json() for c in RunFolder(run).checkpoints()}
    told = ranks.run([str(run), *words], script=PROGRAM, strategy=strategy).output
    assert "nothing is evaluated" in told
    ranks.run([str(run / "checkpoint-2"), *words], script=PROGRAM, strategy=strategy)
    checkpoint = RunFolder(run).checkpoint(2)
    assert measured(checkpoint.path) == without_time(checkpoint.manifest.metrics)
    assert {c.step: c.manifest.to_json() for c in RunFolder(run).checkpoints()} == before
    alone = {"strategy": "ddp", "processes": 1}
    ranks.run([str(run / "checkpoint-2"), *words], script=PROGRAM, **alone)
    name = "eval_mean_token_accuracy"
    if not fields.get("bf16"):
        assert measured(checkpoint.path)[name] == checkpoint.manifest.metrics[name]


def test_a_new_set_ranks(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.jsonl"
    other.write_text("".join((demo / "data/train.jsonl").read_text().splitlines(True)[:5]))
    words = argv(demo, run, **SHORT)
    ranks.run(words, strategy="ddp")
    path = run / "checkpoint-2"
    told = ranks.start(
        [str(path), *words, "--eval_dataset_name", str(other)], script=PROGRAM, strategy="ddp"
    )
    assert told.wait() == [2, 2]
    assert "these are other rows than checkpoint-2 was evaluated on" in told.output
    assert not (path / EVALUATIONS_NAME).exists()
    sets = ["--eval_datasets", json.dumps({"other": str(other)})]
    at = words.index("--eval_dataset_name")
    ranks.run([str(run), *words[:at], *words[at + 2 :], *sets], script=PROGRAM, strategy="ddp")
    folder = RunFolder(run)
    losses = {c.step: c.metrics["eval_other_loss"] for c in folder.checkpoints()}
    assert sorted(losses) == [2, 4]
    records = {r.step: r.value for r in folder.records("eval_loss + 0.5*eval_other_loss")}
    for c in folder.checkpoints():
        assert records[c.step] == pytest.approx(c.metrics["eval_loss"] + losses[c.step] / 2)
        assert folder.faults(c, deep=True) == []
