"""Steps of a stream that go on exactly, in the place of those of datasets that do not.

`datasets.IterableDataset.shuffle` reads several files in turn, in threads that are ahead of what
they tell, and draws from a buffer whose rows are in no state: a stream that goes on has lost them.
Here files are read in turn without being ahead, and rows are shuffled within blocks, each of which
is known by where it begins: to go on, that one block is read again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
from datasets import iterable_dataset as steps

from keepstep.data.common import is_stream
from keepstep.data.stream_sources import SourcesInTurn, seed_of, shifted


def exact(rows: Any) -> Any:
    """A stream with such steps in the place of its own; anything else as it is. Ranks: any."""
    if not is_stream(rows):
        return rows
    return datasets.IterableDataset(
        _exact(rows._ex_iterable),
        info=rows._info.copy(),
        split=rows._split,
        formatting=rows._formatting,
        distributed=copy.deepcopy(rows._distributed),
        token_per_repo_id=rows._token_per_repo_id,
    )


def _exact(step: Any) -> Any:
    if isinstance(step, steps.BufferShuffledExamplesIterable):
        return ShuffledBlocks(_exact(step.ex_iterable), step.buffer_size, step.generator)
    if isinstance(step, steps.InterleavedShardsExamplesIterable):
        return FilesInTurn(_exact(step.ex_iterable), step.max_input_shards)
    if isinstance(step, steps.CyclingMultiSourcesExamplesIterable):
        sources, numbers = map(_exact, step.ex_iterables), getattr(step, "generator", None)
        shares = getattr(step, "probabilities", None)
        return SourcesInTurn(list(sources), step.stopping_strategy, numbers, shares)
    made = copy.copy(step)
    if hasattr(step, "ex_iterable"):
        made.ex_iterable = _exact(step.ex_iterable)
    if hasattr(step, "ex_iterables"):
        made.ex_iterables = [_exact(one) for one in step.ex_iterables]
    return made


class _Step(steps._BaseExamplesIterable):  # type: ignore[misc]
    """What both have of the step below them."""

    ex_iterable: Any

    def made_over(self, below: Any) -> Any:
        """The same over another step."""
        raise NotImplementedError

    @property
    def is_typed(self) -> bool:
        return bool(self.ex_iterable.is_typed)

    @property
    def features(self) -> Any:
        return self.ex_iterable.features

    @property
    def num_shards(self) -> int:
        return int(self.ex_iterable.num_shards)

    def shuffle_data_sources(self, generator: Any) -> Any:
        return self.made_over(self.ex_iterable.shuffle_data_sources(generator))

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> Any:
        return self.made_over(self.ex_iterable.shard_data_sources(num_shards, index, contiguous))

    def reshard_data_sources(self) -> Any:
        return self.made_over(self.ex_iterable.reshard_data_sources())


class ShuffledBlocks(_Step):
    """Rows shuffled within blocks of `size` of them."""

    def __init__(self, ex_iterable: Any, size: int, generator: np.random.Generator) -> None:
        super().__init__()
        self.ex_iterable, self._size, self._generator = ex_iterable, size, generator

    def made_over(self, below: Any) -> ShuffledBlocks:
        return ShuffledBlocks(below, self._size, self._generator)

    def shift_rngs(self, value: int) -> ShuffledBlocks:
        """The same with other numbers, in another pass, say."""
        return ShuffledBlocks(self.ex_iterable, self._size, shifted(self._generator, value))

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict = {
            "examples_iterable": self.ex_iterable._init_state_dict(),
            "begin": None,  # the state below where the block begins
            "block": 0,
            "given": 0,  # rows of it
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        state: Any = self._state_dict or {"block": 0, "given": 0, "begin": None}
        seed = seed_of(self._generator)
        if state["begin"]:
            self.ex_iterable.load_state_dict(state["begin"])
        iterator = iter(self.ex_iterable)
        while True:
            if self._state_dict:
                state["begin"] = self.ex_iterable.state_dict()
            rows = list(islice(iterator, self._size))
            if not rows:
                return
            order = np.random.default_rng([seed, state["block"]]).permutation(len(rows))
            for place in order[state["given"] :]:
                state["given"] += 1
                yield rows[place]
            state["block"], state["given"] = state["block"] + 1, 0


class FilesInTurn(_Step):
    """A row of each file in turn, of `most` at a time; files are dealt out to that many."""

    def __init__(self, ex_iterable: Any, most: int) -> None:
        super().__init__()
        self.ex_iterable, self._most = ex_iterable, most
        self._parts: list[Any] = []

    def made_over(self, below: Any) -> FilesInTurn:
        return FilesInTurn(below, self._most)

    def _in_parts(self) -> list[Any]:
        count = max(1, min(self.ex_iterable.num_shards, self._most))
        return [self.ex_iterable.shard_data_sources(count, part) for part in range(count)]

    def _init_state_dict(self) -> dict[str, Any]:
        self._parts = self._in_parts()
        self._state_dict = {
            "parts": [part._init_state_dict() for part in self._parts],
            "turn": 0,
            "over": [False for _ in self._parts],
            "type": type(self).__name__,
        }
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        parts = self._parts if self._state_dict else self._in_parts()
        state: Any = self._state_dict or {"turn": 0, "over": [False for _ in parts]}
        iterators = [iter(part) for part in parts]
        while not all(state["over"]):
            turn = state["turn"] % len(parts)
            state["turn"] += 1
            if state["over"][turn]:
                continue
            row = next(iterators[turn], None)
            if row is None:
                state["over"][turn] = True
            else:
                yield row
