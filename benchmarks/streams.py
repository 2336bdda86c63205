"""How long does a stream take to go on behind its first rows?

    python benchmarks/streams.py 20000 --rounds 3

Writes so many rows into one file of JSON lines and one of parquet, reads them as a run does that
streams them (made into tokens, shuffled in blocks of 1,000), notes the place behind three quarters,
and measures the seconds to the next 16 rows: `place`: from the place that a checkpoint holds;
`again`: as a stream that cannot tell its place, of which all rows before are read and made into
tokens once more. The same 16 rows come, or it would say so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu.inputs import SHAPES, make_inputs

from keepstep.data.stream import BEGINNING, Place, StreamReader
from keepstep.data.stream_steps import exact

ROWS = 16  # of a step
WORDS = 120  # of a row
KINDS = ("jsonl", "parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, help="of each file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file that the result is added to")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), SHAPES[1], words=WORDS, rows=arguments.rows)
        rows = datasets.Dataset.from_json(f"{folder}/rows.jsonl", cache_dir=f"{folder}/cache")
        rows.to_parquet(f"{folder}/rows.parquet")
        for kind in KINDS:
            place = noted(Path(folder), kind, arguments.rows * 3 // 4)
            for _ in range(arguments.rounds):
                found = []
                for way, start in (("place", place), ("again", replace(place, state=""))):
                    made = stream(Path(folder), kind)
                    began = time.perf_counter()
                    found.append(StreamReader(made, 0, start).take(ROWS))
                    seconds[f"{kind}, {way}"].append(time.perf_counter() - began)
                if found[0] != found[1]:
                    sys.exit(f"{kind}: other rows come from the place than from the beginning")
    tell(arguments, seconds)


def stream(folder: Path, kind: str) -> Any:
    """The rows as a run has them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    builder = "json" if kind == "jsonl" else kind
    rows = datasets.load_dataset(
        builder, data_files=str(folder / f"rows.{kind}"), split="train", streaming=True
    )
    made = rows.map(lambda row: {"input_ids": tokenizer(json.dumps(row))["input_ids"]})
    return exact(made.shuffle(seed=1, buffer_size=1000))


def noted(folder: Path, kind: str, rows: int) -> Place:
    """Where the stream is behind so many rows, in steps."""
    reader = StreamReader(stream(folder, kind), 0, BEGINNING)
    for _ in range(max(1, rows // ROWS)):
        reader.take(ROWS)
    return reader.place


def tell(arguments: argparse.Namespace, seconds: Mapping[str, list[float]]) -> None:
    """Print medians, ranges and what one is of the other; the same as one JSON line."""
    summary: dict[str, Any] = {"rows": arguments.rows, "rounds": arguments.rounds}
    print(f"{arguments.rows:,} rows in one file, {ROWS} more behind three quarters of them")
    for name, found in seconds.items():
        summary[name] = [round(v, 4) for v in (statistics.median(found), min(found), max(found))]
        print(f"{name:16} {summary[name][0]:8.3f} s  ({min(found):.3f} to {max(found):.3f})")
    for kind in KINDS:
        again, place = (summary[f"{kind}, {way}"][0] for way in ("again", "place"))
        print(f"{kind}: from its place {again / place:.0f} times as fast")
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
