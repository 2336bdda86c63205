"""Images in rows: where they lie, what they are known by, and whether a model can take them.

A row has a list of them, `images`, or a single one, `image`, as SFTTrainer (trl 1.16) knows them:
stored in the data, or in files that it names.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as compute
import xxhash

from keepstep import __version__
from keepstep.data.common import STREAM_SAMPLE, Rows, is_stream, problem
from keepstep.data.rows import Layout
from keepstep.recipe.arguments import CheckpointArguments
from keepstep.recipe.config import ConfigError, KeepstepConfig, Problem

COLUMNS = ("image", "images")
AT_ONCE = 1000
ANY = -1  # a turn of plain text: all of the row's images stand before it
NEVER = -2  # and other turns have places, too
TEXT_KINDS = ("string", "large_string")


def image_column(columns: Collection[str]) -> str | None:
    """The column that holds the images, None where there is none."""
    return next((name for name in COLUMNS if name in columns), None)


def named(rows: Rows, folder: Path) -> Rows:
    """Rows whose images are named by file, with these files in the place of their names.

    Args:
        rows: as they were loaded; others are returned as they are.
        folder: that names which are not absolute count from: the one of the file with the rows.

    Raises:
        ConfigError: a file is not there.
    """
    if is_stream(rows):
        return rows
    for name in COLUMNS:
        feature = rows.features.get(name)
        several = isinstance(feature, (datasets.List, datasets.LargeList))
        inner = feature.feature if several else feature
        if not isinstance(inner, datasets.Value) or inner.dtype not in TEXT_KINDS:
            continue
        _check_there(rows, name, folder)
        image = datasets.Image()
        rows = rows.map(
            _as_file,
            input_columns=[name],
            fn_kwargs={"name": name, "folder": str(folder.resolve()), "version": __version__},
            features=datasets.Features(
                dict(rows.features) | {name: datasets.List(image) if several else image}
            ),
            desc="Finding the images",
        )
    return rows


def _check_there(rows: Rows, name: str, folder: Path) -> None:
    values = itertools.chain.from_iterable(chunk.to_pylist() for chunk in _column(rows, name))
    for number, found in enumerate(values, 1):
        for path in found if isinstance(found, list) else [found]:
            if path is None or "://" in path or (folder / path).is_file():
                continue
            told = f"row {number}: {name} names a file that is not there: {folder / path}"
            hint = "names count from the folder of the rows' file; if the text alone is meant: "
            raise ConfigError([problem(told, f"{hint}take {name} out of the data")])


def _as_file(value: Any, name: str, folder: str, version: str = "") -> dict[str, Any]:
    def file(path: str | None) -> dict[str, Any] | None:
        if path is None:
            return None
        whole = path if "://" in path else os.path.join(folder, path)
        return {"path": whole, "bytes": None}

    return {name: [file(path) for path in value] if isinstance(value, list) else file(value)}


def _column(rows: Rows, name: str) -> Iterator[Any]:
    """Its values as they are stored, none of them decoded, many at once."""
    for table in rows.select_columns([name]).with_format("arrow").iter(AT_ONCE):
        yield from table[name].chunks


def stored(rows: Rows, places: Iterable[int]) -> Iterator[Mapping[str, Any]]:
    """The rows at these places, images as they are stored: bytes, or the name of a file."""
    columns = [name for name in COLUMNS if name in rows.column_names]
    if not columns:
        yield from (rows[place] for place in places)
        return
    others = [name for name in rows.column_names if name not in columns]
    texts = rows.select_columns(others) if others else None
    images = rows.select_columns(columns).with_format("arrow")
    for place in places:
        row = {} if texts is None else dict(texts[place])
        table = images[place]
        yield row | {name: table[name][0].as_py() for name in columns}


def known_by(value: Any) -> Any:
    """What an image is known by, wherever it lies and in whatever process: a digest of its bytes,
    or of its pixels where it has been decoded; of a list, each one's. Others: the value itself."""
    if isinstance(value, (list, tuple)):
        return [known_by(one) for one in value]
    if isinstance(value, bytes):
        return xxhash.xxh3_64_hexdigest(value)
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        path = value["path"]
        if value["bytes"] is None and path is not None and os.path.isfile(path):
            return xxhash.xxh3_64_hexdigest(Path(path).read_bytes())
        return path if value["bytes"] is None else xxhash.xxh3_64_hexdigest(value["bytes"])
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # Pillow's
        return f"{value.mode} {value.size} {xxhash.xxh3_64_hexdigest(value.tobytes())}"
    return value


def placeholders(turns: Any) -> int:
    """How many images these turns have a place for; `ANY`: for all that the row has; `NEVER`: for
    these, and more.

    (trl 1.16: `prepare_multimodal_messages` puts them before the first user's turn of plain text.)
    """
    if not isinstance(turns, list):
        return ANY  # a text: the model's own tokens mark the places
    count, takes_all = 0, False
    for turn in turns:
        content = turn.get("content", turn.get("value"))
        takes_all |= isinstance(content, str) and turn.get("role") == "user"
        for part in content if isinstance(content, list) else []:
            count += isinstance(part, Mapping) and part.get("type") == "image"
    return count if not takes_all else NEVER if count else ANY


def check(
    what: str, rows: Rows, layout: Layout, training: KeepstepConfig, processes: int
) -> list[Problem]:
    """What SFTTrainer refuses of rows with images, some of it in the middle of a run.

    Args:
        what: `training` or `evaluation`.
        rows: all of them; of a stream, some.
        layout: what is trained on of each.
        training: the recipe's training fields.
        processes: of the launch.
    """
    return [
        *_refused_fields(what, layout, training),
        *_refused_rows(what, rows, layout, training, processes),
    ]


def _refused_fields(what: str, layout: Layout, training: KeepstepConfig) -> Iterator[Problem]:
    packs = training.packing if what == "training" else training.eval_packing
    if packs:
        name = "packing" if what == "training" else "eval_packing"
        yield problem(f"{name}: rows with images are not packed (trl 1.16)", f"{name}: false")
    if training.padding_free:
        told = "padding_free: rows with images are padded (trl 1.16)"
        yield problem(told, "padding_free: false")
    if training.truncation_mode == "keep_end" and training.max_length is not None:
        told = "truncation_mode: keep_end would cut the tokens of images, which stand in front"
        yield problem(told, "truncation_mode: keep_start, or max_length: null")
    if training.pad_to_multiple_of is not None and layout.name in ("prompt", "alpaca"):
        told = "pad_to_multiple_of: not for prompts and completions with images (trl 1.16)"
        yield problem(told, "leave it out, or rows of `messages`")
    if training.train_sampling_strategy == "group_by_length":
        told = "train_sampling_strategy: group_by_length: the length of rows with images is not "
        yield problem(f"{told}known before they are collated", "leave it out")
    if layout.name in ("text", "input_ids"):
        told = f"the {what} data has {layout} and images, which SFTTrainer (trl 1.16) takes no "
        yield problem(f"{told}images with", "rows of `messages`, or of prompt and completion")


def _refused_rows(
    what: str, rows: Rows, layout: Layout, training: KeepstepConfig, processes: int
) -> Iterator[Problem]:
    names = next(iter(rows)).keys() if rows.column_names is None else rows.column_names
    columns = [name for name in COLUMNS if name in names]
    if len(columns) == 2:
        told = f"the {what} data has both image and images, and image alone would be taken"
        yield problem(told, "take one of them out")
        return
    if "tools" in names:
        told = f"the {what} data has tools, which SFTTrainer (trl 1.16) gives to no template "
        yield problem(f"{told}beside images", "write them into a system turn")
    if _texts(next(iter(rows))[columns[0]]):
        told = f"the {what} data has texts, not images, in {columns[0]}"
        hint = "names of files are read in local files of rows, in a column called image or images"
        yield problem(told, hint)
        return
    without, number = 0, 0
    for number, (count, places) in enumerate(_counted(rows, columns[0], layout), 1):
        without += count == 0
        if count is None:
            told = f"{columns[0]} is null or holds null"
            yield _row_problem(what, number, told, "a row without an image has images: []")
            return
        if places not in (ANY, count):
            told = f"{count} images, and {places} places for them in its turns"
            if places == NEVER:
                told = "places for images in a completion, or beside a user's turn of plain text"
            yield _row_problem(what, number, told, 'a place for each: {"type": "image"}')
            return
    yield from _some_without(f"{without:,} of {number:,} {what} rows", without, training, processes)


def _some_without(
    told: str, without: int, training: CheckpointArguments, processes: int
) -> Iterator[Problem]:
    if without and processes > 1 and training.zero_stage:
        told += f" have no image: under ZeRO-{training.zero_stage} a rank with such rows alone "
        told += "leaves the others waiting in the vision tower"
        yield problem(told, "DDP, or rows that all have images")


def without_image(name: str, rows: Rows, training: CheckpointArguments) -> Iterator[Problem]:
    """The same of the rows that a script gives, under their name there.

    Args:
        name: the argument's.
        rows: all of them; streamed ones are not looked at.
        training: the config of the Trainer.
    """
    column = image_column(rows.column_names) if isinstance(rows, datasets.Dataset) else None
    if column is not None and training.zero_stage:
        counts = list(itertools.chain.from_iterable(map(_counts, _column(rows, column))))
        without = sum(not count for count in counts)
        told = f"{without:,} of {len(counts):,} rows of {name}"
        yield from _some_without(told, without, training, int(training.world_size))


def _texts(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and any(isinstance(one, str) for one in value)
    )


def _counted(rows: Rows, column: str, layout: Layout) -> Iterator[tuple[int | None, int]]:
    """Of each row, how many images it has (None: none that can be taken), and places for them."""
    if is_stream(rows):
        for row in itertools.islice(rows, STREAM_SAMPLE):
            yield _count(row[column]), _places(row)["places"]
        return
    turns = {"messages": ["messages"], "prompt": ["prompt", "completion"]}.get(layout.name, [])
    counts = itertools.chain.from_iterable(map(_counts, _column(rows, column)))
    if not turns:  # Alpaca's are all text
        yield from zip(counts, itertools.repeat(ANY), strict=False)
        return
    places = rows.select_columns(turns).map(
        _places,
        fn_kwargs={"version": __version__},  # which the cache goes by
        remove_columns=turns,
        desc="Looking for the images' places",
    )
    yield from zip(counts, places["places"], strict=True)


def _counts(chunk: Any) -> list[int | None]:
    """How many images some rows have, without a look at their bytes."""
    if not hasattr(chunk, "offsets"):
        return [1 if valid else None for valid in chunk.is_valid().to_pylist()]
    lengths = compute.list_value_length(chunk).to_pylist()
    if not compute.list_flatten(chunk).null_count:
        return list(lengths)
    return [_count([one.is_valid or None for one in images]) for images in chunk]


def _places(row: Mapping[str, Any], version: str = "") -> dict[str, int]:
    if "messages" in row:
        return {"places": placeholders(row["messages"])}
    answered = placeholders(row["completion"]) not in (0, ANY)  # nothing is put there
    return {"places": NEVER if answered else placeholders(row["prompt"])}


def _count(value: Any) -> int | None:
    if isinstance(value, list):
        return None if None in value else len(value)
    return None if value is None else 1


def token_of(processor: Any) -> tuple[int, str] | None:
    """The token that stands for a part of an image, by number and name; None: it is not known."""
    name = getattr(processor, "image_token", None)
    number = getattr(processor, "image_token_id", None)
    if number is None and isinstance(name, str):
        number = processor.tokenizer.convert_tokens_to_ids(name)
    return (number, str(name)) if isinstance(number, int) else None


def with_more(rows: Rows, first: int, most: int) -> Rows:
    """Some rows behind the first ones: those that have more images than each of these."""
    if is_stream(rows) or len(rows) <= first:
        return rows.take(0)
    column = image_column(rows.column_names)
    counts = itertools.chain.from_iterable(map(_counts, _column(rows, str(column))))
    known = [count or 0 for count in counts]
    bound = max(known[:first], default=0)
    more = [place for place, count in enumerate(known) if count > bound]
    return rows.select(sorted(more, key=lambda place: -known[place])[:most])


def cut_through(
    what: str, rows: Sequence[Mapping[str, Any]], processor: Any, most: int | None
) -> list[Problem]:
    """Whether `max_length` cuts the tokens of an image: a model has a place for each part of it.

    Args:
        what: `training` or `evaluation`.
        rows: some, as tokens, uncut.
        processor: the model's.
        most: `max_length`.
    """
    token = token_of(processor)
    if most is None or token is None:
        return []
    needed = [_last(row["input_ids"], token[0]) for row in rows]
    cut = [length for length in needed if length > most]
    if not cut:
        return []
    told = f"max_length: {most} cuts the tokens of an image in {len(cut)} of {len(rows)} {what} "
    told += "rows: the first, and those with the most images"
    return [problem(told, f"at least max_length: {max(cut)}, or null")]


def _last(tokens: Sequence[int], token: int) -> int:
    """How many tokens there are up to the last of these."""
    return max((place for place, one in enumerate(tokens, 1) if one == token), default=0)


def without_repeats(tokens: Iterable[int], token: tuple[int, str] | None) -> Iterator[int | str]:
    """The tokens, with those of an image told as how many they are."""
    for is_image, group in itertools.groupby(tokens, lambda t: token is not None and t == token[0]):
        several = list(group)
        if is_image and token is not None and len(several) > 1:
            yield f"{token[1]} x {len(several):,}"
        else:
            yield from several


def _row_problem(what: str, number: int, told: str, hint: str) -> Problem:
    return problem(f"the {what} data, row {number}: {told}", hint)
