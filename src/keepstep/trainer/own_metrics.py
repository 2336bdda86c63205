"""A user's metrics: computed batch by batch, on each rank its own, and added up at the end."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from keepstep.policy.own_metric import DEAR, Sums, added, asked_for, checked, means
from keepstep.ranks import collectives
from keepstep.recipe.functions import named
from keepstep.recipe.problems import ConfigError, Problem


class OwnMetrics:
    """The function of a recipe's `metrics`, and what it has given in one evaluation.

    Attributes:
        name: of the function, as the recipe has it.
    """

    def __init__(self, name: str, processing_class: Any) -> None:
        """
        Raises:
            ConfigError: there is no such function.
        """
        self.name, self._processing_class = name, processing_class
        try:
            self._function = named(name)
            self._asked = asked_for(self._function)
        except ValueError as error:
            raise self._error(str(error)) from error
        self._sums: Sums = {}

    def begin(self) -> None:
        """Count anew. Ranks: any."""
        self._sums = {}

    def add(
        self,
        model: Callable[..., Any],
        arguments: Mapping[str, Any],
        outputs: Any,
        real: Any,
    ) -> None:
        """Count a batch.

        Ranks: all (collective): where `logits` are asked for, the model is passed; and an error of
        the function on one rank is everybody's.

        Args:
            model: as the evaluation calls it.
            arguments: of its call for this batch, labels among them.
            outputs: of TRL's head for it.
            real: the part of the batch that does not only fill it up.

        Raises:
            ConfigError: on every rank: the function fails, or returns something else than sums and
                counts.
        """
        given = self._given(arguments, outputs)
        if set(DEAR) & set(self._asked):
            given["logits"] = _passed_again(model, arguments, given["labels"].shape[1])
        if "predictions" in self._asked:
            given["predictions"] = given["logits"].argmax(-1)
        wanted = {name: given[name][real] for name in self._asked if name in given}
        # What the loss is made of stays as it is, whatever the function does with what it gets.
        wanted = {name: part if name in DEAR else part.clone() for name, part in wanted.items()}
        if "processing_class" in self._asked:
            wanted["processing_class"] = self._processing_class
        found = collectives.on_all(
            "computing the metrics",
            lambda: self._called(wanted) if given["labels"][real].numel() else {},
        )
        self._sums = added((self._sums, found))

    def _given(self, arguments: Mapping[str, Any], outputs: Any) -> dict[str, Any]:
        """What is cheap, each of (rows, tokens): at each place what is said of the next token."""
        labels = arguments["labels"][:, 1:]
        length = labels.shape[1]  # a learned prompt stands ahead of the row, in the outputs alone
        given = {name: getattr(outputs, name)[:, -length:] for name in ("log_probs", "entropy")}
        given["is_top1"] = outputs.is_top1[:, -length:].bool()
        if "input_ids" in self._asked:
            given["input_ids"] = arguments["input_ids"][:, :-1]
        return given | {"labels": labels}

    def _called(self, wanted: Mapping[str, Any]) -> Sums:
        try:
            with torch.no_grad():
                returned = self._function(**wanted)
        except Exception as error:
            raise self._error(f"it raised {_told(error)}") from error
        try:
            return checked(returned)
        except ValueError as error:
            raise self._error(str(error)) from error

    def names(self) -> list[str]:
        """What the function has given so far, on any rank. Ranks: all (collective)."""
        return list(added(collectives.gather(self._sums)))

    def means(self) -> dict[str, float]:
        """Of all ranks together. Ranks: all (collective)."""
        return means(added(collectives.gather(self._sums)))

    def _error(self, what: str) -> ConfigError:
        hint = (
            "def mine(labels, is_top1): return {'right': (is_top1.sum(), (labels != -100).sum())}"
        )
        return ConfigError([Problem(f"metrics: {self.name}: {what}", hint, "metrics")])


def _passed_again(model: Callable[..., Any], arguments: Mapping[str, Any], length: int) -> Any:
    """A batch's logits, which TRL's head never has. Ranks: all (collective where passes are)."""
    left_out = ("labels", "fused_lm_head")
    with torch.no_grad():
        outputs = model(**{n: value for n, value in arguments.items() if n not in left_out})
    return outputs.logits[:, :-1][:, -length:]


def _told(error: Exception) -> str:
    """An error, and where it came from."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{where.filename.rpartition('/')[-1]}, line {where.lineno}"
    return f"{type(error).__name__}: {error} on rank {collectives.rank()} ({place})"
