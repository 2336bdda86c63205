"""The same command on other processes: the same state, the same rows, the same curve."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import LORA, argv

SCRIPT = PROGRAMS / "elastic.py"
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
        self.norms = True  # DeepSpeed 0.19.8 tells no gradient's norm at stage 0

    def launch(self, strategy: str, processes: int, stop: int = 0) -> str:
        """Train until `stop` (0: the end); the log."""
        self.norms &= strategy != "cpu_zero0"
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
        return {e["step"]: tuple(e.get(n) for n in names) for e in history if "loss" in e}


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
        if chain.norms or norm is not None:
            assert norm == pytest.approx(expected[step][2], rel=100 * rounding)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    cases(
        itertools.product(("zero1", "cpu_zero2", "cpu_zero3"), ("full", "lora")),
        long=[
            ("zero1", "full"),
            ("cpu_zero2", "full"),
            *((s, "lora") for s in ("zero1", "cpu_zero2", "cpu_zero3")),
        ],
    ),
)
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
    "stages": [
        *(("cpu_zero3", 2), ("cpu_zero2", 2), ("cpu_zero3", 3), ("ddp", 1)),
        *(("zero1", 2), ("zero1", 1)),
    ],
    "ddp": [("ddp", 2), ("ddp", 1), ("cpu_zero3", 2), ("cpu_zero0", 3), ("ddp", 2)],
    "zero0": [("cpu_zero0", 2), ("ddp", 1), ("cpu_zero0", 3), ("cpu_zero2", 1), ("cpu_zero0", 2)],
    "offload": [("cpu_zero2-offload", 2), ("cpu_zero2", 1), ("cpu_zero3-offload", 3)],
    "back": [("cpu_zero3", 2), ("cpu_zero3-offload", 2), ("cpu_zero3", 1)],
}


@pytest.mark.parametrize("kind", cases(["full", "lora"], long=["lora"]))
@pytest.mark.parametrize("case", cases(STRATEGIES, long=["zero0", "back", "offload"]))
def test_another_strategy(
    ranks: Ranks, still_demo: Path, tmp_path: Path, straight: dict, case: str, kind: str
) -> None:
    chain = Chain(ranks, still_demo, tmp_path, **KINDS[kind])
    *before, last = STRATEGIES[case]
    for number, (strategy, processes) in enumerate(before, 1):
        chain.launch(strategy, processes, stop=3 * number)
    chain.launch(*last)
    compare(chain, straight[kind])


SPECIAL: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True, "dtype": "bfloat16"},
    "fp16": {"fp16": True},
    "frozen-and-buffer": {},
    "packed": {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    # The last step of an epoch has fewer rows than there are micro-batches.
    "small": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6},
}


@pytest.mark.parametrize("case", cases(SPECIAL, long=["bf16", "fp16", "packed", "small"]))
def test_other_contents(ranks: Ranks, still_demo: Path, tmp_path: Path, case: str) -> None:
    """Half precision (with a loss scaler), frozen parameters, buffers, packed rows."""
    straight = Chain(ranks, still_demo, tmp_path / f"{case}-straight", **SPECIAL[case])
    straight.launch("cpu_zero3", 2)
    chain = Chain(ranks, still_demo, tmp_path / case, **SPECIAL[case])
    chain.launch("cpu_zero3", 2, stop=4)
    chain.launch("cpu_zero2", 1, stop=8)
    chain.launch("cpu_zero3", 3)
    compare(chain, straight, {"bf16": 1e-2, "fp16": 1e-2}.get(case, ROUNDING))


def test_rows_that_cannot_be_shared_out(ranks: Ranks, still_demo: Path, tmp_path: Path) -> None:
    fields = {"per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 3}
    chain = Chain(ranks, still_demo, tmp_path, **fields)
    chain.launch("cpu_zero3", 2, stop=9)  # of 10 rows; an epoch has 7 of them, the run 21
    refused = ranks.start(chain.command, processes=3)
    assert refused.wait() == [2, 2, 2]
    assert "a step of 10 rows cannot be shared out evenly among 3 processes" in refused.output
    assert "launch 1, 2, 5 or 10 processes; or accept 9 rows a step" in refused.output

    chain.command += ["--allow_batch_change", "true"]
    log = chain.launch("cpu_zero3", 3, stop=16)
    assert "9 rows a step (3 x 3, 1 accumulated)" in log
    assert "22 steps are planned now, not 21" in log
    chain.launch("cpu_zero3", 3)
    rows = chain.rows()
    assert [len(rows[step]) for step in range(8, 15)] == [10, 10, 9, 9, 9, 9, 8]
    for first, last in ((1, 7), (8, 14), (15, 22)):
        drawn = [row for step in range(first, last + 1) for row in rows[step]]
        assert len(drawn) == len(set(drawn)) == ROWS
    assert max(rows) == 22


def test_killed_while_resharding(
    ranks: Ranks, still_demo: Path, tmp_path: Path, straight: dict
) -> None:
    chain = Chain(ranks, still_demo, tmp_path)
    chain.launch("cpu_zero3", 2, stop=4)
    for strategy, processes in (("cpu_zero3", 3), ("cpu_zero2", 3)):
        killed = ranks.start(
            [str(chain.watch), "killed", *chain.command],
            strategy=strategy,
            processes=processes,
            script=SCRIPT,
        )
        codes = killed.wait()
        assert codes[-1] == -9
        assert 0 not in codes
        assert (
            RunFolder(chain.output_dir).faults(RunFolder(chain.output_dir).checkpoint(4), deep=True)
            == []
        )
    chain.launch("cpu_zero3", 1)
    compare(chain, straight["full"])


def test_a_corrupted_shard_is_found_before_resharding(
    ranks: Ranks, still_demo: Path, tmp_path: Path, straight: dict
) -> None:
    chain = Chain(ranks, still_demo, tmp_path)
    chain.launch("cpu_zero3", 2, stop=3)
    chain.launch("cpu_zero3", 2, stop=5)
    (shard,) = chain.output_dir.glob("checkpoint-5/global_step5/*_rank_1_*optim_states.pt")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    log = chain.launch("cpu_zero3", 1)
    assert f"checkpoint-5 is passed by: global_step5/{shard.name}: content has changed" in log
    assert "resharded checkpoint-3: 2 x ZeRO-3" in log
    found, expected = chain.curve(), straight["full"].curve()
    assert {step: loss for step, (loss, *_) in found.items()} == {
        step: pytest.approx(loss, abs=ROUNDING) for step, (loss, *_) in expected.items()
    }


def test_the_best_is_loaded_whoever_wrote_it(
    ranks: Ranks, still_demo: Path, tmp_path: Path
) -> None:
    fields = FIELDS | {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps"}
    command = argv(still_demo, tmp_path / "run", **fields | {"keep_ranking": "metric"})
    command += ["--load_best_model_at_end", "true"]
    script = SCRIPT.with_name("load_best.py")
    ranks.run(command, script=script)
    worse = [
        *command,
        "--max_steps",
        "6",
        "--learning_rate",
        "3",
        "--lr_scheduler_type",
        "constant",
    ]
    worse += ["--allow_drift", "learning_rate", "lr_scheduler_type"]
    run = ranks.run(worse, script=script, processes=1)
    assert "resharded checkpoint-4: 2 x ZeRO-3 → 1 x ZeRO-3" in run.output
    assert "best 4 of 6, loaded: True" in run.output, run.output


@pytest.mark.parametrize("strategy", cases(["cpu_zero2", "cpu_zero3"], long=["cpu_zero2"]))
def test_shards_written_offline_are_loaded_as_they_are(
    ranks: Ranks, still_demo: Path, tmp_path: Path, straight: dict, strategy: str
) -> None:
    chain = Chain(ranks, still_demo, tmp_path)
    chain.launch(strategy, 2, stop=4)
    elsewhere = tmp_path / "elsewhere"
    command = ["reshard", str(chain.output_dir / "checkpoint-4"), "--to", str(elsewhere)]
    told = keepstep(*command, "--num_processes", "3")
    assert "for 3 processes (it was written by 2)" in told
    chain.command = [str(elsewhere) if w == str(chain.output_dir) else w for w in chain.command]
    chain.output_dir = elsewhere
    log = chain.launch(strategy, 3)
    assert "carrying on from checkpoint-4" in log
    assert "resharded" not in log
    compare(chain, straight["full"])


ADOPTED = {
    "stock-zero2": ("cpu_zero2", False),
    "stock-zero3": ("cpu_zero3", False),
    "stock-ddp": ("ddp", False),
    "stock-zero0": ("cpu_zero0", False),
    "stock-universal-zero2": ("cpu_zero2", True),
    "stock-universal-zero3": ("cpu_zero3", True),
}


@pytest.mark.parametrize(
    "case",
    cases(ADOPTED, long=["stock-ddp", "stock-zero2", "stock-zero0", "stock-universal-zero2"]),
)
def test_adopted_checkpoints_go_on(
    ranks: Ranks, still_demo: Path, tmp_path: Path, straight: dict, case: str
) -> None:
    """What the stock Trainer stores, and what DeepSpeed's converter makes of it."""
    strategy, universal = ADOPTED[case]
    chain = Chain(ranks, still_demo, tmp_path / case)
    chain.launch(strategy, 2, stop=4)
    stock = chain.watch / "checkpoint-4"
    if universal:
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        convert += ["--input_folder", str(stock / "global_step4"), "--inject_missing_state"]
        stock = chain.watch / "universal"
        subprocess.run([*convert, "--output_folder", str(stock)], check=True, capture_output=True)
    adopted = tmp_path / "adopted"
    told = keepstep("adopt", str(stock), "--into", str(adopted))
    assert "committed" in told
    assert "nobody took their digests" in told
    chain.command = [str(adopted) if w == str(chain.output_dir) else w for w in chain.command]
    chain.output_dir = adopted
    log = chain.launch("cpu_zero3", 1) if universal else chain.launch(strategy, 2)
    assert "carrying on from checkpoint-4" in log
    found, expected = chain.curve(), straight["full"].curve()
    for step in range(5, STEPS + 1):
        assert found[step][:2] == pytest.approx(expected[step][:2], abs=ROUNDING)
    assert not (adopted / "checkpoint-4/training_args.bin").exists()


def test_what_is_not_supported_is_refused_by_name(
    ranks: Ranks, still_demo: Path, tmp_path: Path
) -> None:
    chain = Chain(ranks, still_demo, tmp_path, optim="sgd", max_steps=4)
    ranks.run([*chain.command], strategy="cpu_zero2")
    more = [*chain.command, "--max_steps", "6"]
    refused = ranks.start(more, strategy="cpu_zero2", processes=1)
    assert refused.wait() == [2]
    assert "checkpoint-4 was written by 2 x ZeRO-2; this attempt has 1 x ZeRO-2, and" in (
        refused.output
    )
    assert "optim: sgd has not been tested with another number" in refused.output
    assert "carrying on" in ranks.run(more, strategy="cpu_zero2").output


def keepstep(*arguments: str) -> str:
    """The command, in a process of its own."""
    command = [
        sys.executable,
        "-c",
        "from keepstep.cli.main import main; main()",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
