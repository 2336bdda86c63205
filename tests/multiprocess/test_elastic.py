"""The same command on other processes: the same state, the same rows, the same curve."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keepstep.checkpoint.runfolder import RunFolder
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv

SCRIPT = Path(__file__).parent / "elastic.py"
ROWS, PER_STEP, STEPS = 64, 12, 16  # an epoch has 6 steps, the last one of 4 rows
# Sums in another order: a loss of 5 has an ulp of 5e-7, and what differs grows with the steps.
ROUNDING = 2e-5
FIELDS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": STEPS,
    "eval_strategy": "no",
    "keep_ranking": "recency",
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
}
KINDS = {"full": {}, "lora": LORA | {"lora_dropout": 0.0}}


class Chain:
    """A run that is launched again and again, on whatever is left."""

    def __init__(self, ranks: Ranks, demo: Path, folder: Path, **fields: object) -> None:
        self.ranks, self.watch, self.output_dir = ranks, folder / "watch", folder / "run"
        self.command = argv(demo, self.output_dir, **FIELDS | fields)

    def launch(self, strategy: str, processes: int, stop: int = 0) -> str:
        """Train until `stop` (0: the end); the log."""
        run = self.ranks.start(
            [str(self.watch), str(stop), *self.command],
            strategy=strategy,
            processes=processes,
            script=SCRIPT,
        )
        codes = run.wait()
        assert codes == [75 if stop else 0] * processes, run.output
        assert run.output.count("all equal") == run.output.count("restored ")
        return run.output

    def rows(self) -> dict[int, list[str]]:
        """What each step was trained on, in all attempts together."""
        steps: dict[int, list[str]] = {}
        for file in sorted(self.watch.glob("rows-*.jsonl")):
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                steps.setdefault(entry["step"], []).extend(entry["rows"])
        return {step: sorted(rows) for step, rows in steps.items()}

    def curve(self) -> dict[int, tuple[float, float, float]]:
        """Step → loss, learning rate, gradient norm."""
        last = RunFolder(self.output_dir).checkpoints()[-1]
        history = json.loads((last.path / "trainer_state.json").read_text())["log_history"]
        names = ("loss", "learning_rate", "grad_norm")
        return {e["step"]: tuple(e[n] for n in names) for e in history if "loss" in e}


@pytest.fixture(scope="module")
def straight(ranks: Ranks, still_demo: Path, workspace: Path) -> dict[str, Chain]:
    """Runs that nothing interrupts: two processes from the beginning to the end."""
    chains = {}
    for kind, fields in KINDS.items():
        chains[kind] = Chain(ranks, still_demo, workspace / f"straight-{kind}", **fields)
        chains[kind].launch("cpu_zero3", 2)
    return chains


def compare(chain: Chain, straight: Chain, rounding: float = ROUNDING) -> None:
    """The same rows and learning rates at every step, the same losses but for rounding."""
    assert chain.rows() == straight.rows()
    found, expected = chain.curve(), straight.curve()
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, (loss, rate, norm) in found.items():
        assert rate == expected[step][1]
        assert loss == pytest.approx(expected[step][0], abs=rounding)
        assert norm == pytest.approx(expected[step][2], rel=100 * rounding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["zero1", "cpu_zero2", "cpu_zero3"])
def test_two_one_two_three(
    ranks: Ranks, still_demo: Path, tmp_path: Path, straight: dict, strategy: str, kind: str
) -> None:
    chain = Chain(ranks, still_demo, tmp_path, **KINDS[kind])
    stage = strategy[-1]
    chain.launch(strategy, 2, stop=4)
    log = chain.launch(strategy, 1, stop=8)
    assert re.search(rf"resharded checkpoint-4: 2 x ZeRO-{stage} → 1 x ZeRO-{stage}, .* GB/s", log)
    assert "12 rows a step (1 x 6, 2 accumulated)" in log
    assert "12 rows a step (2 x 6, 1 accumulated)" in chain.launch(strategy, 2, stop=11)
    assert "12 rows a step (3 x 4, 1 accumulated)" in chain.launch(strategy, 3)
    compare(chain, straight[kind])

    checkpoints = RunFolder(chain.output_dir).checkpoints()
    written = [(c.manifest.world_size, c.manifest.samples) for c in checkpoints]
    assert written == [(2, 48), (1, 64 + 24), (2, 64 + 60), (3, 128 + 48)]
    events = (chain.output_dir / ".keepstep/events.jsonl").read_text().splitlines()
    moves = [e for e in map(json.loads, events) if e["event"] == "reshard"]
    assert [(m["step"], m["from_processes"], m["to_processes"]) for m in moves] == [
        (4, 2, 1),
        (8, 1, 2),
        (11, 2, 3),
    ]
    assert all(m["bytes"] > 0 and m["seconds"] > 0 for m in moves)


def test_every_row_once_per_epoch(straight: dict) -> None:
    rows = straight["full"].rows()
    for first in (1, 7):
        epoch = [rows[step] for step in range(first, first + 6)]
        assert list(map(len, epoch)) == [PER_STEP] * 5 + [4]
        assert len({row for step in epoch for row in step}) == ROWS
    assert [rows[step] for step in (1, 7)] != [rows[1]] * 2  # another order


STRATEGIES = {
    "stages": [("cpu_zero3", 2), ("cpu_zero2", 2), ("cpu_zero3", 3), ("ddp", 1), ("zero1", 2)],
    "ddp": [("ddp", 2), ("ddp", 1), ("cpu_zero3", 2), ("ddp", 3)],
    "offload": [("cpu_zero2-offload", 2), ("cpu_zero2", 1), ("cpu_zero3-offload", 3)],
    "back": [("cpu_zero3", 2), ("cpu_zero3-offload", 2), ("cpu_zero3", 1)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", STRATEGIES)
def test_another_strategy(
    ranks: Ranks, still_demo: Path, tmp_path: Path, straight: dict, case: str, kind: str
) -> None:
    chain = Chain(ranks, still_demo, tmp_path, **KINDS[kind])
    *before, last = STRATEGIES[case]
    for number, (strategy, processes) in enumerate(before, 1):
        chain.launch(strategy, processes, stop=3 * number)
    chain.launch(*last)
    compare(chain, straight[kind])


SPECIAL = {
    "bf16": {"bf16": True, "dtype": "bfloat16"},
    "fp16": {"fp16": True},
    "frozen": {},
    "buffer": {},
    "packed": {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    # The last step of an epoch has fewer rows than there are micro-batches.
    "small": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
}


@pytest.mark.parametrize("case", SPECIAL)
def test_other_contents(ranks: Ranks, still_demo: Path, tmp_path: Path, case: str) -> None:
    """Half precision (with a loss scaler), frozen parameters, buffers, packed rows."""
    straight = Chain(ranks, still_demo, tmp_path / f"{case}-straight", **SPECIAL[case])
    straight.launch("cpu_zero3", 2)
    chain = Chain(ranks, still_demo, tmp_path / case, **SPECIAL[case])
    chain.launch("cpu_zero3", 2, stop=4)
    chain.launch("cpu_zero2", 1, stop=8)
    chain.launch("cpu_zero3", 3)
    compare(chain, straight, {"bf16": 1e-2, "fp16": 1e-2}.get(case, ROUNDING))
