"""The conversions by program: `keepstep.adopt`, `keepstep.export`, and what they refuse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import keepstep
from tests.convert.test_adopt import stock
from tests.helpers.folders import commit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun with a stock Trainer's checkpoint."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    source = stock(tmp_path / "out/checkpoint-4")
    LlamaForCausalLM(config).save_pretrained(source)
    keepstep.adopt(str(source), into=tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_is_adopted_chosen_loaded_and_exported(run: Path, tmp_path: Path) -> None:
    chosen = keepstep.RunFolder(run).choose()
    assert chosen is not None
    assert (chosen.step, chosen.metrics) == (4, {"eval_loss": 1.5})
    loaded = LlamaForCausalLM.from_pretrained(chosen.path)
    told: list[tuple[int, int]] = []
    made = keepstep.export(
        chosen, to=str(tmp_path / "model"), progress=lambda *bytes_: told.append(bytes_)
    )
    assert (made.folder, made.dtype) == (tmp_path / "model", "float32")
    assert made.files == {p.name: p.stat().st_size for p in made.folder.iterdir()}
    assert told[-1][0] == told[-1][1] > 0
    for name, tensor in load_file(made.folder / "model.safetensors").items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    half = keepstep.export(run / "latest", tmp_path / "half", dtype="bf16")
    assert half.dtype == "bfloat16"
    assert LlamaForCausalLM.from_pretrained(half.folder).dtype == torch.bfloat16


def test_an_export_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    to = tmp_path / "model"
    with pytest.raises(keepstep.ManifestError, match=r"holds no readable manifest\.json"):
        keepstep.export(run, to)
    with pytest.raises(keepstep.ExportError, match="int8 is none of bf16, fp16, fp32"):
        keepstep.export(run / "latest", to, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(keepstep.ExportError, match="whole model: there is nothing to merge"):
        keepstep.export(run / "latest", to, merge_adapter=True)
    for place in ("checkpoint-4/model", "checkpoint-9", ".keepstep/model"):
        with pytest.raises(keepstep.ExportError, match="would be among the checkpoints of"):
            keepstep.export(run / "latest", run / place)
    weights = run / "checkpoint-4/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(keepstep.DamagedError, match=r"model\.safetensors: content has changed"):
        keepstep.export(run / "latest", to)
    weights.write_bytes(content)
    to.mkdir()
    with pytest.raises(keepstep.ExportError, match="exists: name a new folder"):
        keepstep.export(run / "latest", to)
    assert list(to.iterdir()) == []


def test_what_is_not_adopted(run: Path, tmp_path: Path) -> None:
    with pytest.raises(keepstep.AdoptError, match="there is no folder"):
        keepstep.adopt(tmp_path / "nope", tmp_path / "new")
    with pytest.raises(keepstep.AdoptError, match="is a run already"):
        keepstep.adopt(tmp_path / "out/checkpoint-4", run)
    (tmp_path / "linked").mkdir()
    os.symlink(tmp_path, tmp_path / "linked/.keepstep")
    with pytest.raises(keepstep.AdoptError, match="is a link, which is not followed"):
        keepstep.adopt(tmp_path / "out/checkpoint-4", tmp_path / "linked")
    with pytest.raises(keepstep.AdoptError, match="has a manifest"):
        keepstep.adopt(commit(tmp_path / "other", 3), tmp_path / "new")
    assert not (tmp_path / "new").exists()
