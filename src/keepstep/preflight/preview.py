"""Rows as a model will see them: their text, what of it is trained on, and how long they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from keepstep.data.dataset import Data, Part
from keepstep.data.tokenize import IGNORED, Measure, Preparation, lists_of, measure, packs
from keepstep.recipe.config import KeepstepConfig, Recipe
from keepstep.recipe.model import chat_template

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
        found: what becomes of those that were made into tokens.
        whole: whether these were all.
        lengths: of them, in tokens, before they are cut.
        packed: whether they are packed.
    """

    what: str
    source: str
    renamed: str
    rows: Sequence[SeenRow]
    found: Measure
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
    rendering = copy.deepcopy(tokenizer)
    rendering.chat_template = chat_template(tokenizer, recipe.training)
    for what, part in data.parts.items():
        yield _preview(what, part, rendering, recipe.training, count)


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
    most = training.max_length if not packed else None
    end = training.truncation_mode == "keep_end"
    return Preview(
        what,
        part.source,
        part.renamed,
        [_seen(row, tokenizer, most, end) for row in prepared[:count]],
        measure([lists_of(prepared)], training, packed),
        len(prepared) < LOOKED_AT if part.streamed else len(prepared) == len(part.rows),
        sorted(len(row["labels"]) for row in prepared),
        packed,
    )


def _seen(
    row: Mapping[str, list[int]], tokenizer: PreTrainedTokenizerBase, most: int | None, end: bool
) -> SeenRow:
    tokens, labels = row["input_ids"], row["labels"]
    lost = 0 if most is None else max(0, len(tokens) - most)
    used = slice(lost, None) if end else slice(0, len(tokens) - lost)
    tokens, labels = tokens[used], labels[used]
    spans = []
    for trained, group in groupby(zip(tokens, labels, strict=True), lambda t: t[1] != IGNORED):
        spans.append((trained, tokenizer.decode([token for token, _ in group])))
    return SeenRow(spans, len(tokens), sum(label != IGNORED for label in labels), lost)
