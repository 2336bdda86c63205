"""A stream goes on where it was, and reads nothing again."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from keepstep.data.stream import BEGINNING, Place, StreamError, StreamReader, fits, state_of
from keepstep.data.stream_steps import exact

STRATEGIES = ("first_exhausted", "all_exhausted", "all_exhausted_without_replacement")
SIZES = (5, 61, 1, 30, 23)  # rows of each file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as jsonl and as parquet, in files of uneven sizes; row groups of 7 rows."""
    folder, number = tmp_path_factory.mktemp("shards"), itertools.count()
    for file, size in enumerate(SIZES):
        rows = [{"text": f"row {next(number)}"} for _ in range(size)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{file}.jsonl").write_text("".join(lines))
        made = datasets.Dataset.from_list(rows)
        made.to_parquet(str(folder / f"{file}.parquet"), batch_size=7)
    return folder


def stream(files: Path, kind: str) -> datasets.IterableDataset:
    builder = "json" if kind == "jsonl" else kind
    paths = [str(files / f"{file}.{kind}") for file in range(len(SIZES))]
    return datasets.load_dataset(builder, data_files=paths, split="train", streaming=True)


def tokens(row: dict[str, Any]) -> dict[str, Any]:
    return {"number": int(row["text"].split()[1])}


def packed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    numbers = rows["number"]
    return {"pack": [numbers[i : i + 3] for i in range(0, len(numbers), 3)]}


def by_chance(strategy: str, rows: datasets.IterableDataset) -> datasets.IterableDataset:
    return exact(
        datasets.interleave_datasets(
            [rows.take(20), rows.map(tokens), rows.skip(60)],
            probabilities=[0.5, 0.2, 0.3],
            seed=5,
            stopping_strategy=strategy,
        )
    )


def seen_by(seen: list[str], row: dict[str, Any]) -> dict[str, Any]:
    seen.append(row["text"])
    return row


# What is made of a stream before it is trained on: names, tokens, rows left out, packs.
MADE: dict[str, Callable[[datasets.IterableDataset], datasets.IterableDataset]] = {
    "as it is": lambda rows: rows,
    "renamed": lambda rows: rows.rename_columns({"text": "prompt"}),
    "tokens": lambda rows: rows.map(tokens),
    "filtered": lambda rows: rows.map(tokens).filter(lambda row: row["number"] % 3),
    "packed": lambda rows: rows.map(tokens).map(
        packed, batched=True, batch_size=10, remove_columns=["text", "number"]
    ),
    "shuffled": lambda rows: exact(rows.map(tokens).shuffle(seed=3, buffer_size=20)),
    "shuffled, packed": lambda rows: exact(
        rows.map(tokens)
        .shuffle(seed=3, buffer_size=20)
        .map(packed, batched=True, batch_size=10, remove_columns=["text", "number"])
        .shuffle(seed=4, buffer_size=6)
    ),
    "in turn": lambda rows: exact(datasets.interleave_datasets([rows, rows.map(tokens)])),
    **{f"by chance, {strategy}": partial(by_chance, strategy) for strategy in STRATEGIES},
    "by chance, shuffled, packed": lambda rows: exact(
        datasets.interleave_datasets(
            [rows.map(tokens), rows.skip(60).map(tokens)],
            probabilities=[0.6, 0.4],
            seed=5,
            stopping_strategy="all_exhausted",
        )
        .shuffle(seed=3, buffer_size=20)
        .map(packed, batched=True, batch_size=10, remove_columns=["text", "number"])
    ),
    "one after the other": lambda rows: datasets.concatenate_datasets([rows, rows]).map(tokens),
}
# Where datasets 5.2 does not go on exactly: all before is read again.
INEXACT: dict[str, Callable[[datasets.IterableDataset], datasets.IterableDataset]] = {
    "in turn": lambda rows: datasets.interleave_datasets([rows, rows.map(tokens)]),
    "shuffled": lambda rows: rows.shuffle(seed=3, buffer_size=20),
}


def all_rows(rows: Any, number: int, place: Place = BEGINNING) -> list[Any]:
    return list(itertools.chain(*steps(StreamReader(rows, number, place), 4)))


def steps(reader: StreamReader, size: int) -> Iterator[list[Any]]:
    while taken := reader.take(size):
        yield taken


@pytest.mark.parametrize(
    ("kind", "made"),
    [*itertools.product(["jsonl"], MADE), ("parquet", "filtered"), ("parquet", "shuffled")],
)
def test_every_place_of_any_pass(files: Path, kind: str, made: str) -> None:
    """Each place is gone on from in a new stream, and from where that has come to once more."""
    for number in (0, 2):
        expected = all_rows(MADE[made](stream(files, kind)), number)
        reader, at = StreamReader(MADE[made](stream(files, kind)), number, BEGINNING), 0
        resumed = MADE[made](stream(files, kind))
        while True:
            again = StreamReader(resumed, number, reader.place)
            assert again.take(9) == expected[at : at + 9]
            once_more = StreamReader(resumed, number, again.place)
            assert once_more.take(5) == expected[at + 9 : at + 14]
            if not (taken := reader.take(7)):
                break
            at += len(taken)
        assert at == len(expected) == reader.place.drawn
    assert len(all_rows(MADE["as it is"](stream(files, kind)), 0)) == sum(SIZES)


def test_a_shuffle_mixes_files_and_every_row_comes_once(files: Path) -> None:
    """Otherwise in each pass; of an empty part of the files, nothing."""

    def numbers(number: int) -> list[int]:
        return [row["number"] for row in all_rows(MADE["shuffled"](stream(files, "jsonl")), number)]

    passes = [numbers(number) for number in range(3)]
    assert all(sorted(found) == list(range(sum(SIZES))) for found in passes)
    assert len({tuple(found) for found in passes}) == 3
    assert max(passes[0][:20]) >= sum(SIZES[:3]), "files are read in turn"
    assert numbers(1) == passes[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sources_in_turn_end_as_asked(files: Path, strategy: str) -> None:
    """And an empty one among them is none to wait for."""

    def counts(*sources: datasets.IterableDataset, **how: Any) -> Counter[str]:
        rows = datasets.interleave_datasets(list(sources), stopping_strategy=strategy, **how)
        return Counter(row["text"] for row in all_rows(exact(rows), 0))

    few, many = stream(files, "jsonl").take(10), stream(files, "jsonl").skip(20)
    none = many.filter(lambda row: False)
    for how in ({}, {"probabilities": [0.5, 0.5], "seed": 1}):
        found = counts(few, many, **how)
        if strategy == "first_exhausted":
            assert max(found.values()) == 1
            assert sum(f"row {n}" in found for n in range(10)) == 10
            continue
        assert {f"row {n}" for n in (*range(10), *range(20, 120))} == found.keys()
        again = strategy == "all_exhausted"
        assert {found[f"row {n}"] > 1 for n in range(10)} == {again}
        assert {found[f"row {n}"] for n in range(20, 120)} == {1}
        assert len(counts(few, none, many, probabilities=[0.2, 0.3, 0.5], seed=1)) == 110


def test_of_a_shuffled_stream_one_block_is_read_again(files: Path) -> None:
    seen: list[str] = []
    rows = exact(stream(files, "jsonl").map(partial(seen_by, seen)).shuffle(1, buffer_size=20))
    reader = StreamReader(rows, 0, BEGINNING)
    reader.take(90)
    place = reader.place
    del seen[:]
    StreamReader(rows, 0, place).take(1)
    assert len(seen) == 20


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nothing_is_made_into_tokens_again(files: Path, kind: str) -> None:
    seen: list[str] = []
    rows = stream(files, kind).map(partial(seen_by, seen))
    reader = StreamReader(rows, 0, BEGINNING)
    reader.take(100)
    place = reader.place
    del seen[:]
    assert [row["text"] for row in StreamReader(rows, 0, place).take(3)] == seen
    assert seen == ["row 100", "row 101", "row 102"]


def test_a_loader_s_worker_reads_all_files(files: Path) -> None:
    class Once(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> list[Any]:
            return StreamReader(stream(files, "jsonl"), 0, BEGINNING).take(1000)

        def __len__(self) -> int:
            return 2

    loader = DataLoader(Once(), batch_size=None, num_workers=2)
    assert [len(rows) for rows in loader] == [sum(SIZES)] * 2


def test_a_stream_that_cannot_tell_its_place_is_read_again() -> None:
    class Numbers(torch.utils.data.IterableDataset):
        read = 0

        def __iter__(self) -> Iterator[int]:
            for number in range(20):
                self.read += 1
                yield number

    reader = StreamReader(Numbers(), 0, BEGINNING)
    reader.take(6)
    assert reader.place == Place(1, 6, "")
    again = Numbers()
    assert StreamReader(again, 0, reader.place).take(3) == [6, 7, 8]
    assert again.read == 9


def test_a_row_that_cannot_be_read(tmp_path: Path) -> None:
    """Files of others: the row is behind those that were looked at when the run began."""
    lines = [json.dumps({"text": f"row {number}"}) for number in range(10)]
    (tmp_path / "0.jsonl").write_text("\n".join(lines))
    (tmp_path / "1.jsonl").write_text('{"text": "row 10"}\n{"text": "ro')
    files = [str(tmp_path / f"{file}.jsonl") for file in (0, 1)]
    rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    reader = StreamReader(rows, 0, BEGINNING)
    reader.take(4)
    with pytest.raises(StreamError, match=r"beyond row 10 of pass 1: .*\n    Hint: mend that row"):
        reader.take(8)
    prepared = datasets.load_dataset("json", data_files=files[:1], split="train", streaming=True)
    lacking = prepared.map(lambda row: {"length": len(row["messages"])})
    told = "KeyError: 'messages', a column that is not there, or null"
    with pytest.raises(StreamError, match=f"beyond row 0 of pass 1: {told}"):
        StreamReader(lacking, 0, BEGINNING).take(1)


@pytest.mark.parametrize("made", INEXACT)
def test_where_a_place_would_not_be_exact_all_is_read_again(files: Path, made: str) -> None:
    expected = all_rows(INEXACT[made](stream(files, "jsonl")), 1)
    reader = StreamReader(INEXACT[made](stream(files, "jsonl")), 1, BEGINNING)
    reader.take(50)
    assert reader.place == Place(1, 50, "")
    again = StreamReader(INEXACT[made](stream(files, "jsonl")), 1, reader.place)
    assert again.take(40) == expected[50:90]


def test_a_place_fits_the_stream_that_it_is_in(files: Path) -> None:
    names = ("as it is", "tokens", "filtered", "one after the other")
    made = {name: MADE[name](stream(files, "jsonl")) for name in names}
    for name, rows in made.items():
        reader = StreamReader(rows, 0, BEGINNING)
        reader.take(8)
        for other, others in made.items():
            assert fits(others, reader.place.state) == (name == other)
        assert json.loads(state_of(rows)) == json.loads(reader.place.state)
    assert not fits(made["tokens"], "no JSON")
    assert not fits(made["tokens"], "{}")
