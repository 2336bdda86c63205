"""How a model wants to be stored, asked of `save_pretrained` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from keepstep.run_folder.storage import Storage
from keepstep.save.rank_part import Part
from keepstep.save.snapshot_memory import Arena
from keepstep.sharding.hf_weights import LayoutError, WeightsFile, ask

TINY = {
    **{"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2},
}


def store(model: Any, folder: Path) -> None:
    folder.mkdir()
    part = Part(folder, 0, Storage(), Arena(1 << 20))
    weights = WeightsFile(model, ask(model))
    weights.store(part, weights.pieces(model, None, 0, 1))
    for name, content in weights.companions.items():
        part.write(name, content)
    part.copy()
    part.finish()
    assert part.error is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_stored_as_it_stores_itself(tmp_path: Path, tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "stock")
    store(model, tmp_path / "ours")
    stock, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("stock", "ours"))
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    assert {p.name for p in (tmp_path / "stock").iterdir()} == {
        p.name for p in (tmp_path / "ours").iterdir()
    }
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_types_and_odd_sizes_side_by_side(tmp_path: Path) -> None:
    """An odd number of 2-byte elements must not put what follows off its alignment."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(3).bfloat16())
            self.b = torch.nn.Parameter(torch.randn(5))
            self.register_buffer("c", torch.arange(7))
            self.register_buffer("d", torch.arange(3, dtype=torch.uint8))

        def save_pretrained(self, folder: str, state_dict: dict[str, torch.Tensor]) -> None:
            save_file(state_dict, f"{folder}/model.safetensors")

    model = Odd()
    store(model, tmp_path / "ours")
    stored = load_file(tmp_path / "ours/model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[n], t) for n, t in model.state_dict().items())


def test_a_model_that_is_stored_in_other_pieces_is_gathered() -> None:
    model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=2))
    with pytest.raises(LayoutError):
        ask(model)


class Changing(torch.nn.Linear):
    """Stores its weight in another way than it has it."""

    def __init__(self, change: Any) -> None:
        super().__init__(4, 6)
        self.change = change

    def save_pretrained(self, folder: str, state_dict: dict[str, torch.Tensor]) -> None:
        save_file(self.change(state_dict), f"{folder}/model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {f"e{i}": part.clone() for i, part in enumerate(s["weight"].chunk(2))},
        lambda s: {f"e{i}": part.clone() for i, part in enumerate(s["weight"].split(1))},
        lambda s: {"joined": torch.cat([s["weight"], s["bias"]])},
        lambda s: {"added": s["weight"] + s["bias"].flip(0) * torch.arange(7)},
        lambda s: {"a": s["weight"], "b": s["weight"].clone()},
        lambda s: {"other": torch.full((7,), 99)},
        lambda s: s["no such weight"],
    ],
    ids=["chunk", "split", "join", "add", "twice", "foreign", "error"],
)
def test_every_change_is_seen(change: Any) -> None:
    with pytest.raises(LayoutError):
        ask(Changing(change))
