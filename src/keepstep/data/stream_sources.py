"""Rows of several streams in turn, or by chance: a step of a stream that goes on exactly.

The steps of datasets for this (`interleave_datasets`) read each source in a thread that is ahead of
what it tells. Here a source is read when its row is due, and which one is due follows from the
number of the row: so the place is that number, and a place in each source.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import iterable_dataset as steps

DRAWN_AT_ONCE = 1000  # turns


def seed_of(generator: np.random.Generator) -> int:
    """What a step draws its numbers with; the generator stays as it is."""
    return int(copy.deepcopy(generator).integers(0, 1 << 63))


def shifted(generator: np.random.Generator, value: int) -> np.random.Generator:
    """Another one, of another pass, say: as datasets shifts its own."""
    return np.random.default_rng(abs(seed_of(generator) - value))


class SourcesInTurn(steps._BaseExamplesIterable):  # type: ignore[misc]
    """Rows of several sources.

    Attributes:
        strategy: when it ends (of `interleave_datasets`): `first_exhausted`: when a row is due of a
            source that has no more. `all_exhausted`: when each had none once; one that had begins
            again. `all_exhausted_without_replacement`: when each is over; turns of one that is are
            left out.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        strategy: str,
        generator: np.random.Generator | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
            generator: draws the sources; None: they take turns.
            shares: of rows, of each source, that are 1 in all; None: alike.
        """
        super().__init__()
        self.ex_iterables, self.strategy = list(sources), strategy
        self._generator, self._shares = generator, shares

    @property
    def is_typed(self) -> bool:
        return bool(self.ex_iterables[0].is_typed)

    @property
    def features(self) -> Any:
        return self.ex_iterables[0].features

    @property
    def num_shards(self) -> int:
        return min(int(source.num_shards) for source in self.ex_iterables)

    def shift_rngs(self, value: int) -> SourcesInTurn:
        """The same with other numbers, in another pass, say."""
        if self._generator is None:
            return self
        return self._over(self.ex_iterables, shifted(self._generator, value))

    def shuffle_data_sources(self, generator: np.random.Generator) -> SourcesInTurn:
        sources = [source.shuffle_data_sources(generator) for source in self.ex_iterables]
        return self._over(sources, self._generator and generator)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> Any:
        of = min(num_shards, self.num_shards)
        sources = [source.shard_data_sources(of, index, contiguous) for source in self.ex_iterables]
        return self._over(sources, self._generator)

    def reshard_data_sources(self) -> SourcesInTurn:
        sources = [source.reshard_data_sources() for source in self.ex_iterables]
        return self._over(sources, self._generator)

    def _over(self, sources: Sequence[Any], generator: np.random.Generator | None) -> SourcesInTurn:
        return SourcesInTurn(sources, self.strategy, generator, self._shares)

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict = {
            "sources": [source._init_state_dict() for source in self.ex_iterables],
            "turn": 0,
            "over": [False for _ in self.ex_iterables],
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        state: Any = self._state_dict or {"turn": 0, "over": [False for _ in self.ex_iterables]}
        iterators = [iter(source) for source in self.ex_iterables]
        for source in self._turns(state["turn"]):
            if all(state["over"]):
                return
            state["turn"] += 1
            if state["over"][source] and self.strategy == "all_exhausted_without_replacement":
                continue
            row = next(iterators[source], None)
            if row is None:
                if self.strategy == "first_exhausted":
                    return
                state["over"][source] = True
                if self.strategy != "all_exhausted" or all(state["over"]):
                    continue
                iterators[source] = self._again(source)
                row = next(iterators[source], None)
            if row is not None:
                yield row

    def _turns(self, turn: int) -> Iterator[int]:
        """Whose row is due, from this turn on."""
        count = len(self.ex_iterables)
        if self._generator is None:
            while True:
                yield turn % count
                turn += 1
        seed = seed_of(self._generator)
        while True:
            block, begin = divmod(turn, DRAWN_AT_ONCE)
            numbers = np.random.default_rng([seed, block])
            drawn = numbers.choice(count, size=DRAWN_AT_ONCE, p=self._shares)
            yield from map(int, drawn[begin:])
            turn += DRAWN_AT_ONCE - begin

    def _again(self, source: int) -> Iterator[Any]:
        """From its first row."""
        state: Any = self._state_dict
        if state:
            state["sources"][source] = self.ex_iterables[source]._init_state_dict()
        return iter(self.ex_iterables[source])
