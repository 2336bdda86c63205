"""What can be told of a checkpoint's contents before a step is made. One process, real ones."""

from __future__ import annotations

import errno
import gc
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepstep.recipe.config import ConfigError
from keepstep.run_folder.storage import Storage
from keepstep.save.rank_part import Part
from keepstep.sharding.hf_weights import captured
from keepstep.trainer.state import Contents
from tests.helpers.disks import small_disk_at


@pytest.fixture
def trainer(demo: Path) -> Any:
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(demo / "model"),
        processing_class=AutoTokenizer.from_pretrained(demo / "model"),
        is_deepspeed_enabled=False,
        args=SimpleNamespace(world_size=1, zero_stage=0),
    )


def refusal(trainer: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        Contents(trainer).plan()
    (problem,) = raised.value.problems
    assert problem.code == "unsavable"
    return str(problem)


def test_a_configuration_that_is_not_stored(trainer: Any) -> None:
    trainer.model.config.num_beams = 3
    told = refusal(trainer)
    assert "the model's configuration: Some generation parameters are set" in told
    assert "{'num_beams': 3}" in told


def test_a_generation_configuration_that_is_wrong_on_any_account(trainer: Any) -> None:
    trainer.model.generation_config.max_new_tokens = -1
    told = refusal(trainer)
    assert "generation configuration: `max_new_tokens` must be greater than 0, but is -1" in told


def test_a_tokenizer_that_is_not_stored(trainer: Any) -> None:
    trainer.processing_class.init_kwargs["note"] = object()
    assert "the model's tokenizer: Object of type object is not JSON serializable" in refusal(
        trainer
    )


def test_an_adapter_s_card_names_a_path_and_is_not_stored(trainer: Any, tmp_path: Path) -> None:
    """Neither where the ranks write their slices, nor where one writes what is gathered; whose file
    is read by others as the other files are."""
    trainer.model = get_peft_model(trainer.model, LoraConfig(task_type="CAUSAL_LM"))
    trainer.manager = SimpleNamespace(storage=Storage(), saver=SimpleNamespace(parts=None))
    contents = Contents(trainer)
    contents.plan()
    assert contents._companions is not None
    assert "adapter_config.json" in contents._companions
    assert "README.md" not in contents._companions
    contents.gathering = part = Part(tmp_path / "checkpoint-2", 0, Storage())
    contents.store_gathered(get_peft_model_state_dict(trainer.model))
    part.adopt_unclaimed(set())
    assert part.error is None
    assert {*part.report.files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.stat().st_mode & 0o777 for p in part.folder.iterdir()} == {
        part.folder.stat().st_mode & 0o666
    }


def test_a_full_disk_of_temporary_files_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says "unexpected pos 576 vs 534"."""
    with small_disk_at(tmp_path / "disk", "1m") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC}\]"):
            captured(lambda folder: torch.save(torch.zeros(10**6), Path(folder) / "rng_state.pth"))
        gc.collect()  # torch has the file open
        assert not list(disk.iterdir())
