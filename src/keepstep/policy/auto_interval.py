"""`save_interval_seconds: auto`: as often as saves cost training next to nothing. Pure.

Three things hold the next save back: the least time between two (`least`); what saves cost,
training's time (`overhead`) and the disk's (`WRITING_SHARE`); and saves that fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

AUTO = "auto"  # in place of seconds
LOOK_BACK = 20  # saves that tell what the next one costs
# Of the time, at most, a save may be on its way: the disk is others', too, and steps are a little
# slower meanwhile, which is not counted. It is ten times the length of a save from one to the next.
WRITING_SHARE = 0.1
RETRY_SECONDS = 60.0  # until the next one, when one has failed; twice as long after each further


@dataclass(frozen=True)
class AutoInterval:
    """What was asked for.

    Attributes:
        overhead: the largest share of an attempt's time that training may stand still for saves.
        least: seconds from the beginning of one save to the next one's, at least.
    """

    overhead: float = 0.01
    least: float = 10.0


@dataclass(frozen=True)
class SaveCosts:
    """What saves have cost so far, whoever asked for them. All in seconds.

    Attributes:
        began: when this attempt began to train, on the steady clock.
        stood_still: how long training has stood still since then, for all saves together.
        stalls: how long it did for each of the latest saves, of earlier attempts, too.
        lengths: of the latest saves, from their beginning to their commit; likewise.
        failed: how many saves in a row have failed by now.
    """

    began: float = 0.0
    stood_still: float = 0.0
    stalls: Sequence[float] = ()
    lengths: Sequence[float] = ()
    failed: int = 0

    def share(self, now: float) -> float:
        """What training has stood still for saves, of this attempt's time."""
        return self.stood_still / max(now - self.began, self.stood_still) if self.stood_still else 0


def costs_of(saves: Iterable[Mapping[str, Any]]) -> SaveCosts:
    """What these saves have cost, by what the log tells of each; see `Saved.facts`."""
    known = list(saves)
    stalls = [float(save.get("stall", 0.0)) for save in known]
    return SaveCosts(stalls=stalls, lengths=[length_of(save) for save in known])


def length_of(save: Mapping[str, Any]) -> float:
    """Seconds from a save's beginning to its commit."""
    return sum(float(save.get(name, 0.0)) for name in ("stall", "write", "read_back", "commit"))


def seconds_apart(auto: AutoInterval, costs: SaveCosts) -> float:
    """From the beginning of one save to the next one's, as saves are now.

    One that took long is no rule: a median of the latest tells. What it cost is paid back all the
    same, see `next_moment`.
    """
    stall, length = typical(costs.stalls), typical(costs.lengths)
    apart = max(auto.least, stall / auto.overhead, length / WRITING_SHARE)
    return max(apart, RETRY_SECONDS * 2 ** min(costs.failed - 1, 10)) if costs.failed else apart


def next_moment(auto: AutoInterval, costs: SaveCosts, last_save: float) -> float:
    """The first moment, on the steady clock, at which the next save may begin.

    With what it is expected to cost, all saves of this attempt stay below the bound then. The first
    one, of which nothing is known, comes after the least time.

    Args:
        last_save: when the newest save began (or the attempt, before the first).
    """
    spent = costs.stood_still + typical(costs.stalls)
    return max(last_save + seconds_apart(auto, costs), costs.began + spent / auto.overhead)


def told(auto: AutoInterval, costs: SaveCosts) -> str:
    """What `auto` means here, as far as it is known what saves cost."""
    bound = f"{100 * auto.overhead:g} % of the time"
    if not costs.stalls:
        return (
            f"save_interval_seconds: auto: the first save comes after {auto.least:g} s; then as "
            f"often as training stands still for saves at most {bound}"
        )
    stall, length = typical(costs.stalls), typical(costs.lengths)
    return (
        f"save_interval_seconds: auto: a save about every {seconds_apart(auto, costs):.3g} s: it "
        f"stops training for {stall:.3f} s (at most {bound}) and takes {length:.2f} s"
    )


def typical(seconds: Sequence[float]) -> float:
    """The median of the latest; 0 of none."""
    return median(seconds[-LOOK_BACK:]) if seconds else 0.0
