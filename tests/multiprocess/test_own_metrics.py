"""A user's metrics: counted as a stranger counts, on any processes; what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepstep
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import LORA, argv
from tests.multiprocess.test_evaluations import recipe
from tests.multiprocess.test_evaluations import sets as sets  # a fixture
from tests.project.documents import blocks

OWN = PROGRAMS / "own_metrics.py"
EVALUATE = Path(keepstep.__file__).parent / "evaluate.py"
SHORT = {"max_steps": 4, "eval_steps": 2, "save_steps": 2}


def counted(checkpoint: Path, data: str) -> dict[str, float]:
    """As a stranger counts: a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    top1 = top2 = top5 = twice = tokens = 0
    for line in Path(data).read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(encoded["input_ids"][:64])
        mask = torch.tensor(encoded["assistant_masks"][:64])[1:].bool()
        with torch.no_grad():
            best = model(input_ids=ids[None]).logits[0, :-1].topk(5).indices
        hits = (best == ids[1:, None])[mask]
        top1, top2 = top1 + int(hits[:, 0].sum()), top2 + int(hits[:, :2].sum())
        top5 += int(hits.sum())
        twice, tokens = twice + int((ids[:-1] == ids[1:])[mask].sum()), tokens + int(mask.sum())
    counts = {"top1": top1, "top2": top2, "top5": top5, "twice": twice}
    return {name: count / tokens for name, count in counts.items()}


@pytest.mark.parametrize("strategy", cases(["cpu_zero3", "ddp"], long=["ddp"]))
def test_counted(
    ranks: Ranks, still_demo: Path, sets: dict[str, str], tmp_path: Path, strategy: str
) -> None:
    """Several sets, one of which ranks; afterwards, too, by another number of processes."""
    run = tmp_path / "run"
    fields = {"metric_for_best_model": "eval_math_top2", "greater_is_better": True}
    words = recipe(still_demo, run, sets, metrics=f"{OWN}:several", **fields)
    told = ranks.run(words, strategy=strategy).output
    assert "eval_math_top2 " in told
    folder = RunFolder(run)
    best = folder.best()
    assert best is not None
    values = {c.step: c.metrics["eval_math_top2"] for c in folder.checkpoints()}
    assert best.step == max(values, key=lambda step: values[step])
    for name, data in sets.items():
        for metric, value in counted(best.path, data).items():
            if metric != "top5":
                assert best.metrics[f"eval_{name}_{metric}"] == value, "counts are exact"
        known = best.metrics[f"eval_{name}_known"]
        assert known == best.metrics[f"eval_{name}_mean_token_accuracy"]
        assert f"eval_{name}_never" not in best.metrics
    (documented,) = [b.text for b in blocks("python") if "def top5" in b.text]
    (tmp_path / "other.py").write_text(documented)
    alone: dict[str, Any] = {"strategy": "ddp", "processes": 1}
    words[words.index("--metrics") + 1] = f"{tmp_path}/other.py:top5"
    ranks.run([str(run), *words], script=EVALUATE, **alone)
    for name, data in sets.items():
        found = folder.checkpoint(best.step).metrics
        assert found[f"eval_{name}_top5"] == counted(best.path, data)["top5"]
    told = ranks.run([str(run), *words], script=EVALUATE, **alone).output
    assert "eval_math_top5 already: nothing is evaluated" in told
    assert "checkpoint-" not in told


@pytest.mark.parametrize("case", cases(["packed", "lora"], long=["lora"]))
def test_nothing_else_changes(ranks: Ranks, demo: Path, tmp_path: Path, case: str) -> None:
    """Loss, weights and what other metrics say are those without; a sum that is not a number is
    none, and the run goes on. A checkpoint without is evaluated afterwards."""
    fields: dict[str, object] = SHORT | (LORA if case == "lora" else {})
    if case == "packed":
        fields |= {"packing": True, "per_device_eval_batch_size": 3, "attn_implementation": "eager"}
    runs = []
    for name, own in (("without", {}), ("with", {"metrics": f"{OWN}:cheap"})):
        words = argv(demo, tmp_path / name, **fields, **own)
        ranks.run(words, strategy="ddp")
        runs.append(RunFolder(tmp_path / name))
    before, after = (
        [(c.step, c.manifest.files, dict(c.metrics)) for c in r.checkpoints()] for r in runs
    )
    for (step, files, metrics), (_, same_files, more) in zip(before, after, strict=True):
        state = ("model.safetensors", "adapter_model.safetensors", "optimizer.pt")
        digests = {n: f.xxh3_128 for n, f in files.items() if n in state or "rng" in n}
        assert digests == {n: same_files[n].xxh3_128 for n in digests}, step
        assert len(digests) >= 4
        kept = {n: v for n, v in metrics.items() if not n.endswith(("runtime", "_per_second"))}
        assert {n: more[n] for n in kept} == kept
        assert more["eval_known"] == more["eval_mean_token_accuracy"]
        assert "eval_nothing" not in more, "it is not a number"
    run = tmp_path / "without"
    words = argv(demo, run, **fields, metrics=f"{OWN}:cheap")
    ranks.run([str(run), *words], script=EVALUATE, strategy="ddp")
    assert [c.metrics["eval_known"] for c in RunFolder(run).checkpoints()] == [
        m["eval_known"] for _, _, m in after
    ]


def test_what_ranks_has_to_be_given(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Told before the first step."""
    run = tmp_path / "run"
    fields = {"metric_for_best_model": "eval_topp1", "greater_is_better": True}
    words = argv(demo, run, **SHORT, **fields, metrics=f"{OWN}:cheap")
    started = ranks.start(words, strategy="ddp")
    assert started.wait() == [2, 2], started.output
    assert "the evaluation has not given eval_topp1" in started.output
    assert "it gives eval_" in started.output
    assert "step 1/" not in started.output


@pytest.mark.parametrize("strategy", cases(["cpu_zero3", "ddp"], long=["ddp"]))
def test_a_function_that_fails(ranks: Ranks, demo: Path, tmp_path: Path, strategy: str) -> None:
    """On one rank, in the middle of the run: both end and name it, and nothing is lost."""
    run = tmp_path / "run"
    words = argv(demo, run, **SHORT, metrics=f"{OWN}:fails", save_strategy="no")
    started = ranks.start(words, strategy=strategy, env={"FAIL_AT": "2"})
    assert started.wait() == [2, 2], started.output
    (line,) = {line for line in started.output.splitlines() if "it raised" in line}
    assert "own_metrics.py:fails: it raised KeyError: 'no such row'" in line
    assert "on rank 1 (own_metrics.py, line " in line
    assert [c.step for c in RunFolder(run).checkpoints()] == [2]
    told = ranks.run(words, strategy=strategy).output
    assert "step 2 was not evaluated to the end: that is made up now" in told
    assert RunFolder(run).checkpoints()[0].metrics["eval_fine"] == 1
