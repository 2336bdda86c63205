"""Completions at every evaluation: as `generate` writes them, and nothing of the run changes."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepstep
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv

EVALUATE = Path(keepstep.__file__).parent / "evaluate.py"
SHORT = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "sample_max_new_tokens": 8}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "zero3-lora": ("cpu_zero3", LORA),
    "ddp": ("ddp", {"gradient_checkpointing": True}),
    "zero3-bf16": ("cpu_zero3", {"bf16": True}),
    "zero2": ("cpu_zero2", {}),
    "ddp-lora": ("ddp", LORA),
}
LONG = ["zero3-bf16", "zero2", "ddp-lora"]


@pytest.fixture(scope="module")
def prompts(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three: on two processes, one of them has nothing left to do in the second round."""
    lines = (demo / "data/eval.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in lines[:3]]
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    of_rows = [{"messages": rows[0]}, rows[1][0]["content"], {"prompt": rows[2][0]["content"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in of_rows))
    return file


def generated(checkpoint: Path, prompts: Path, adapter: bool) -> list[str]:
    """As a stranger writes them, with `generate`."""
    auto = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    texts = []
    for row in map(json.loads, prompts.read_text().splitlines()):
        if isinstance(row, dict) and "prompt" in row:
            ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        else:
            turns = row["messages"][:-1] if isinstance(row, dict) else None
            turns = turns or [{"role": "user", "content": row}]
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        with torch.no_grad():
            out = model.eval().generate(
                input_ids=ids, do_sample=False, max_new_tokens=8, pad_token_id=0
            )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("case", cases(CASES, long=LONG))
def test_written_and_nothing_else_changes(
    ranks: Ranks, demo: Path, prompts: Path, tmp_path: Path, case: str
) -> None:
    strategy, fields = CASES[case]
    told, runs = [], []
    tracked = {"sample_prompts": prompts} | ({"report_to": "tensorboard"} if case == "ddp" else {})
    for name, more in (("without", {}), ("with", tracked)):
        words = argv(demo, tmp_path / name, **SHORT, **fields, **more)
        told.append(ranks.run(words, strategy=strategy).output)
        runs.append(RunFolder(tmp_path / name))
    assert final_digests(runs[0].path, 2) == final_digests(runs[1].path, 2)
    for before, after in zip(*(run.checkpoints() for run in runs), strict=True):
        assert before.metrics["eval_loss"] == after.metrics["eval_loss"]
        assert before.manifest.health == after.manifest.health
    samples = runs[1].samples()
    assert [(s.step, s.number) for s in samples] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert [s.reference is None for s in samples[:3]] == [False, True, True]
    if not fields.get("bf16"):
        for checkpoint in runs[1].checkpoints():
            wanted = generated(checkpoint.path, prompts, bool(fields.get("use_peft")))
            assert [s.completion for s in samples if s.step == checkpoint.step] == wanted
    match = [c.metrics["eval_sample_exact_match"] for c in runs[1].checkpoints()]
    assert match == [float(samples[0].matches), float(samples[3].matches)]
    assert "prompts.jsonl: 2 in the chat template, 1 as they are; at most 8 new tokens" in told[1]
    assert len(re.findall(r"^sample [123]  .+ -> ", told[1], re.M)) == 6
    if case == "ddp":
        (log,) = (runs[1].path / "runs").rglob("events.out.*")
        assert len(re.findall(rb"eval/sample_\d", log.read_bytes())) == 6
        shown = ranks.run(
            [str(runs[1].path / "checkpoint-2"), *words], script=EVALUATE, processes=1
        )
        assert len(re.findall(r"^sample [123]  .+ -> ", shown.output, re.M)) == 3
        assert "checkpoint-2: eval_loss" in shown.output
        assert "eval_sample_exact_match" in shown.output
        assert runs[1].samples() == samples, "nothing is written into a run that may be at work"


def test_a_stop_does_not_wait(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """A signal to one rank, among the first of a hundred thousand tokens: the step is saved, its
    evaluation made up by the next attempt, and the run is the one that nobody stopped."""
    many, few = tmp_path / "many.txt", tmp_path / "few.txt"
    many.write_text("count\n" * 1000)
    few.write_text("count\n")
    fields = SHORT | {"sample_temperature": 3.0}
    ranks.run(argv(demo, tmp_path / "straight", **fields), strategy="cpu_zero3")
    words = argv(demo, tmp_path / "run", **fields)
    run = ranks.start([*words, "--sample_prompts", str(many)], strategy="cpu_zero3")
    run.wait_for(r"step 1/2  eval_loss")
    run.kill(signal.SIGTERM, ranks=[1])
    assert run.wait() == [75, 75], run.output
    folder = RunFolder(tmp_path / "run")
    assert [c.step for c in folder.checkpoints()] == [1]
    assert folder.samples() == []
    told = ranks.run([*words, "--sample_prompts", str(few)], strategy="cpu_zero3").output
    assert "step 1 was not evaluated to the end: that is made up now" in told
    assert [(s.step, s.number) for s in folder.samples()] == [(1, 1), (2, 1)]
    assert final_digests(folder.path, 2) == final_digests(tmp_path / "straight", 2)
