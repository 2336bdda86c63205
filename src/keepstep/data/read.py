"""Files, folders, saved datasets, Hub datasets and mixtures of them, loaded as they are."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError
from datasets.table import CastError
from trl.scripts.utils import DatasetConfig

from keepstep.data import images, mixture
from keepstep.data.common import Rows, is_stream, problem
from keepstep.recipe.config import ConfigError
from keepstep.recipe.data_files import BUILDERS, builder_of

Splits: TypeAlias = Any  # split → Rows
# What `datasets` says in its own ways of a file without a row.
EMPTY = ("corresponds to no data", "No columns to parse from file", "at least one example")


def load(name: str, config: str | None = None, stream: bool = False) -> Splits:
    """The splits of a file, a folder, a saved dataset, or a dataset on the Hub.

    Ranks: any; the first on a machine fills the datasets cache, the others read it (datasets locks
    it).

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = Path(name).expanduser()
    try:
        found = _found(path, stream)
        if found is None:
            where = str(path) if path.exists() else name
            found = datasets.load_dataset(where, name=config, streaming=stream)
        return {split: _with_images(rows, path) for split, rows in found.items()}
    except ConfigError:
        raise
    except Exception as error:  # datasets raises a dozen types, from pyarrow's to httpx's
        raise unusable(name, error) from error


def _found(path: Path, stream: bool) -> Splits | None:
    """What `datasets.load_dataset` is not to be asked for by its name: files, saved datasets."""
    if path.is_file():
        return _file(path, stream)
    return _saved(path)


def _saved(path: Path) -> Splits | None:
    """What `save_to_disk` has written: a dataset, a DatasetDict, or a folder of datasets."""
    if (path / "dataset_dict.json").is_file():
        splits = dict(datasets.load_from_disk(str(path)))
    elif (path / "state.json").is_file():
        splits = {"train": datasets.load_from_disk(str(path))}
    else:
        parts = sorted(path.glob("*/state.json")) if path.is_dir() else []
        splits = {part.parent.name: datasets.load_from_disk(str(part.parent)) for part in parts}
    # A format is saved, too (tensors, a subset of the columns); here rows are Python's own.
    return {name: rows.with_format(None) for name, rows in splits.items()} or None


def _file(path: Path, stream: bool) -> Splits:
    builder = builder_of(path.name)
    if builder is None:
        raise ValueError(f"{path.name} is none of: {', '.join(BUILDERS)}")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    # Escaped: to `datasets`, `a[1].jsonl` is a pattern.
    return datasets.load_dataset(builder, data_files=glob.escape(str(path)), streaming=stream)


def load_part(part: DatasetConfig, stream: bool) -> Rows:
    """One part of a mixture. Ranks: as for `load`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path, found = Path(part.path).expanduser(), None
    try:
        if part.data_files is None and part.data_dir is None:
            found = _found(path, stream)
        if found is not None:
            rows = split_of(found, part.split, part.path)
        else:
            rows = datasets.load_dataset(
                str(path) if path.exists() else part.path,
                name=part.name,
                data_dir=part.data_dir,
                data_files=part.data_files,
                split=part.split,
                streaming=stream,
            )
        rows = rows if part.columns is None else rows.select_columns(part.columns)
        return _with_images(rows, path)
    except ConfigError:
        raise
    except Exception as error:
        raise unusable(part.path, error) from error


def _with_images(rows: Rows, path: Path) -> Rows:
    """The rows of a local file or folder, with the images that they name."""
    return images.named(rows, path.parent if path.is_file() else path) if path.exists() else rows


def split_of(splits: Splits, name: str, where: str) -> Rows:
    """
    Raises:
        ConfigError: there is no such split; the error has the list.
    """
    if name not in splits:
        raise ConfigError([problem(f"{where} has no split {name!r}, but {', '.join(splits)}")])
    return splits[name]


def mixed(
    parts: Sequence[DatasetConfig], found: Sequence[Rows], strategy: str, seed: int, sample: bool
) -> tuple[Rows, str]:
    """The parts one after the other; of each, its `fraction` of the whole, if they have any; and
    how many rows of each that are, as people are told.

    Args:
        strategy: `mixture_stopping_strategy`.
        seed: of a stream's rows, each of which is drawn from one of the parts.
        sample: all rows, to look at a few.

    Raises:
        ConfigError: fractions that cannot be had; columns of one name and several types.
    """
    weighted = not sample and any(part.fraction is not None for part in parts)
    streamed, said = any(map(is_stream, found)), ""
    if streamed:  # what was saved to disk is none, whatever was asked for
        found = [rows if is_stream(rows) else rows.to_iterable_dataset() for rows in found]
    elif weighted:
        found, said = _counted(parts, found, strategy)
    try:
        if streamed and weighted:
            return _drawn(parts, found, strategy, seed)
        return datasets.concatenate_datasets(list(found)), said
    except Exception as error:  # pyarrow's, ValueError
        raise unusable("the parts of datasets", error) from error


def _counted(
    parts: Sequence[DatasetConfig], found: Sequence[Rows], strategy: str
) -> tuple[list[Rows], str]:
    """Of each part as many rows as its fraction says."""
    rows, fractions = [len(part) for part in found], [part.fraction for part in parts]
    try:
        counts = mixture.rows_of_each(rows, fractions, strategy)
    except ValueError as error:
        raise ConfigError([problem(f"datasets: {error}")]) from error
    said = [
        mixture.told(Path(part.path).name, had, count)
        for part, had, count in zip(parts, rows, counts, strict=True)
    ]
    taken = [_repeated(part, count) for part, count in zip(found, counts, strict=True)]
    return taken, ", ".join(said)


def _drawn(
    parts: Sequence[DatasetConfig], found: Sequence[Rows], strategy: str, seed: int
) -> tuple[Rows, str]:
    """Streams, of whose rows nobody knows how many there are: each row's part is drawn."""
    shares = mixture.shares([part.fraction for part in parts])
    rows = datasets.interleave_datasets(list(found), shares, seed, stopping_strategy=strategy)
    told = (f"{Path(p.path).name} {share:.3g}" for p, share in zip(parts, shares, strict=True))
    return rows, f"each row is drawn: {', '.join(told)}"


def _repeated(rows: Rows, count: int) -> Rows:
    """The first `count` rows, and again from the first when these are more than there are."""
    if count == len(rows):
        return rows
    if count < len(rows):
        return rows.select(range(count))
    return rows.select([number % len(rows) for number in range(count)])


def unusable(name: str, error: Exception) -> ConfigError:
    """What the user is told of an error that datasets has met."""
    cause = error.__cause__ or error
    text, hint = f"{type(cause).__name__}: {cause}".split("\n")[0], ""
    if isinstance(cause, UnicodeDecodeError):
        text = f"it is not UTF-8: a byte 0x{cause.object[cause.start]:02x}"
        hint = "iconv -f latin1 -t utf-8 FILE > NEW, if it is Latin-1"
    elif isinstance(cause, StopIteration) or any(mark in str(cause) for mark in EMPTY):
        text = "it has no rows"
    elif isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)):
        text = f"no files of rows are in it ({', '.join(BUILDERS)})"
        if glob.has_magic(name):
            hint = "datasets takes *, ? and [ in a folder's name for a pattern: rename it"
    elif isinstance(cause, CastError):
        text = "its files have other columns than the first of them"
        hint = f"{' '.join(str(cause).split())[:200]} …"
    elif type(cause) is ValueError:
        text = str(cause).split("\n")[0]
    return ConfigError([problem(f"{name} cannot be loaded: {text}", hint)])
