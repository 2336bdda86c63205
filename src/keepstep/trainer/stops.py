"""A stop that is asked for before there is anything to save."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from keepstep.errors import KeepstepError
from keepstep.ranks import collectives, signals
from keepstep.ranks.carried_error import RankError
from keepstep.ranks.outcome import is_persons


class StoppedError(KeepstepError):
    """Somebody has asked for a stop before training has begun: there is nothing to save."""


@contextlib.contextmanager
def stopped_rather_than_failed(steps_made: Callable[[], int | None]) -> Iterator[None]:
    """Within, an error before the first step is the stop's, if one was asked for.

    A launcher signals each rank's whole process group, and what DeepSpeed compiles there breaks
    off. An error that has another reason meets the next launch. Ranks: any; each for itself.

    Args:
        steps_made: tells how far training has got.

    Raises:
        StoppedError: in its place.
    """
    try:
        yield
    except Exception as error:
        name = signals.requested()
        is_foreign = isinstance(error, RankError) or not isinstance(error, KeepstepError)
        if name is None or not is_persons(name) or steps_made() or not is_foreign:
            raise
        raise StoppedError(f"{name} to rank {collectives.rank()}") from error


def stop_asked() -> str | None:
    """The signals that ask for a stop, None when there are none. Ranks: all (collective)."""
    of_ranks = collectives.gather_some(signals.requested())
    return ", ".join(f"{name} to rank {rank}" for rank, name in of_ranks.items()) or None


def stop_if_asked() -> None:
    """
    Ranks: all (collective).

    Raises:
        StoppedError: on every rank, when one of them has received a signal.
    """
    asked = stop_asked()
    if asked is not None:
        raise StoppedError(asked)
