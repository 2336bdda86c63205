"""How rows become tokens, as SFTTrainer does it: a few before there is a model, then all, counted.

SFTTrainer (trl 1.16) cuts rows to `max_length`, drops those that nothing is left of to train on,
and does not tell.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.trainer import sft_trainer

from keepstep.data import images
from keepstep.data.collated import Collated
from keepstep.data.common import Rows, is_stream, problem
from keepstep.data.rows import Count, RowError
from keepstep.data.taken import Part
from keepstep.ranks import collectives
from keepstep.recipe.config import ConfigError, KeepstepConfig, Problem

T = TypeVar("T")
SAMPLES = 8, 800, 8000  # rows to look at first; more of them only where none of those is left
IMAGE_SAMPLES = 8, 64  # each image of these is decoded
AT_ONCE = 10_000
IGNORED = -100
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct", "alibi")


@dataclass(frozen=True)
class Positions:
    """How long a row a model takes.

    Attributes:
        limit: in tokens; None: any length.
        learned: whether there is nothing beyond it (else the model was trained up to there only).
        vocabulary: how many tokens it knows; None: that is not known.
    """

    limit: int | None = None
    learned: bool = False
    vocabulary: int | None = None

    @staticmethod
    def of(config: Any) -> Positions:
        """What a model's configuration says."""
        text = config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        learned = not any(getattr(text, name, None) for name in ROTARY)
        known = getattr(text, "vocab_size", None)
        return Positions(
            limit if isinstance(limit, int) and limit > 0 else None,
            learned,
            known if isinstance(known, int) and known > 0 else None,
        )


@dataclass(frozen=True)
class Measure:
    """What is left of rows within `max_length`: how many, and how long they are.

    Attributes:
        rows: all of them.
        used: that have a token to train on left.
        cut: of the used ones, those that are longer.
        taught: that have one beyond the first token, which nothing predicts.
        longest: row, in tokens, as it is used.
    """

    rows: int = 0
    used: int = 0
    cut: int = 0
    taught: int = 0
    longest: int = 0


def kept(starts: Any, ends: Any, training: KeepstepConfig, packing: bool) -> tuple[Any, Any]:
    """Where rows begin and end once they are cut to `max_length`: numbers, or arrays of them."""
    cuts = not packing or training.packing_strategy == "bfd"  # else the rest is the next row's
    most = training.max_length
    if not cuts or most is None:
        return starts, ends
    if training.truncation_mode == "keep_end" and not packing:
        return np.maximum(starts, ends - most), ends
    return starts, np.minimum(ends, starts + most)


def measure(labels: Iterable[Any], training: KeepstepConfig, packing: bool) -> Measure:
    """Measure rows by their labels, which come as pyarrow's lists of integers, many at once."""
    total = Measure()
    for lists in labels:
        lists = lists.cast(pa.large_list(pa.int64()))
        starts, ends = lists.offsets.to_numpy()[:-1], lists.offsets.to_numpy()[1:]
        before = np.concatenate([[0], np.cumsum(lists.values.to_numpy() != IGNORED)])
        first, last = kept(starts, ends, training, packing)
        used = before[last] > before[first]
        total = Measure(
            total.rows + len(lists),
            total.used + int(used.sum()),
            total.cut + int((used & (last - first < ends - starts)).sum()),
            total.taught + int((before[last] > before[np.minimum(first + 1, last)]).sum()),
            max(total.longest, int((last - first)[used].max(initial=0))),
        )
    if packing and training.max_length is not None:  # longer ones go on in the next packed row
        return replace(total, longest=min(total.longest, training.max_length))
    return total


def none_left(what: str, found: Measure, training: KeepstepConfig) -> list[Problem]:
    """Whether nothing at all can be trained on (or evaluated)."""
    if found.taught:
        return []
    told = f"none of the {found.rows:,} {what} rows is left"
    if training.max_length is None:
        return [problem(f"{told}: no token of them is trained on")]
    hint = "a larger max_length" + (
        ", or truncation_mode: keep_end" if training.truncation_mode == "keep_start" else ""
    )
    told = f"{told}: within max_length: {training.max_length} no token of them is trained on"
    return [problem(told, hint)]


def too_long(what: str, longest: int, positions: Positions) -> list[Problem]:
    """Whether rows are longer than the model takes."""
    if positions.limit is None or longest <= positions.limit:
        return []
    told = f"the longest of the {what} rows has {longest:,} tokens, the model "
    told += f"{positions.limit:,} positions"
    severity: Any = "error" if positions.learned else "warning"
    return [Problem(told, f"max_length: {positions.limit}", "data", severity)]


def beyond_vocabulary(what: str, part: Part, positions: Positions) -> list[Problem]:
    """Whether rows that are tokens already have some that the model does not know."""
    if part.layout.name != "input_ids" or positions.vocabulary is None:
        return []
    for ids in _token_lists(part.rows):
        lowest, highest = (np.min(ids), np.max(ids)) if len(ids) else (0, 0)
        if lowest < 0 or highest >= positions.vocabulary:
            wrong = lowest if lowest < 0 else highest
            told = f"the {what} data has the token {wrong} among its input_ids, and the model "
            told += f"knows {positions.vocabulary:,} of them"
            return [problem(told, "make the rows into tokens with the model's own tokenizer")]
    return []


def _token_lists(rows: Rows) -> Iterator[Any]:
    if is_stream(rows):
        yield from (row["input_ids"] for row in rows.take(SAMPLES[0]))
        return
    for table in rows.select_columns(["input_ids"]).with_format("arrow").iter(AT_ONCE):
        yield compute.list_flatten(table["input_ids"]).to_numpy()


def too_few(rows: Rows, training: KeepstepConfig, processes: int | None = None) -> list[Problem]:
    """Whether an evaluation would leave out all rows, because they do not fill a batch."""
    size = training.per_device_eval_batch_size
    processes = processes or training.world_size
    if not training.dataloader_drop_last:
        return []
    count = sum(1 for _ in rows.take(size * processes)) if is_stream(rows) else len(rows)
    if count >= size * processes:
        return []
    told = f"dataloader_drop_last leaves none of {count:,} evaluation rows: a batch has "
    told += f"{processes} x {size}"
    return [problem(told, "a smaller per_device_eval_batch_size, or dataloader_drop_last: false")]


class Preparation:
    """SFTTrainer's preparation of rows, before there is a trainer: what that asks of itself."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, training: KeepstepConfig, first: dict[str, Any]
    ) -> None:
        """
        Args:
            tokenizer: with the chat template that will be used.
            training: the recipe's training fields.
            first: row.

        Raises:
            ConfigError: rows of turns cannot be rendered, or not for the loss that is wanted.
        """
        self._tokenizer, self._training = tokenizer, training
        self.chat_template = template_for(tokenizer, training, first)
        self.completion_only_loss = training.completion_only_loss
        if self.completion_only_loss is None:
            self.completion_only_loss = {"prompt", "completion"} <= first.keys()

    def prepared(self, rows: Rows, what: str) -> list[dict[str, list[int]]]:
        """`input_ids` and `labels` of a few rows, of their full length."""
        arguments = _without_cutting(self._training)
        arguments.dataset_num_proc = None
        with _without_turns():
            return list(
                SFTTrainer._prepare_dataset(
                    self,
                    *(rows, self._tokenizer, arguments, False, None, what),
                )
            )


def preparation_of(
    tokenizer: Any, training: KeepstepConfig, first: dict[str, Any]
) -> Preparation | Collated:
    """What makes tokens of rows like `first`.

    Raises:
        ConfigError: see `Preparation`.
    """
    if images.image_column(first) is None:
        return Preparation(tokenizer, training, first)
    return Collated(tokenizer, training, first, template_for(tokenizer, training, first))


def takes_images(tokenizer: Any) -> bool:
    """Whether it is a processor, as SFTTrainer (trl 1.16) tells."""
    return isinstance(tokenizer, ProcessorMixin)


def lists_of(rows: Iterable[Mapping[str, list[int]]]) -> Any:
    """Their labels, as `measure` takes them."""
    return pa.array([row["labels"] for row in rows], pa.large_list(pa.int64()))


def template_for(
    tokenizer: PreTrainedTokenizerBase, training: KeepstepConfig, first: Mapping[str, Any]
) -> str | None:
    """The one that TRL takes in the place of the tokenizer's, where that marks no answers.

    Raises:
        ConfigError: rows of turns cannot be rendered, or not for the loss that is wanted.
    """
    if "messages" not in first and not isinstance(first.get("prompt"), list):
        return None
    if not tokenizer.chat_template:
        told = "the rows are turns, and the tokenizer has no chat template to render them by"
        raise ConfigError([problem(told, "chat_template_path: a .jinja file, or another model")])
    if not training.assistant_only_loss or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except Exception as error:  # ValueError, and what templates raise when TRL tries them
        told = "assistant_only_loss: the chat template does not mark what the assistant says"
        hint = "{% generation %} … {% endgeneration %} around it, in a file for chat_template_path"
        raise ConfigError([problem(told, f"{hint}; or assistant_only_loss: false")]) from error
    return template


def try_few(
    what: str,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    training: KeepstepConfig,
    positions: Positions,
) -> tuple[int, list[Problem]]:
    """How many rows were made into tokens, and what was wrong: a few, more where none can be used.

    Ranks: any, each for itself; nothing is collective.
    """
    if (training.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return 0, []
    packing = packs(what, training)
    try:
        first = next(iter(part.rows))
        name = images.image_column(first)
        if name is not None and not takes_images(tokenizer):
            seen = f"the {what} data has a column {name}, and the model takes no images"
            return 0, [problem(seen, f"if the text alone is meant: take {name} out of the data")]
        preparation = preparation_of(tokenizer, training, first)
        samples = SAMPLES if name is None else IMAGE_SAMPLES
        for size in samples:
            rows = preparation.prepared(part.rows.take(_most(part, size)), what)
            found = measure([lists_of(rows)], training, packing)
            if found.taught or found.rows < size:
                break
    except Exception as error:
        told = problems_of(what, error)
        if not told:
            raise
        return 0, told
    problems = none_left(what, found, training) if found.rows < samples[-1] else []
    if name is not None:
        problems += _cut_images(what, part.rows, rows, preparation, training)
    if positions.learned:  # else it is a warning, which is told when all rows are known
        problems += too_long(what, found.longest, positions)
    return found.rows, problems


def _cut_images(
    what: str, rows: Rows, first: Sequence[Any], preparation: Any, training: KeepstepConfig
) -> list[Problem]:
    """Whether `max_length` cuts an image of the first rows, as tokens, or of those with more."""
    more = images.with_more(rows, len(first), IMAGE_SAMPLES[0])
    try:
        tokens = preparation.prepared(more, what)
    except Exception as error:
        told = problems_of(what, error)
        if not told:
            raise
        return told
    return images.cut_through(what, [*first, *tokens], preparation.processor, training.max_length)


def _most(part: Part, size: int) -> int:
    return size if part.streamed else min(size, len(part.rows))


def packs(what: str, training: KeepstepConfig) -> bool:
    """Whether these rows are packed."""
    given = training.eval_packing
    return bool(training.packing if what == "training" or given is None else given)


def prepare(
    what: str,
    rows: Rows,
    training: KeepstepConfig,
    packing: bool,
    stage: Callable[[Rows, KeepstepConfig, bool], Rows],
) -> tuple[Rows, Count | None]:
    """All rows as they are trained on, and what became of them (of a stream, that is not known).

    SFTTrainer's preparation in two stages, with the same result: what they are before they are cut
    and packed is measured.

    Ranks: all (collective).

    Args:
        what: `training` or `evaluation`.
        rows: as they were loaded.
        training: the recipe's training fields.
        packing: whether rows are packed.
        stage: SFTTrainer's preparation of rows, given settings, and whether to pack.

    Raises:
        ConfigError: on every rank: a row cannot be prepared, or none is left.
    """
    tokens = in_turns(what, lambda: stage(rows, _without_cutting(training), False))
    prepared = in_turns(what, lambda: stage(tokens, training, packing))
    if not hasattr(tokens, "__len__"):
        return prepared, None
    labels = tokens.select_columns(["labels"]).with_format("arrow").iter(AT_ONCE)
    lists = (chunk for table in labels for chunk in table["labels"].chunks)
    found = measure(lists, training, packing)
    problems = none_left(what, found, training)
    if problems:
        raise ConfigError(problems)
    used = found.used if packing else len(prepared)  # those of which a token is trained on
    packed = len(prepared) if packing else None
    return prepared, Count(len(rows), used, found.cut, found.longest, packed)


def _without_cutting(training: KeepstepConfig) -> KeepstepConfig:
    arguments = copy.copy(training)
    arguments.max_length, arguments.shuffle_dataset = None, False
    return arguments


def _without_turns() -> AbstractContextManager[Any]:
    """Without TRL's order of ranks: when the first one has failed, the others wait for ever."""
    return patch.object(sft_trainer, "global_then_local_main_first", nullcontext)


def in_turns(what: str, action: Callable[[], T]) -> T:
    """The main process first, then the first of each machine, then the others, which read what
    those have put into the cache; the error of one is everybody's. Ranks: all (collective).

    Raises:
        ConfigError: on every rank, where the rows or the settings are to blame.
        Exception: on every rank, any other error that one has met.
    """
    state = PartialState()
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2

    now = 0

    def act() -> T | None:
        if now != turn:
            return None
        try:
            with _without_turns():
                return action()
        except Exception as error:
            problems = problems_of(what, error)
            if problems:
                raise ConfigError(problems) from error
            raise

    values = []
    for now in range(3):  # noqa: B007  # `act` looks at it
        values.append(collectives.on_all(f"preparing the {what} rows", act))
    return values[turn]  # type: ignore[return-value]


def problems_of(what: str, error: Exception) -> list[Problem]:
    """What is wrong with the recipe or the rows, if they are to blame for an error."""
    if isinstance(error, ConfigError):
        return error.problems
    if isinstance(error, RowError):  # of a stream, further on than the rows that were looked at
        return [problem(f"the {what} data: {error}")]
    # The disk, the memory, a process of datasets' that has been killed; a mistake of our own.
    environment = isinstance(error, (OSError, MemoryError)) or "subprocess" in str(error)
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if environment or Path(__file__).parents[1] in where.parents:
        return []
    return [_refused(what, error)]


def _refused(what: str, error: Exception) -> Problem:
    text = str(error).strip().split("\n")[0] or type(error).__name__
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{'/'.join(Path(where.filename).parts[-3:])}:{where.lineno}"
    told = f"the {what} rows cannot be made into tokens: {type(error).__name__}: {text}"
    return problem(told, f"refused by {place}")
