"""Rows as a model will see them: their text, what of it is trained on, and how long they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from keepstep.data.dataset import Data
from keepstep.data.images import image_column, token_of, without_repeats
from keepstep.data.rows import Count
from keepstep.data.taken import Part
from keepstep.data.tokenize import (
    IGNORED,
    kept,
    lists_of,
    measure,
    packs,
    preparation_of,
    problems_of,
)
from keepstep.recipe.config import ConfigError, KeepstepConfig, Recipe
from keepstep.recipe.model import ProcessingClass, tokenizer_in, with_chat_template

LOOKED_AT = 8000  # rows of each part, at most
IMAGES_LOOKED_AT = 100  # of rows with images, which have to be decoded for it


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
    data: Data, tokenizer: ProcessingClass, recipe: Recipe, count: int
) -> Iterator[Preview]:
    """The first `count` rows of each part, and the measure of up to 8,000 (with images, 100) of
    them.

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
    tokenizer: ProcessingClass,
    training: KeepstepConfig,
    count: int,
) -> Preview:
    first = next(iter(part.rows))
    most = LOOKED_AT if image_column(first) is None else max(IMAGES_LOOKED_AT, count)
    taken = part.rows.take(most if part.streamed else min(most, len(part.rows)))
    prepared = preparation_of(tokenizer, training, first).prepared(taken, what)
    packed = packs(what, training)
    found = measure([lists_of(prepared)], training, packed)
    return Preview(
        what,
        part.source,
        part.renamed,
        [_seen(row, tokenizer, training, packed) for row in prepared[:count]],
        Count(found.rows, found.used, found.cut, found.longest),
        len(prepared) < most if part.streamed else len(prepared) == len(part.rows),
        sorted(len(row["labels"]) for row in prepared),
        packed,
    )


def _seen(
    row: Mapping[str, list[int]],
    tokenizer: ProcessingClass,
    training: KeepstepConfig,
    packed: bool,
) -> SeenRow:
    whole = len(row["input_ids"])
    used = slice(*kept(0, whole, training, packed))
    tokens, labels = row["input_ids"][used], row["labels"][used]
    spans = []
    for trained, group in groupby(zip(tokens, labels, strict=True), lambda t: t[1] != IGNORED):
        spans.append((trained, _text([token for token, _ in group], tokenizer)))
    trained_on = sum(label != IGNORED for label in labels)
    return SeenRow(spans, len(tokens), trained_on, whole - len(tokens))


def _text(tokens: Sequence[int], processing: ProcessingClass) -> str:
    """What tokens say; those of an image, by their number."""
    tokenizer = tokenizer_in(processing)
    pieces = without_repeats(tokens, token_of(processing))
    runs = groupby(pieces, lambda piece: isinstance(piece, str))
    return "".join(
        "".join(map(str, run)) if told else tokenizer.decode(list(run)) for told, run in runs
    )
