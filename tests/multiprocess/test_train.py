"""The main job on two processes, with every strategy, full and LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers.evaluate import evaluate_apart
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv

STRATEGIES = ["ddp", "zero1", "cpu_zero2", "cpu_zero3", "zero3"]
KINDS = {"full": {}, "lora": LORA | {"learning_rate": 8e-3}}


@pytest.fixture(scope="module")
def runs(ranks: Ranks, demo: Path, workspace: Path) -> dict[tuple[str, str], RunFolder]:
    """Twelve steps with each strategy. LoRA starts from what ZeRO-2 has learned."""
    folders = {}
    for kind, fields in KINDS.items():
        for strategy in STRATEGIES:
            output_dir = workspace / f"train-{strategy}-{kind}"
            if kind == "lora":
                learned = folders["cpu_zero2", "full"].path / "checkpoint-12"
                fields = fields | {"model_name_or_path": learned}
            ranks.run(argv(demo, output_dir, **fields), strategy=strategy)
            folders[strategy, kind] = RunFolder(output_dir)
    return folders


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_falls(runs: dict, strategy: str, kind: str) -> None:
    checkpoints = runs[strategy, kind].checkpoints()
    assert [c.step for c in checkpoints] == [4, 8, 12]
    losses = [c.manifest.metrics["eval_loss"] for c in checkpoints]
    assert losses[0] > losses[1] > losses[2]
    assert [c.manifest.adapter for c in checkpoints] == [kind == "lora"] * 3
    stage = {"ddp": 0, "zero1": 1, "cpu_zero2": 2, "cpu_zero3": 3, "zero3": 3}[strategy]
    assert {(c.manifest.world_size, c.manifest.zero_stage) for c in checkpoints} == {(2, stage)}
    assert [c.manifest.samples for c in checkpoints] == [32, 64, 96]


def test_strategies_agree_in_the_first_steps(runs: dict) -> None:
    """Later they drift apart: sums in another order."""
    first = [runs[s, "full"].checkpoints()[0].manifest.metrics["eval_loss"] for s in STRATEGIES]
    assert max(first) - min(first) < 1e-4


def test_from_pretrained_reproduces_the_recorded_loss(runs: dict, demo: Path) -> None:
    """Every committed checkpoint, in a fresh process that does not know keepstep."""
    recorded = {
        c.path: c.manifest.metrics["eval_loss"]
        for folder in runs.values()
        for c in folder.checkpoints()
    }
    assert len(recorded) == 3 * len(runs)
    measured = evaluate_apart(demo / "data/eval.jsonl", recorded)
    assert measured == pytest.approx(recorded, abs=2e-4)


def test_nothing_private_or_absolute_is_stored(runs: dict, workspace: Path) -> None:
    for (strategy, kind), folder in runs.items():
        names = {path.name for c in folder.checkpoints() for path in c.path.rglob("*")}
        assert "training_args.bin" not in names
        if kind == "full":
            for checkpoint in folder.checkpoints():
                for path in checkpoint.path.rglob("*"):
                    if path.is_file():
                        found = str(workspace).encode() in path.read_bytes()
                        assert not found, f"{strategy}: an absolute path in {path}"


def test_one_voice(runs: dict, ranks: Ranks, workspace: Path) -> None:
    """One line per evaluation and per save; nothing else but the introduction and the summary."""
    logs = [log.read_text() for log in sorted(ranks.folder.glob("run-*.log"))]
    told = [text for text in logs if f"{workspace}/train-" in text]
    assert len(told) == len(runs)
    for text in told:
        lines = text.splitlines()
        assert sum("  eval_loss " in line for line in lines) == 3
        assert sum("  saved checkpoint-" in line for line in lines) == 3
        (speed,) = [line for line in lines if line.startswith("speed: ")]
        assert speed == "speed: attention sdpa, no Liger (no CUDA device), packing off"
        (rows,) = [line for line in lines if line.startswith("training: ")]
        assert rows.endswith("/data/train.jsonl: 64 rows, 64 used, 0 cut, 0 dropped")
        assert sum(line.startswith("evaluation: ") for line in lines) == 1
        expected = (
            "step ",
            "keepstep ",
            "training: ",
            "evaluation: ",
            "speed: ",
            "Finished",
            "Best",
            "Use it",
            "Checkpoints",
            "Goodput",
        )
        strange = [s for s in lines if not s.startswith(expected) and "parameters" not in s]
        assert strange == []


def test_rows_are_prepared_once(ranks: Ranks, demo: Path, tmp_path: Path, workspace: Path) -> None:
    """Looked at, made into tokens and packed by one process of a machine; the others, and later
    launches, read it from the cache of datasets."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((demo / "data/train.jsonl").read_text() + "\n")
    fields = {"dataset_name": rows, "packing": True, "max_steps": 4}

    def prepared(processes: int) -> set[Path]:
        command = argv(demo, tmp_path / f"run-{processes}", **fields)
        ranks.run(command, strategy="ddp", processes=processes)
        return set((workspace / "datasets").rglob("*.arrow"))

    before = set((workspace / "datasets").rglob("*.arrow"))
    after = prepared(2)
    made = {path.name.partition("-")[0] for path in after - before}
    assert {"cache", "json"} <= made
    assert prepared(3) == after
