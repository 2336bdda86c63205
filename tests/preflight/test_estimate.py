"""How large things will be: the arithmetic, and what the shapes of a model are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.preflight.estimate import (
    Shapes,
    Step,
    Strategy,
    activation_bytes,
    alternatives,
    checkpoint_bytes,
    device_bytes,
    host_bytes,
)
from keepstep.preflight.probes import check_device
from keepstep.preflight.shapes import shapes_of
from keepstep.recipe.parse import parse_recipe

BILLION = 10**9
SEVEN = Shapes(7 * BILLION, 7 * BILLION, 7 * BILLION, 291, 131 * 10**6, 32, 4096, 32000, element=2)
STEP = Step(4, 2048, checkpointing=True)


def test_seven_billion_parameters_on_eight_gpus() -> None:
    """16 bytes per parameter: the example of the ZeRO paper (2 + 2 + 12)."""
    sizes = {s.name: s for s in alternatives(Strategy(3, 8, half=True))}
    without = replace(STEP, rows=0)
    states = {name: device_bytes(SEVEN, s, without) / BILLION for name, s in sizes.items()}
    bucket = 0.5 * 2  # of gradients on their way, beside what the paper counts
    assert states["zero1"] == pytest.approx(7 * (2 + 2 + 12 / 8) + bucket)
    assert states["zero2"] == pytest.approx(7 * (2 + 14 / 8) + bucket)
    assert states["zero3"] == pytest.approx(7 * 16 / 8 + 2 * 0.131 * 2 + bucket)
    assert states["zero3_offload"] == pytest.approx(2 * 0.131 * 2 + bucket)
    assert host_bytes(SEVEN, sizes["zero3_offload"]) > host_bytes(SEVEN, sizes["zero3"])
    assert checkpoint_bytes(SEVEN, sizes["zero3"]) == pytest.approx(7 * BILLION * 14, rel=0.01)
    assert checkpoint_bytes(SEVEN, sizes["zero3"], weights=False) == pytest.approx(
        7 * BILLION * 12, rel=0.01
    )


@given(st.integers(1, 64), st.booleans())
def test_more_sharing_never_takes_more(processes: int, half: bool) -> None:
    without = replace(STEP, rows=0)
    stages = alternatives(Strategy(0, processes, half))[1:4]
    sizes = [device_bytes(SEVEN, stage, without) for stage in stages]
    slack = 2 * 2 * SEVEN.largest * 4  # what ZeRO-3 gathers
    assert sizes[1] <= sizes[0]
    assert sizes[2] <= sizes[1] + slack


def test_recomputing_activations_saves_memory() -> None:
    strategy = Strategy(3, 8, half=True)
    kept = activation_bytes(SEVEN, strategy, replace(STEP, checkpointing=False))
    assert kept > 5 * activation_bytes(SEVEN, strategy, STEP)


def recipe_of(demo: Path, **fields: object):
    values = {"model_name_or_path": demo / "model", "dataset_name": "x", "output_dir": "y"}
    return parse_recipe([t for n, v in {**values, **fields}.items() for t in (f"--{n}", str(v))])


def test_shapes_without_weights(demo: Path) -> None:
    shapes = shapes_of(recipe_of(demo))
    assert shapes is not None
    assert (shapes.total, shapes.trained, shapes.stored) == (459392, 459392, 459392)
    assert (shapes.layers, shapes.hidden, shapes.vocabulary) == (2, 128, 512)
    assert shapes.largest == 512 * 128  # the embedding
    lora = {"use_peft": True, "lora_r": 8, "lora_target_modules": "all-linear"}
    adapted = shapes_of(recipe_of(demo, **lora))
    assert adapted is not None
    assert adapted.trained == adapted.stored == adapted.total - 459392
    assert shapes_of(recipe_of(demo, model_name_or_path=demo / "data")) is None


def test_what_fits_instead(demo: Path) -> None:
    recipe = recipe_of(demo, per_device_train_batch_size=1, max_length=2048)
    strategy = Strategy(2, 8, half=True)
    (problem,) = check_device(recipe, SEVEN, strategy, total=24 * BILLION)
    assert (problem.code, problem.severity) == ("device-memory", "warning")
    assert "zero2 on 8 processes takes about 2" in problem.what
    assert problem.hint.startswith("the config zero3 would take about 1")
    assert list(check_device(recipe, SEVEN, strategy, total=80 * BILLION)) == []
    (nothing,) = check_device(recipe, SEVEN, strategy, total=1 * BILLION)
    assert nothing.hint.startswith("more processes, ")


@pytest.mark.parametrize(
    ("fields", "each"),
    [
        ({}, None),
        ({"load_in_8bit": "True"}, 1),
        ({"load_in_4bit": "True"}, 0.5 + 4 / 64),
        ({"load_in_4bit": "True", "use_bnb_nested_quant": "True"}, 0.5 + (1 + 4 / 256) / 64),
    ],
)
def test_quantized_weights(demo: Path, fields: dict[str, str], each: float | None) -> None:
    """Of linear layers: not the embedding, the output, norms, nor the adapter."""
    lora = {"use_peft": "True", "lora_r": "4", "lora_target_modules": "all-linear"}
    values = {"model_name_or_path": demo / "model", "output_dir": "x", "bf16": "True"}
    argv = [text for n, v in (values | lora | fields).items() for text in (f"--{n}", str(v))]
    shapes = shapes_of(parse_recipe(argv))
    assert shapes is not None
    layers = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
    assert shapes.quantized == (layers if each else 0)
    assert shapes.quantized_bytes == int(layers * (each or 0))
    plain = replace(shapes, quantized=0, quantized_bytes=0)
    strategy = Strategy(0, 1, half=True)
    spared = device_bytes(plain, strategy, STEP) - device_bytes(shapes, strategy, STEP)
    assert spared == shapes.quantized * shapes.element - shapes.quantized_bytes


def test_shared_sequences_share_activations() -> None:
    """And no other strategy than ZeRO's is offered for them."""
    alone = Strategy(3, 8, half=True)
    shared = replace(alone, sequences=8)
    eighth = activation_bytes(SEVEN, alone, STEP) / 8
    assert activation_bytes(SEVEN, shared, STEP) == pytest.approx(eighth)
    assert checkpoint_bytes(SEVEN, shared) == checkpoint_bytes(SEVEN, alone)
    assert [s.stage for s in alternatives(shared)] == [1, 2, 3, 3]
