"""Which checkpoints the machines of a run have together, each a part on its own disk. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """What a machine has of a checkpoint.

    Attributes:
        whole: a digest of the whole checkpoint's manifest: a branch may have saved its step again.
        count: how many files the whole has.
        names: of the files that this machine has.
    """

    whole: str
    count: int
    names: frozenset[str]


def together(held: Mapping[int, Mapping[int, Held]]) -> dict[int, dict[str, int]]:
    """The checkpoints of which no file is missing.

    Args:
        held: of each machine's first rank, what the machine has: step → part.

    Returns:
        step → file → the first rank of a machine that has it: the lowest.
    """
    files: dict[tuple[int, str], dict[str, int]] = {}
    counts: dict[tuple[int, str], int] = {}
    for rank in sorted(held, reverse=True):
        for step, part in held[rank].items():
            key = step, part.whole
            files.setdefault(key, {}).update(dict.fromkeys(part.names, rank))
            counts[key] = part.count
    whole = {key: found for key, found in files.items() if len(found) == counts[key]}
    return {step: found for (step, _), found in sorted(whole.items())}
