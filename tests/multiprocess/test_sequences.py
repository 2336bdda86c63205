"""Processes that share out each row's tokens (ALST/Ulysses) train as one process does.

That such a run, killed and carried on, is the same bit for bit: test_resume.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv

# 64 rows, 12 a step: an epoch's last step has 4, fewer than the micro-batches that attention is
# made for. Clipped: else the size of gradients would be no matter to Adam.
FIELDS = {
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant_with_warmup",
    "learning_rate": 1e-3,
    "max_grad_norm": 0.5,
}
SHARED = "each row's tokens are shared out among 2 processes (DeepSpeed ALST/Ulysses)"
ROUNDING = 2e-5


def curve(run: Path) -> list[float]:
    """Of steps and evaluations: losses, gradient norms, tokens."""
    last = RunFolder(run).checkpoints()[-1]
    history = json.loads((last.path / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "eval_loss", "eval_mean_token_accuracy", "grad_norm", "num_tokens")
    return [entry[name] for entry in history for name in names if name in entry]


def test_two_one_four(ranks: Ranks, still_demo: Path, tmp_path: Path) -> None:
    """Two processes that share each row; one; four, two of which share each row. The same losses,
    norms and numbers of tokens as on one process from the beginning to the end."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    command = argv(still_demo, alone, **FIELDS)
    ranks.run(command, strategy="cpu_zero3", processes=1)

    def carry_on(steps: int, strategy: str, processes: int) -> str:
        fields = FIELDS | {"max_steps": steps}
        command = argv(still_demo, run, **fields)
        return ranks.run(command, strategy=strategy, processes=processes).output

    log = carry_on(4, "cpu_zero3-sp2", 2)
    assert SHARED in log
    assert "12 rows a step (1 x 6, 2 accumulated)" in log
    log = carry_on(8, "cpu_zero3", 1)
    assert "resharded checkpoint-4: 2 x ZeRO-3 → 1 x ZeRO-3" in log
    log = carry_on(12, "cpu_zero2-sp2", 4)
    assert SHARED in log
    assert "12 rows a step (2 x 6, 1 accumulated)" in log
    assert curve(run) == pytest.approx(curve(alone), abs=ROUNDING, rel=100 * ROUNDING)
    made, expected = (RunFolder(r).checkpoint(12).manifest for r in (run, alone))
    assert (made.world_size, made.dealt["batch"]["world_size"]) == (4, 2)
    assert made.samples == expected.samples
    assert made.about["tokens"] == expected.about["tokens"]


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["zero1-sp2", "cpu_zero2-sp2", "cpu_zero3-sp2"])
@pytest.mark.parametrize("kind", ["full", "lora", "streamed"])
def test_the_same_losses(
    ranks: Ranks, still_demo: Path, tmp_path: Path, strategy: str, kind: str
) -> None:
    fields = FIELDS | {
        "full": {"gradient_checkpointing": True},
        "streamed": {"streaming": True},
    }.get(kind, LORA | {"lora_dropout": 0.0})
    for run, how in (("alone", ("ddp", 1)), ("shared", (strategy, 2))):
        command = argv(still_demo, tmp_path / run, **fields)
        ranks.run(command, strategy=how[0], processes=how[1])
    found, expected = curve(tmp_path / "shared"), curve(tmp_path / "alone")
    assert found == pytest.approx(expected, abs=ROUNDING, rel=100 * ROUNDING)


def test_what_cannot_be_shared_is_told_before_anything_is_loaded(
    ranks: Ranks, still_demo: Path, tmp_path: Path
) -> None:
    run = ranks.start(
        argv(still_demo, tmp_path / "run", packing=True, attn_implementation="eager"),
        strategy="cpu_zero3-sp2",
        processes=3,
    )
    assert run.wait() == [2, 2, 2]
    assert "sp_size: 2) does not divide 3 processes" in run.output
    assert "sequence parallelism (sp_size: 2) does not go with packing" in run.output
    assert "attn_implementation: eager, and sequence parallelism" in run.output
