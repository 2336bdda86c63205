"""What sequence parallelism (DeepSpeed's ALST/Ulysses) does not go with, by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from keepstep.preflight.shapes import configuration_of
from keepstep.recipe.config import Problem, Recipe

SEQUENCES = "sp_size"
WITHOUT = "a launch without it"


def check_sequences(size: int, stage: int, attention: str, recipe: Recipe) -> Iterator[Problem]:
    """Of a launch whose processes share out each row's tokens: rows are not packed. Ranks: any.

    Args:
        size: how many processes share each row's.
        stage: ZeRO's; 0: nothing is sharded, or there is no DeepSpeed.
        attention: that it is made for.
        recipe: all of it.
    """
    training, told = recipe.training, f"sequence parallelism ({SEQUENCES}: {size})"
    if stage == 0:
        yield Problem(f"{told} needs DeepSpeed, with ZeRO-1, 2 or 3", "zero_stage: 3", "launch")
    for name, asked in {
        "packing": getattr(training, "packing", False),
        "eval_packing": getattr(training, "eval_packing", False),
        "padding_free": getattr(training, "padding_free", False),
        "torch_compile": training.torch_compile,
        "train_sampling_strategy: batch_rebalance": not training.rows_are_dealt,
    }.items():
        if asked:  # packed rows would see each other: the mask that keeps them apart is given up
            yield Problem(f"{told} does not go with {name}", f"leave out {name}", "launch")
    with contextlib.suppress(OSError, ValueError, TypeError):  # loading it will say why
        yield from check_attention(configuration_of(recipe), size)
    init = getattr(training, "model_init_kwargs", None) or {}
    said = init.get("attn_implementation") or recipe.model.attn_implementation
    if said is not None and said != attention:
        yield Problem(
            f"attn_implementation: {said}, and {told} is launched with "
            f"sp_attn_implementation: {attention}",
            "the same in both",
            "launch",
        )


def check_attention(config: Any, sequences: int) -> Iterator[Problem]:
    """Whether attention can be shared out: by heads, and with no mask but the causal one, which is
    all that Ulysses keeps. Ranks: any.

    Args:
        config: the model's.
        sequences: how many processes share each row's tokens.
    """
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    # Of fewer key and value heads DeepSpeed (0.19.8) makes copies, and evaluations then fail.
    if sequences > 1 and (heads % sequences or shared % sequences):
        yield Problem(
            f"sequence parallelism ({SEQUENCES}: {sequences}): the model has {heads} attention "
            f"heads and {shared} key and value heads",
            f"a divisor of both: {SEQUENCES}: {math.gcd(heads, shared)}, at most",
            "launch",
        )
    layers = set(getattr(text, "layer_types", None) or ["by window"])
    windowed = getattr(text, "sliding_window", None) and layers != {"full_attention"}
    if sequences > 1 and (windowed or layers - {"by window", "full_attention"}):
        told = (
            f"sequence parallelism ({SEQUENCES}: {sequences}): attention of the model sees a window"
        )
        yield Problem(f"{told} of each row, or has layers of another kind", WITHOUT, "launch")


def check_whole_rows(training: Any, trainer: str) -> Iterator[Problem]:
    """Of a Trainer that cannot share out the tokens of a row. Ranks: any."""
    if training.sequence_size > 1:
        told = f"sequence parallelism ({SEQUENCES}: {training.sequence_size})"
        yield Problem(f"{told}: {trainer} gives each process whole rows", WITHOUT, "launch")
