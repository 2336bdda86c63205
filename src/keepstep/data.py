"""Rows to train and evaluate on: files, folders, Hub datasets, mixtures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import xxhash
from trl import get_dataset

from .config import ConfigError, DataConfig, KeepstepConfig, Problem

Rows: TypeAlias = Any  # datasets.Dataset, or IterableDataset when streamed
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
STREAM_SAMPLE = 100  # rows of a stream that it is known by
EVAL_SPLITS = ("validation", "eval", "dev")
LAYOUTS = "`messages`, `prompt` and `completion`, or `text`"


def load_data(data: DataConfig, training: KeepstepConfig) -> tuple[Rows, Rows | None]:
    """The training rows and, unless `eval_strategy: no`, the evaluation rows.

    Ranks: all, each for itself; the first on a machine fills the datasets cache, the others read
    it (datasets locks it). The same recipe gives the same rows in the same order on every rank.

    Raises:
        ConfigError: nothing could be loaded, or no column can be trained on.
    """
    loaded = _load_mixture(data) if data.datasets else _load(data.dataset_name or "", data)
    train_split = data.dataset_train_split
    if train_split not in loaded:
        raise ConfigError(
            [_problem(f"dataset_train_split: {train_split!r} is none of: {', '.join(loaded)}")]
        )
    train, evaluation = loaded[train_split], None
    if training.eval_strategy != "no":
        evaluation = _evaluation_rows(data, loaded)
        if evaluation is None:
            train, evaluation = _set_aside(train, data, training)
    for name, rows in (("training", train), ("evaluation", evaluation)):
        if rows is not None:
            _check_columns(name, rows, training)
    return train, evaluation


def fingerprint(rows: Rows | None) -> str | None:
    """A short digest of the rows: their number, columns, and a thousand of them.

    Ranks: any; the same everywhere. None for streamed rows (see `stream_fingerprint`), and for none
    at all.
    """
    if rows is None or isinstance(rows, datasets.IterableDataset):
        return None
    digest = xxhash.xxh3_64(f"{len(rows)} {sorted(rows.column_names)}".encode())
    for index in range(0, len(rows), max(1, len(rows) // 1000)):
        digest.update(_row_bytes(rows[index]))
    return f"{len(rows)} rows, {digest.hexdigest()}"


def stream_fingerprint(rows: Rows | None) -> str | None:
    """A short digest of a stream: its first rows. Ranks: any; the same everywhere. None for rows
    that are not streamed, and for none at all."""
    if not isinstance(rows, datasets.IterableDataset):
        return None
    first = [_row_bytes(row) for row in itertools.islice(rows, STREAM_SAMPLE)]
    return f"a stream, its first {len(first)} rows {xxhash.xxh3_64_hexdigest(b''.join(first))}"


def _row_bytes(row: Any) -> bytes:
    return json.dumps(row, sort_keys=True, default=str).encode()


def _load_mixture(data: DataConfig) -> Any:
    try:
        return get_dataset(data)
    except Exception as error:
        raise ConfigError([_problem(f"datasets: {_brief(error)}")]) from error


def _load(name: str, data: DataConfig) -> Any:
    path = Path(name).expanduser()
    try:
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        if (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(str(path))}
        if path.is_file():
            suffix = next((s for s in path.suffixes if s in BUILDERS), None)
            if suffix is None:
                raise ValueError(f"{path.name} is none of: {', '.join(BUILDERS)}")
            return datasets.load_dataset(
                BUILDERS[suffix], data_files=str(path), streaming=data.dataset_streaming
            )
        return datasets.load_dataset(
            str(path) if path.exists() else name,
            name=data.dataset_config,
            streaming=data.dataset_streaming,
        )
    except Exception as error:  # datasets raises a dozen types, from pyarrow's to httpx's
        raise ConfigError([_problem(f"{name} cannot be loaded: {_brief(error)}")]) from error


def _evaluation_rows(data: DataConfig, loaded: Any) -> Rows | None:
    if data.eval_dataset_name:
        separate = _load(data.eval_dataset_name, data)
        return separate[next(iter(separate))]
    for split in (data.dataset_test_split, *EVAL_SPLITS):
        if split in loaded and split != data.dataset_train_split:
            return loaded[split]
    return None


def _set_aside(train: Rows, data: DataConfig, training: KeepstepConfig) -> tuple[Rows, Rows]:
    if isinstance(train, datasets.IterableDataset):
        raise ConfigError(
            [_problem("a streamed dataset cannot be split", "name eval_dataset_name")]
        )
    seed = training.seed if training.data_seed is None else training.data_seed
    if len(train) < 2:
        raise ConfigError([_problem(f"{len(train)} training rows are too few to set one aside")])
    count = min(max(1, round(data.eval_split_fraction * len(train))), len(train) - 1)
    parts = train.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _check_columns(name: str, rows: Rows, training: KeepstepConfig) -> None:
    first = next(iter(rows), None)
    if first is None:
        raise ConfigError([_problem(f"the {name} data has no rows")])
    columns = set(first)
    usable = columns & {"messages", "conversations", "input_ids", training.dataset_text_field}
    if not usable and not {"prompt", "completion"} <= columns:
        raise ConfigError(
            [
                _problem(
                    f"the {name} data has no column to train on, but {', '.join(sorted(columns))}",
                    f"rename to {LAYOUTS}, or set dataset_text_field",
                )
            ]
        )


def _brief(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".split("\n")[0]


def _problem(what: str, hint: str = "") -> Problem:
    return Problem(what, hint, "data")
