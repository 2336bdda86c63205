"""Rows as a model will see them: their text, what of it is trained on, and how long they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from keepstep.data.dataset import Data
from keepstep.data.rows import Count
from keepstep.data.taken import Part
from keepstep.data.tokenize import (
    IGNORED,
    Preparation,
    kept,
    lists_of,
    measure,
    packs,
    problems_of,
)
from keepstep.recipe.config import ConfigError, KeepstepConfig, Recipe
from keepstep.recipe.model import with_chat_template

LOOKED_AT = 8000  # rows of each part, at most


@dataclass(frozen=True)
class SeenRow:
    """One row.

    Attributes:
        spans: its text in pieces: whether it is trained on, and the text.
        tokens: how many it has, as it is used.
        trained: on how many of them.
        lost: how many are beyond `max_length`.
    """

    spans: Sequence[tuple[bool, str]]
    tokens: int
    trained: int
    lost: int


@dataclass(frozen=True)
class Preview:
    """What was seen of the training or the evaluation rows.

    Attributes:
        what: `training` or `evaluation`.
        source: where they come from.
        renamed: how columns of other names were understood; may be empty.
        rows: the first ones.
        count: what becomes of those that were made into tokens.
        whole: whether these were all.
        lengths: of them, in tokens, before they are cut.
        packed: whether they are packed.
    """

    what: str
    source: str
    renamed: str
    rows: Sequence[SeenRow]
    count: Count
    whole: bool
    lengths: Sequence[int]
    packed: bool


def previews(
    data: Data, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, count: int
) -> Iterator[Preview]:
    """The first `count` rows of each part, and the measure of up to 8,000 of them.

    Raises:
        ConfigError: rows cannot be made into tokens.
    """
    rendering = with_chat_template(tokenizer, recipe.training)
    for what, part in data.parts.items():
        try:
            seen = _preview(what, part, rendering, recipe.training, count)
        except Exception as error:  # of a row further on than those that were looked at
            problems = problems_of(what, error)
            if not problems:
                raise
            raise ConfigError(problems) from error
        yield seen


def _preview(
    what: str,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    training: KeepstepConfig,
    count: int,
) -> Preview:
    taken = part.rows.take(LOOKED_AT if part.streamed else min(LOOKED_AT, len(part.rows)))
    prepared = Preparation(tokenizer, training, next(iter(taken))).prepared(taken, what)
    packed = packs(what, training)
    found = measure([lists_of(prepared)], training, packed)
    return Preview(
        what,
        part.source,
        part.renamed,
        [_seen(row, tokenizer, training, packed) for row in prepared[:count]],
        Count(found.rows, found.used, found.cut, found.longest),
        len(prepared) < LOOKED_AT if part.streamed else len(prepared) == len(part.rows),
        sorted(len(row["labels"]) for row in prepared),
        packed,
    )


def _seen(
    row: Mapping[str, list[int]],
    tokenizer: PreTrainedTokenizerBase,
    training: KeepstepConfig,
    packed: bool,
) -> SeenRow:
    whole = len(row["input_ids"])
    used = slice(*kept(0, whole, training, packed))
    tokens, labels = row["input_ids"][used], row["labels"][used]
    spans = []
    for trained, group in groupby(zip(tokens, labels, strict=True), lambda t: t[1] != IGNORED):
        spans.append((trained, tokenizer.decode([token for token, _ in group])))
    trained_on = sum(label != IGNORED for label in labels)
    return SeenRow(spans, len(tokens), trained_on, whole - len(tokens))
