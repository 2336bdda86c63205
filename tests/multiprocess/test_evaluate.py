"""Checkpoints evaluated afterwards: the value that the run itself had, beside the manifest."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

import keepstep
from keepstep.run_folder.evaluations import EVALUATIONS_NAME
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.ranks import Ranks, Run
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
    command = [str(run / "checkpoint-2"), *words]
    ranks.run(command, script=PROGRAM, strategy="ddp", processes=1)
    name = "eval_mean_token_accuracy"
    if not fields.get("bf16"):
        assert measured(checkpoint.path)[name] == checkpoint.manifest.metrics[name]


def test_a_new_set_ranks(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other.jsonl"
    other.write_text("".join((demo / "data/train.jsonl").read_text().splitlines(True)[:5]))
    words = argv(demo, run, **SHORT)
    ranks.run(words, strategy="ddp")
    # All of them have a loss by now, of other rows.
    words_of_other = [str(run), *words, "--eval_dataset_name", str(other)]
    told = ranks.start(words_of_other, script=PROGRAM, strategy="ddp")
    assert told.wait() == [2, 2]
    steps = "checkpoint-2, checkpoint-4"
    assert f"these are other rows than {steps} was evaluated on (eval_dataset)" in told.output
    assert not list(run.glob(f"*/{EVALUATIONS_NAME}"))
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


def without_eval_rows(words: list[str]) -> list[str]:
    at = words.index("--eval_dataset_name")
    return [*words[:at], *words[at + 2 :]]


def test_one_name_is_one_set_of_rows_and_a_damaged_checkpoint_costs_no_other(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = without_eval_rows(argv(demo, run, **SHORT, save_only_model=True))
    eval_rows = ["--eval_dataset_name", str(demo / "data/eval.jsonl")]
    ranks.run([*words, *eval_rows], strategy="cpu_zero2")

    def measure(rows: str, strategy: str = "ddp") -> Run:
        sets = ["--eval_datasets", json.dumps({"other": str(demo / rows)})]
        sets += ["--output_dir", str(tmp_path / "elsewhere")]
        return ranks.start([str(run), *words, *sets], script=PROGRAM, strategy=strategy)

    sharded = measure("data/eval.jsonl", "cpu_zero2")
    assert sharded.wait() == [2, 2]
    assert "KEEPSTEP_CONFIG=ddp" in sharded.output  # weights alone
    with (run / "checkpoint-2/config.json").open("a") as file:
        file.write(" ")
    told = measure("data/eval.jsonl")
    assert told.wait() == [70, 70]
    assert "not evaluated: checkpoint-2 is damaged: config.json" in told.output
    four = RunFolder(run).checkpoint(4)
    assert measured(four.path)["eval_other_loss"] == pytest.approx(four.metrics["eval_loss"], 1e-3)
    mixed = measure("data/train.jsonl")
    assert mixed.wait() == [2, 2]
    assert "other rows than checkpoint-4 was evaluated on (other)" in mixed.output
    assert not (tmp_path / "elsewhere").exists(), "the run has a folder"


@pytest.mark.parametrize("number", cases([signal.SIGINT, signal.SIGSTOP], long=[signal.SIGSTOP]))
def test_stopped_or_frozen_it_ends_and_says_so(
    ranks: Ranks, demo: Path, tmp_path: Path, number: int
) -> None:
    run, many = tmp_path / "run", tmp_path / "many.jsonl"
    patience = {"peer_timeout_seconds": 5} if number == signal.SIGSTOP else {}
    words = argv(demo, run, **SHORT, **patience)
    ranks.run(words, strategy="ddp")
    many.write_text((demo / "data/train.jsonl").read_text() * 50)
    sets = ["--eval_datasets", json.dumps({"many": str(many)})]
    told = ranks.start([str(run), *without_eval_rows(words), *sets], script=PROGRAM, strategy="ddp")
    told.wait_for("checkpoint-2: eval_many_loss")
    if number == signal.SIGSTOP:
        told.kill(number, ranks=[1])
        told.wait_for("rank 1 on .* gave no sign of life for 5 s")
        told.kill(signal.SIGKILL)
        return
    told.kill(number)
    assert told.wait() == [75, 75]
    assert "What was measured stands" in told.output
    assert [c.step for c in RunFolder(run).checkpoints() if c.evaluated] == [2]
