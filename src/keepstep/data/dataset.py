"""Rows to train and evaluate on: where they come from, and that each of them can be used."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from keepstep.data import images
from keepstep.data.common import STREAM_SAMPLE, Rows, is_stream, problem
from keepstep.data.read import (
    Splits,
    load,
    load_part,
    mixed,
    split_of,
)
from keepstep.data.rows import columns_of
from keepstep.data.taken import TURNS, Part, as_messages, taken
from keepstep.recipe.config import ConfigError, DataConfig, KeepstepConfig, Problem

EVAL_SPLITS = ("test", "validation", "valid", "val", "eval", "evaluation", "dev")


@dataclass(frozen=True)
class Data:
    """The rows of a run.

    Attributes:
        training: what it is trained on.
        evaluation: what it is evaluated on, by the sets' names; a single one has none (`""`).
        warnings: what was seen of them that may not have been meant.
    """

    training: Part
    evaluation: Mapping[str, Part] = field(default_factory=dict)
    warnings: Sequence[Problem] = ()

    @property
    def parts(self) -> dict[str, Part]:
        """All of them by what they are for: `training`, `evaluation`, `evaluation math`."""
        sets = {f"evaluation {name}".strip(): part for name, part in self.evaluation.items()}
        return {"training": self.training, **sets}

    @property
    def eval_dataset(self) -> Rows | dict[str, Rows] | None:
        """The evaluation rows as a Trainer takes them."""
        rows = {name: part.rows for name, part in self.evaluation.items()}
        return rows if rows and "" not in rows else rows.get("")


def load_data(data: DataConfig, training: KeepstepConfig, sample: bool = False) -> Data:
    """The training rows and, unless `eval_strategy: no`, the evaluation rows.

    Every row has been looked at; of a stream, the first ones.

    Args:
        data: the recipe's data fields.
        training: its training fields.
        sample: stream the rows, whatever the recipe says, and set none aside: to look at a few.

    Ranks: all, each for itself; the first on a machine fills the datasets cache, the others read
    it (datasets locks it). The same recipe gives the same rows in the same order on every rank.

    Raises:
        ConfigError: nothing could be loaded, or it cannot be trained on.
    """
    stream = sample or data.dataset_streaming or data.streaming
    warnings: list[Problem] = []

    def take(what: str, rows: Rows, source: str) -> Part:
        return taken(what, rows, source, data, training, warnings)

    if data.datasets:
        splits, train = {}, _mixture(data, training, stream, sample, take)
    else:
        name = str(data.dataset_name)
        splits = load(name, data.dataset_config, stream)
        split = data.dataset_train_split
        if split not in splits:
            raise ConfigError(
                [problem(f"dataset_train_split: {split!r} is none of: {', '.join(splits)}")]
            )
        train = take("training", splits[split], _named(name, splits, split))
    if training.eval_strategy == "no":
        return Data(train, {}, warnings)
    if data.eval_datasets:
        sets = {n: _separate(n, where, data, stream) for n, where in data.eval_datasets.items()}
        parts = {name: take(f"evaluation {name}", *found) for name, found in sets.items()}
        return Data(train, parts, warnings)
    found = _evaluation_rows(data, splits, stream)
    if found is not None:
        return Data(train, {"": take("evaluation", *found)}, warnings)
    if sample:
        return Data(train, {}, warnings)
    train, evaluation = _set_aside(train, data, training)
    return Data(train, {"": evaluation}, warnings)


def fingerprints(
    rows: Rows | dict[str, Rows] | None, of: Callable[[Rows | None], str | None]
) -> str | dict[str, str | None] | None:
    """`fingerprint` or `stream_fingerprint` of rows; of several sets, each one's, None for none."""
    if not isinstance(rows, dict):
        return of(rows)
    each = {name: of(part) for name, part in rows.items()}
    return each if any(each.values()) else None


def fingerprint(rows: Rows | None) -> str | None:
    """A short digest of the rows: their number, columns, and a thousand of them, with the bytes of
    their images.

    Ranks: any; the same everywhere. None for streamed rows (see `stream_fingerprint`), and for none
    at all.
    """
    if rows is None or is_stream(rows):
        return None
    digest = xxhash.xxh3_64(f"{len(rows)} {sorted(rows.column_names)}".encode())
    for row in images.stored(rows, range(0, len(rows), max(1, len(rows) // 1000))):
        digest.update(_row_bytes(row))
    return f"{len(rows)} rows, {digest.hexdigest()}"


def stream_fingerprint(rows: Rows | None) -> str | None:
    """A short digest of a stream: its first rows. Ranks: any; the same everywhere. None for rows
    that are not streamed, and for none at all."""
    if rows is None or not is_stream(rows):
        return None
    first = [_row_bytes(row) for row in itertools.islice(rows, STREAM_SAMPLE)]
    return f"a stream, its first {len(first)} rows {xxhash.xxh3_64_hexdigest(b''.join(first))}"


def _row_bytes(row: Mapping[str, Any]) -> bytes:
    known = {n: images.known_by(v) if n in images.COLUMNS else v for n, v in row.items()}
    return json.dumps(known, sort_keys=True, default=str).encode()


def _named(name: str, splits: Splits, split: str) -> str:
    """`name`, and which of its splits, if there is a choice."""
    return f"{name}, split {split}" if len(splits) > 1 else name


def _mixture(
    data: DataConfig,
    training: KeepstepConfig,
    stream: bool,
    sample: bool,
    take: Callable[[str, Rows, str], Part],
) -> Part:
    """All parts of `datasets`, of one layout or, where the loss is the assistant's turns
    alone, all of turns. (TRL's `get_dataset` takes no files, and draws `test_split_size`
    anew for each process.)"""
    parts = [take("training", load_part(part, stream), part.path) for part in data.datasets]
    kinds = [_kind(part) for part in parts]
    joined = training.assistant_only_loss and set(kinds) == {
        "messages",
        "prompt and completion, of turns",
    }
    if joined:
        parts = [as_messages(part) for part in parts]
    elif len(set(kinds)) > 1:
        told = ", ".join(f"{part.source}: {kind}" for part, kind in zip(parts, kinds, strict=True))
        turns = all(kind == "messages" or "turns" in kind for kind in kinds)
        hint = "assistant_only_loss: true takes both for turns" if turns else "give them all one"
        raise ConfigError([problem(f"the parts of datasets have different layouts: {told}", hint)])
    strategy = data.mixture_stopping_strategy
    rows, mix = mixed(data.datasets, _alike(parts), strategy, training.rows_seed, sample)
    renamed = dict.fromkeys(part.renamed for part in parts if part.renamed)
    how = [f"mixture: {mix}"] if mix else []
    how += ["prompts and completions as messages: every answer is trained on"] if joined else []
    told = "; ".join([*how, *renamed])
    return replace(parts[0], rows=rows, source=f"{len(parts)} datasets", renamed=told)


def _kind(part: Part) -> str:
    """The layout of a part's rows as they are now, with what SFTTrainer tells apart."""
    if part.layout.name not in ("prompt", "alpaca"):
        return str(part.layout) if part.layout.name == "text" else part.layout.name
    turns = isinstance(next(iter(part.rows))["prompt"], list)
    return f"prompt and completion, of {'turns' if turns else 'text'}"


def _alike(parts: Sequence[Part]) -> list[Rows]:
    """Their rows, with columns of the same types, as far as they are trained on."""
    found = [part.rows for part in parts]
    if any(rows.features is None for rows in found):
        return found  # of a stream that is not known
    if len({str(rows.features) for rows in found}) == 1:
        return found
    names = columns_of(parts[0].layout)
    found = [rows.select_columns([n for n in rows.column_names if n in names]) for rows in found]
    for name in names & {"messages", "prompt", "completion"}:
        if len({str(rows.features.get(name)) for rows in found}) > 1:
            found = [rows.cast_column(name, TURNS) for rows in found]
    return found


def _evaluation_rows(data: DataConfig, splits: Splits, stream: bool) -> tuple[Rows, str] | None:
    """The rows to evaluate on, where some are given, and where they come from."""
    wanted, choices = data.dataset_test_split, _choices(data)
    by_default = choices == EVAL_SPLITS
    if data.eval_dataset_name:
        return _separate("", data.eval_dataset_name, data, stream)
    name = str(data.dataset_name)
    if not by_default:
        if wanted == data.dataset_train_split:
            raise ConfigError([problem(f"dataset_test_split: {wanted} is what is trained on")])
        return split_of(splits, wanted, name), _named(name, splits, wanted)
    for split in choices:
        if split in splits and split != data.dataset_train_split:
            return splits[split], _named(name, splits, split)
    return None


def _choices(data: DataConfig) -> tuple[str, ...]:
    """The splits that may be meant for evaluation, the likeliest first."""
    wanted = data.dataset_test_split
    return EVAL_SPLITS if wanted == DataConfig.dataset_test_split else (wanted,)


def _separate(name: str, where: str, data: DataConfig, stream: bool) -> tuple[Rows, str]:
    """The rows of a dataset that is for evaluation alone.

    Args:
        name: of one of several sets; empty: it is the only one.
        where: a file, a folder, a dataset on the Hub.
    """
    found = load(where, None if name else data.dataset_config, stream)
    split = next((s for s in _choices(data) if s in found), None)
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split is None:
        field_name = f"eval_datasets: {name}" if name else "eval_dataset_name"
        what = f"{field_name}: {where} has the splits {', '.join(found)}"
        raise ConfigError([problem(what, "name one: dataset_test_split")])
    return found[split], _named(where, found, split)


def _set_aside(train: Part, data: DataConfig, training: KeepstepConfig) -> tuple[Part, Part]:
    if train.streamed:
        raise ConfigError([problem("a streamed dataset cannot be split", "name eval_dataset_name")])
    if data.datasets and data.mixture_stopping_strategy == "all_exhausted":
        told = "mixture_stopping_strategy: all_exhausted repeats rows: none can be set aside"
        raise ConfigError([problem(told, "name eval_dataset_name, or eval_strategy: no")])
    rows = len(train.rows)
    if rows < 2:
        raise ConfigError([problem(f"{rows} training rows are too few to set one aside")])
    share = data.eval_split_fraction if data.test_split_size is None else data.test_split_size
    count = share if share >= 1 else share * rows
    count = min(max(1, round(count)), rows - 1)
    parts = train.rows.train_test_split(test_size=count, seed=training.rows_seed)
    aside = replace(train, rows=parts["test"], source=f"{train.source}, set aside")
    return replace(train, rows=parts["train"]), aside
