"""What a run computes with: said, kept, or the fastest that nothing stands in the way of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.kernels import (
    ATTENTION,
    FLASH,
    LIGER,
    PADDING_FREE,
    Asked,
    Kernels,
    Lacks,
    Machine,
    choose,
    lacks,
    of_all,
)

ROWS = Asked(rows_at_once=4)
NO_GPU = Machine("no CUDA device")
NOTHING = Machine(flash="flash-attn is not installed", liger="liger-kernel is not installed")


def settings(chosen: Kernels) -> dict[str, object]:
    """As a manifest has them."""
    return chosen.settings | {ATTENTION: chosen.attention}


def told(asked: Asked, machine: Machine, began: dict[str, object] | None = None) -> str:
    return choose(asked, lacks(asked, machine), began).line


@pytest.mark.parametrize(
    ("asked", "machine", "line"),
    [
        (ROWS, NO_GPU, "attention sdpa, no Liger (no CUDA device), packing off"),
        (
            ROWS,
            NOTHING,
            "attention sdpa (flash-attn is not installed), no Liger (liger-kernel is not "
            "installed), packing off",
        ),
        (ROWS, Machine(), "attention flash_attention_2, Liger, rows without padding, packing off"),
        (
            replace(ROWS, rows_at_once=1),
            Machine(),
            "attention flash_attention_2, Liger, packing off",
        ),
        (
            replace(ROWS, packing="bfd", compiled="inductor"),
            Machine(),
            "attention flash_attention_2, Liger, packing bfd, torch.compile (inductor)",
        ),
        (
            replace(ROWS, text=False),
            Machine(),
            "attention flash_attention_2, Liger, packing off",
        ),
        (
            replace(ROWS, precision="fp32"),
            Machine(),
            "attention sdpa (it needs bf16 or fp16), Liger, packing off",
        ),
        (
            replace(ROWS, widest_head=512, takes_liger=False),
            Machine(),
            "attention sdpa (the model does not take flash attention), no Liger (it has none for "
            "the model), packing off",
        ),
        (
            ROWS,
            Machine(capability=(7, 5)),
            "attention sdpa (the GPU is older than Ampere), Liger, packing off",
        ),
        (
            replace(ROWS, attention="eager", liger=False, padding_free=False),
            Machine(),
            "attention eager, no Liger, packing off",
        ),
        (
            replace(ROWS, padding_free=True),
            NO_GPU,
            "attention sdpa, no Liger (no CUDA device), rows without padding, packing off",
        ),
    ],
)
def test_one_line(asked: Asked, machine: Machine, line: str) -> None:
    assert told(asked, machine) == line


def test_a_run_keeps_what_it_began_with() -> None:
    slow, fast = settings(choose(ROWS, lacks(ROWS, NOTHING))), settings(choose(ROWS, Lacks()))
    assert slow == {ATTENTION: "sdpa", LIGER: False, PADDING_FREE: False}
    assert fast == {ATTENTION: FLASH, LIGER: True, PADDING_FREE: True}
    now = choose(ROWS, Lacks(), slow)  # somebody has installed them
    assert settings(now) == slow
    assert now.line == "attention sdpa, no Liger (as the run began), packing off"
    assert settings(choose(ROWS, Lacks(), {})) == slow  # one that was adopted
    now = choose(ROWS, lacks(ROWS, NOTHING), fast)  # or taken them away: a resume tells of drift
    assert settings(now) == slow
    assert now.reasons[LIGER] == "liger-kernel is not installed"
    assert now.reasons[PADDING_FREE] == "attention is sdpa"


def test_all_processes_take_the_same() -> None:
    assert of_all({}) == Lacks()
    found = of_all({3: Lacks("a", ""), 1: Lacks("", "b"), 5: Lacks("c", "d")})
    assert found == Lacks("a on rank 3", "b on rank 1")
    assert of_all({0: Lacks("a", "a"), 1: Lacks("b", "b")}) == Lacks("a", "a")


asked_for = st.builds(
    Asked,
    attention=st.none() | st.sampled_from(["eager", "sdpa", FLASH]),
    liger=st.none() | st.booleans(),
    padding_free=st.none() | st.booleans(),
    packing=st.none() | st.just("bfd"),
    rows_at_once=st.integers(1, 3),
    text=st.booleans(),
    own=st.sampled_from(["sdpa", "eager"]),
)
reasons = st.sampled_from(["", "not here"])


@given(asked_for, reasons, reasons, reasons, reasons, st.integers(1, 3))
def test_what_holds_of_every_choice(
    asked: Asked, flash: str, liger: str, later_flash: str, later_liger: str, rows: int
) -> None:
    first = choose(asked, Lacks(flash, liger))
    for name, value in settings(first).items():
        said = {ATTENTION: asked.attention, LIGER: asked.liger, PADDING_FREE: asked.padding_free}
        assert said[name] is None or value == said[name], "what is said wins"
    assert not (flash and asked.attention is None and first.attention == FLASH)
    assert not (liger and asked.liger is None and first.liger)
    later = choose(
        replace(asked, rows_at_once=rows), Lacks(later_flash, later_liger), settings(first)
    )
    assert later.liger <= first.liger, "nothing new is taken by a run that has begun"
    assert later.padding_free <= first.padding_free
    assert later.attention in (first.attention, asked.own)
    if (flash, liger) == (later_flash, later_liger):
        assert settings(later) == settings(first), "the same machine: the same run"
