"""Exports of real checkpoints: from their weights file, and from the shards without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.convert.export import ExportError, export
from keepstep.convert.merge import export_merged
from keepstep.run_folder.reader import Checkpoint, RunFolder
from tests.helpers.evaluate import evaluate_apart
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import LORA, argv

KINDS = {
    "zero1": ("zero1", {}),
    "zero2": ("cpu_zero2", {}),
    "zero3": ("cpu_zero3", {}),
    "bf16": ("cpu_zero3", {"dtype": "bfloat16", "bf16": True}),
    "adapter": ("cpu_zero3", LORA),
}
SHORT = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}


@pytest.fixture(scope="module")
def runs(ranks: Ranks, demo: Path, workspace: Path) -> dict[str, RunFolder]:
    for kind, (strategy, fields) in KINDS.items():
        command = argv(demo, workspace / f"export-{kind}", **SHORT, **fields)
        ranks.run(command, strategy=strategy)
    return {kind: RunFolder(workspace / f"export-{kind}") for kind in KINDS}


def last(run: RunFolder) -> Checkpoint:
    return run.checkpoints()[-1]


def bare(checkpoint: Checkpoint) -> Checkpoint:
    """The same without its weights file."""
    files = checkpoint.manifest.files.items()
    others = {name: entry for name, entry in files if not name.endswith(".safetensors")}
    return replace(checkpoint, manifest=replace(checkpoint.manifest, files=others))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_from_shards_and_from_the_file(runs: dict, tmp_path: Path, kind: str) -> None:
    checkpoint = last(runs[kind])
    made = export(bare(checkpoint), tmp_path / "made")
    expected, found = weights(checkpoint.path), weights(made.folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    same = export(checkpoint, tmp_path / "same")
    assert same.files == made.files
    assert "optimizer_names.json" not in made.files
    assert {"tokenizer.json", "chat_template.jinja"} < made.files.keys()


def test_more_precise_than_the_weights_file(runs: dict, tmp_path: Path) -> None:
    """The file holds bf16, the shards its fp32 masters."""
    checkpoint = last(runs["bf16"])
    found = weights(export(checkpoint, tmp_path / "fp32", dtype="fp32").folder)
    rounded = weights(checkpoint.path)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name].bfloat16(), rounded[name]) for name in rounded)
    assert any(not torch.equal(found[name], rounded[name].float()) for name in rounded)
    assert json.loads((tmp_path / "fp32/config.json").read_text())["dtype"] == "float32"


def test_a_stranger_loads_it_and_gets_the_recorded_loss(
    runs: dict, demo: Path, tmp_path: Path
) -> None:
    expected = {}
    for kind in KINDS:
        checkpoint = bare(last(runs[kind]))
        export(checkpoint, tmp_path / kind, max_shard_size="1MB")
        expected[tmp_path / kind] = checkpoint.manifest.metrics["eval_loss"]
    merged = export_merged(last(runs["adapter"]), tmp_path / "merged")
    assert "adapter_config.json" not in merged.files
    modes = {path.stat().st_mode & 0o777 for path in merged.folder.iterdir()}
    assert modes == {merged.folder.stat().st_mode & 0o666}, "as other files here"
    expected[tmp_path / "merged"] = expected[tmp_path / "adapter"]
    assert (tmp_path / "zero3/model.safetensors.index.json").is_file()
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    found = evaluate_apart(demo / "data/eval.jsonl", expected)
    coarse = tmp_path / "bf16"  # evaluated in bf16 by either, in another order
    assert found.pop(coarse) == pytest.approx(expected.pop(coarse), abs=2e-2)
    assert found == pytest.approx(expected, abs=2e-4)


def test_without_weights_files(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Resumed on another number of processes, and the best loaded at the end."""
    command = argv(demo, tmp_path, **SHORT, load_best_model_at_end=True)
    ranks.run([*command, "--save_weights", "never"])
    run = RunFolder(tmp_path)
    assert not any(n.endswith(".safetensors") for c in run.checkpoints() for n in c.manifest.files)
    output = ranks.run([*command, "--save_weights", "best", "--max_steps", "6"], processes=1).output
    assert "resharded checkpoint-4: 2 x ZeRO-3 → 1 x ZeRO-3" in output
    assert last(run).step == 6
    assert "model.safetensors" in last(run).manifest.files, "it is the best so far"


def test_what_cannot_be_done(runs: dict, tmp_path: Path) -> None:
    checkpoint = last(runs["zero2"])
    for options, message in (
        ({"max_shard_size": "many"}, "max_shard_size: 'many' is no size"),
        ({"folder": checkpoint.path}, "exists: name a new folder"),
    ):
        arguments: dict[str, Any] = {"folder": tmp_path / "new", **options}
        with pytest.raises(ExportError, match=message):
            export(checkpoint, **arguments)
    assert list(tmp_path.iterdir()) == [], "nothing is left of what failed"
    with pytest.raises(ExportError, match="there is nothing to merge"):
        export_merged(checkpoint, tmp_path / "new")


def test_a_damaged_shard_is_not_unpickled(runs: dict, tmp_path: Path) -> None:
    checkpoint = last(runs["zero1"])
    name = next(name for name in checkpoint.manifest.files if name.endswith("optim_states.pt"))
    content = bytearray((checkpoint.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint.path / name).write_bytes(content)
    with pytest.raises(ExportError, match="is damaged"):
        export(bare(checkpoint), tmp_path / "made")
    told = CliRunner().invoke(app, ["export", str(checkpoint.path), "--to", str(tmp_path / "made")])
    assert told.exit_code == 2
    assert "is damaged" in told.stdout
