"""What a resume compares: complete by construction, and the same for what means the same."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer
from trl import ModelConfig

from keepstep.data import dataset
from keepstep.policy.drift import drift
from keepstep.recipe.config import ConfigError, DataConfig, KeepstepConfig
from keepstep.recipe.model import tokenizer_settings, weights_fingerprint
from keepstep.recipe.parse import parse_recipe
from keepstep.recipe.trajectory import COMPARED, HARMLESS
from tests.recipe.test_config import flags


def settings(**given: object) -> dict:
    """As a manifest would hold them."""
    return dict(json.loads(json.dumps(parse_recipe(flags(**given)).settings())))


def changed(before: dict[str, Any], now: dict[str, Any], planned: int = 0) -> list[str]:
    lines = drift(settings(**before), settings(**now), planned_steps=planned)
    return [line.split(":")[0] for line in lines]


def test_every_field_is_compared_or_named_harmless() -> None:
    known = {f.name for part in (KeepstepConfig, ModelConfig, DataConfig) for f in fields(part)}
    assert known - COMPARED - HARMLESS == set(), "give these a place in trajectory.py"
    assert (COMPARED | HARMLESS) - known == set(), "these are no fields (any more)"
    assert COMPARED.isdisjoint(HARMLESS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("loss_type", "dft"), ("packing_strategy", "wrapped"), ("padding_free", True)),
        *(("truncation_mode", "keep_end"), ("label_smoothing_factor", 0.1)),
        *(("router_aux_loss_coef", 0.01), ("use_liger_kernel", True)),
        *(("optim_args", "fused=true"), ("optim_target_modules", "all-linear")),
        *(("train_sampling_strategy", "sequential"), ("dataloader_drop_last", True)),
        *(("dataset_text_field", "content"), ("load_in_4bit", True), ("load_in_8bit", True)),
        *(("model_revision", "v2"), ("pad_to_multiple_of", "16"), ("torch_compile", True)),
        *(("accelerator_config", '{"even_batches": false}'), ("model_init_kwargs", '{"a": 1}')),
        *(("per_device_eval_batch_size", 3), ("eval_packing", True), ("lora_r", None)),
        *(("gradient_checkpointing_kwargs", '{"use_reentrant": true}'), ("full_determinism", True)),
    ],
)
def test_what_changes_the_trajectory_is_compared(field: str, value: object) -> None:
    if value is None:  # matters with an adapter alone
        assert changed({}, {field: 4}) == []
        assert changed({"use_peft": True}, {"use_peft": True, field: 4}) == [field]
    else:  # decided, where nothing is said: then a manifest has what was taken
        before = {field: False} if field in ("padding_free", "use_liger_kernel") else {}
        assert field in changed(before, {field: value})


def test_what_is_not_said_is_compared_once_it_is_decided() -> None:
    assert {"padding_free", "use_liger_kernel"}.isdisjoint(settings())
    assert settings(use_liger_kernel=False)["use_liger_kernel"] is False


def test_of_an_adapter_and_of_quantization() -> None:
    quantized = {"load_in_4bit": True}
    assert changed(quantized, quantized | {"bnb_4bit_quant_type": "fp4"}) == ["bnb_4bit_quant_type"]
    peft = {"use_peft": True}
    assert changed(peft, peft | {"lora_target_parameters": "experts.w"}) == [
        "lora_target_parameters"
    ]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"data_seed": 42}),  # which is `seed`
        ({}, {"lr_scheduler_kwargs": "{}", "optim_args": ""}),
        ({"packing": True}, {"packing": True, "eval_packing": True}),
        ({"warmup_steps": 0.1}, {"warmup_steps": 10}),
        ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ({}, {"output_dir": "/elsewhere/x", "dataset_name": "/elsewhere/data", "max_steps": 9}),
        (
            {"model_init_kwargs": '{"cache_dir": "/a/cache", "token": "x"}'},
            {"model_init_kwargs": '{"cache_dir": "/b/cache", "token": "y"}'},
        ),
        ({}, {"eval_steps": 7, "save_steps": 7, "metric_for_best_model": "mean_token_accuracy"}),
    ],
)
def test_what_means_the_same_is_no_drift(before: dict, now: dict) -> None:
    assert changed(before, now, planned=100) == []


def test_no_path_and_no_token_is_stored() -> None:
    text = json.dumps(
        settings(model_init_kwargs='{"cache_dir": "/home/me/cache", "token": "secret"}')
    )
    assert "/home" not in text
    assert "secret" not in text


def test_a_schedule_that_follows_the_metric_depends_on_the_evaluations() -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 5}
    assert changed(plateau, plateau | {"eval_steps": 6}) == ["eval_steps"]
    other = plateau | {"metric_for_best_model": "mean_token_accuracy"}
    assert changed(plateau, other) == ["metric_for_best_model", "greater_is_better"]


def test_a_stream_is_known_by_its_first_rows() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    other = datasets.Dataset.from_dict({"text": ["a", "b", "d"]})
    first = dataset.stream_fingerprint(rows.to_iterable_dataset())
    assert first == dataset.stream_fingerprint(rows.to_iterable_dataset())
    assert first != dataset.stream_fingerprint(other.to_iterable_dataset())
    assert dataset.stream_fingerprint(rows) is None


def test_a_tokenizer_is_compared_by_content(demo: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")

    def found(**given: object) -> dict:
        return tokenizer_settings(tokenizer, parse_recipe(flags(**given)).training)

    own = found()
    assert own["eos_token"] == tokenizer.eos_token
    assert found(eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token) == own
    other = next(word for word in tokenizer.get_vocab() if word != tokenizer.pad_token)
    assert [line.split(":")[0] for line in drift(own, found(pad_token=other))] == ["pad_token"]
    (tmp_path / "same.jinja").write_text(tokenizer.chat_template)
    (tmp_path / "other.jinja").write_text(tokenizer.chat_template + " ")
    assert found(chat_template_path=tmp_path / "same.jinja") == own  # wherever it lies
    (line,) = drift(own, found(chat_template_path=tmp_path / "other.jinja"))
    assert line.startswith("chat_template: ")
    with pytest.raises(ConfigError, match=r"chat_template_path: .* cannot be read"):
        found(chat_template_path=tmp_path / "gone.jinja")


def test_an_adapter_belongs_to_the_weights_that_it_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(10_000_000))
    model = ModelConfig(model_name_or_path=str(tmp_path), use_peft=True)
    before = weights_fingerprint(model)
    weights.write_bytes(bytes(9_000_000) + b"1" * 1_000_000)  # trained on, in place
    assert weights_fingerprint(model) != before
    weights.write_bytes(bytes(10_000_000))
    assert weights_fingerprint(model) == before is not None
    assert weights_fingerprint(ModelConfig(model_name_or_path=str(tmp_path))) is None
