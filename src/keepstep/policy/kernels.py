"""What a run computes with: attention, Liger's kernels, rows without padding. Pure.

What is faster, and trains on the same rows with the same loss but for rounding, is taken where it
is there. What the recipe says wins, and a run that has begun keeps what it began with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FLASH = "flash_attention_2"
ATTENTION, LIGER, PADDING_FREE = "attn_implementation", "use_liger_kernel", "padding_free"
KEPT = "as the run began"
AMPERE = (8, 0)  # FlashAttention 2's oldest architecture (flash-attn 2.8)
WIDEST_HEAD = 256  # and its widest head


@dataclass(frozen=True)
class Machine:
    """What a process has to compute with.

    Attributes:
        without: why there is no GPU to compute on; empty: there is one.
        capability: the GPU's, in CUDA's sense.
        flash, liger: why the package cannot be used; empty: it can.
    """

    without: str = ""
    capability: tuple[int, int] = AMPERE
    flash: str = ""
    liger: str = ""


@dataclass(frozen=True)
class Asked:
    """What is asked for, and of what; None: nothing is said.

    Attributes:
        attention, liger, padding_free: by the recipe, or by a script's own model.
        packing: the strategy by which rows are packed; None: they are not.
        compiled: the backend of torch.compile; None: nothing is compiled.
        precision: bf16, fp16 or fp32.
        rows_at_once: of a micro-batch.
        text: rows are text alone, and TRL's own collator makes batches of them.
        takes_flash, takes_liger: the model does.
        widest_head: of its attention.
        own: the attention that transformers takes for the model.
    """

    attention: str | None = None
    liger: bool | None = None
    padding_free: bool | None = None
    packing: str | None = None
    compiled: str | None = None
    precision: str = "bf16"
    rows_at_once: int = 1
    text: bool = True
    takes_flash: bool = True
    takes_liger: bool = True
    widest_head: int = 0
    own: str = "sdpa"


@dataclass(frozen=True)
class Lacks:
    """Why something cannot be taken by default; empty: it can."""

    flash: str = ""
    liger: str = ""


def lacks(asked: Asked, machine: Machine) -> Lacks:
    """What one process's machine, the model and the precision stand in the way of."""
    flash = machine.without or machine.flash
    if not flash and machine.capability < AMPERE:
        flash = "the GPU is older than Ampere"
    elif not flash and asked.precision == "fp32":
        flash = "it needs bf16 or fp16"
    elif not flash and not (asked.takes_flash and asked.widest_head <= WIDEST_HEAD):
        flash = "the model does not take flash attention"
    liger = machine.without or machine.liger
    if not liger and not asked.takes_liger:
        liger = "it has none for the model"
    return Lacks(flash, liger)


def of_all(told: Mapping[int, Lacks]) -> Lacks:
    """What all processes together lack: what one of them lacks, by the first that does.

    Args:
        told: rank → what it lacks; of those that lack something.
    """

    def first(name: str) -> str:
        reasons = {rank: getattr(one, name) for rank, one in sorted(told.items())}
        found = {rank: reason for rank, reason in reasons.items() if reason}
        if not found:
            return ""
        rank = min(found)
        return found[rank] if rank == 0 else f"{found[rank]} on rank {rank}"

    return Lacks(first("flash"), first("liger"))


@dataclass(frozen=True)
class Kernels:
    """What is taken.

    Attributes:
        attention: transformers' name of it.
        liger, padding_free: whether.
        reasons: field → why it is not the fast one; of those that have a reason.
        line: all of it, for people.
    """

    attention: str
    liger: bool
    padding_free: bool
    reasons: Mapping[str, str]
    line: str

    @property
    def settings(self) -> dict[str, bool]:
        """What a resume compares, beside the attention that the model then has."""
        return {LIGER: self.liger, PADDING_FREE: self.padding_free}


def choose(asked: Asked, lacking: Lacks, began: Mapping[str, Any] | None = None) -> Kernels:
    """What a run computes with.

    Args:
        asked: what is said of it.
        lacking: by one of its processes.
        began: the settings of the checkpoint that it goes on from; None: it begins.
    """
    reasons: dict[str, str] = {}

    def settled(name: str, said: Any, fast: Any, slow: Any, reason: str) -> Any:
        if said is not None:
            return said
        if not reason and (began is None or began.get(name) == fast):
            return fast
        reasons[name] = reason or KEPT
        return slow

    attention = settled(ATTENTION, asked.attention, FLASH, asked.own, lacking.flash)
    liger = settled(LIGER, asked.liger, True, False, lacking.liger)
    reason = ""
    if asked.packing or not asked.text:
        reason = "rows are packed" if asked.packing else "rows have images, or a collator of theirs"
    elif not attention.startswith("flash_attention"):
        reason = f"attention is {attention}"  # others pay for it with a mask of tokens x tokens
    elif began is None and asked.rows_at_once == 1:
        reason = "one row at once has no padding"
    padding_free = settled(PADDING_FREE, asked.padding_free, True, False, reason)
    words = list(_words(asked, attention, liger, padding_free, reasons))
    return Kernels(attention, liger, padding_free, reasons, _line(words))


def _words(
    asked: Asked, attention: str, liger: bool, padding_free: bool, reasons: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Each thing, and why it is not the fast one."""
    yield f"attention {attention}", reasons.get(ATTENTION, "")
    yield "Liger" if liger else "no Liger", reasons.get(LIGER, "")
    if padding_free and not asked.packing:
        yield "rows without padding", ""
    yield f"packing {asked.packing or 'off'}", ""
    if asked.compiled:
        yield f"torch.compile ({asked.compiled})", ""


def _line(words: list[tuple[str, str]]) -> str:
    """Neighbors with one reason share it."""
    told = []
    for place, (word, reason) in enumerate(words):
        shared = place + 1 < len(words) and words[place + 1][1] == reason
        told.append(word if shared or not reason else f"{word} ({reason})")
    return ", ".join(told)
