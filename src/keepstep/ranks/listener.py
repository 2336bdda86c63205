"""What was heard of the other ranks, and what is wrong with them. No clock, no store."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import cast

from keepstep.output.printable import first_few
from keepstep.policy.standstill import TOLD, Bound, Phase, Standstills

PERIOD_SECONDS = 2.0
LATE_SECONDS = 2 * PERIOD_SECONDS  # a listener that comes round later cannot blame the others
# After an error of the connection: whoever misses three signs of life is behind it.
SILENT_SECONDS = 3 * PERIOD_SECONDS
SHOWN = 8  # ranks that are named: of thousands, a switch or a disk may take many along
GONE = "died: the process is gone"
HEARD = "heard"  # said by a rank that knows the verdict, and ends
SEEKS = "seeks"  # said by a rank whose connection broke: who is silent now is behind it
LEARNT = " (learnt from them; where such a pause may be right: hang_min_seconds)"
# Before the first step a single call may keep a process from everything else for longer.
PATIENCE_AT_FIRST = 4


class Listener:
    """What was heard of some ranks, and since when nothing new.

    A rank says how often it has spoken, how often its main thread has got on, how many collectives
    that has entered (whoever is waited for has entered the fewest), and what it is at. And, where
    that is so: that its connection broke, that it has failed and of what, that it has left.

    Attributes:
        hang: the bound by which ranks were pronounced stuck, None before.
    """

    def __init__(self, ranks: list[int], dead_after: float, standstills: Standstills) -> None:
        self.ranks, self.hang = ranks, cast(Bound | None, None)
        self._dead_after, self._standstills = dead_after, standstills
        self._heard: dict[int, tuple[str, float]] = {}
        self._moved: tuple[list[tuple[int, ...]], float] = [], 0.0
        self._last: float | None = None

    def hear(
        self, said: list[str], now: float, gone: Container[int] = ()
    ) -> tuple[list[int], str] | None:
        """Ranks that something is wrong with, and what; None when all is well.

        Args:
            said: the newest word of each.
            now: the listener's own clock.
            gone: whose process was seen to have ended, before their words were asked for.
        """
        self._forgive(now)
        for rank, text in zip(self.ranks, said, strict=True):
            if rank not in self._heard or self._heard[rank][0] != text:
                self._heard[rank] = text, now
        failed = [r for r, (text, _) in self._heard.items() if text.startswith("failed ")]
        if failed:
            return failed[:1], self._heard[failed[0]][0].replace("failed ", "failed: ", 1)
        present = {r: _counts(text) for r, (text, _) in self._heard.items() if not has_ended(text)}
        dead = [rank for rank in present if rank in gone]
        if dead:
            return dead, GONE
        begun = any(counts[0] for counts in present.values())
        limit = patience(self._dead_after, begun)
        if any(text.endswith(SEEKS) for text, _ in self._heard.values()):
            limit = min(limit, SILENT_SECONDS)
        silent = [r for r in present if now - self._heard[r][1] > limit]
        if silent:
            return silent, f"gave no sign of life for {limit:g} s: dead or frozen"
        return self._stuck(present, now) if begun and len(self.ranks) > 1 else None

    def _forgive(self, now: float) -> None:
        """A listener that was itself late counts anew: all may have been stopped together."""
        if self._last is not None and now - self._last > LATE_SECONDS:
            self._heard = {rank: (text, now) for rank, (text, _) in self._heard.items()}
            self._moved = self._moved[0], now
        self._last = now

    def _stuck(
        self, present: dict[int, tuple[int, ...]], now: float
    ) -> tuple[list[int], str] | None:
        """Those that have got least far, when nobody has got on for too long."""
        if list(present.values()) != self._moved[0]:
            self._moved = list(present.values()), now
        still = now - self._moved[1]
        if still <= self._standstills.soonest:
            return None
        bound = self._standstills.bound({self._phase(rank) for rank in present})
        if still <= bound.seconds:
            return None
        self.hang = bound
        least = min(present.values())
        behind = [rank for rank, counts in present.items() if counts == least]
        where = self._standstills.told(self._phase(behind[0]), bound)
        all_equal = "" if len(behind) < len(present) else ", and none is behind the others"
        told = f"made no progress for {round(bound.seconds, 1):g} s {where}{all_equal}: stuck"
        return behind, f"{told}{LEARNT}" if bound.is_learnt else told

    def _phase(self, rank: int) -> Phase:
        """What a rank is at, of what it has said."""
        words = self._heard[rank][0].split()
        return cast(Phase, words[3]) if len(words) > 3 and words[3] in TOLD else "start"


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Some ranks and where they run, the first few of many."""
    return first_few([f"rank {rank} on {hosts[rank]}" for rank in ranks], at_most=SHOWN)


def is_of_main(verdict: str) -> bool:
    """Whether a verdict is that the main process is gone, which only others can pronounce."""
    return verdict.startswith("rank 0 on ") and (GONE in verdict or "no sign of life" in verdict)


def has_ended(text: str) -> bool:
    """Whether a rank has said its last word: nobody has to wait for it, or to tell it anything."""
    return text in ("left", HEARD) or text.startswith("failed ")


def _counts(text: str) -> tuple[int, ...]:
    """Progress and collectives, of what a rank has said."""
    return tuple(int(word) for word in text.split()[1:3])


def patience(dead_after: float, begun: bool) -> float:
    """Seconds of silence after which a rank is dead."""
    return dead_after if begun else PATIENCE_AT_FIRST * dead_after
