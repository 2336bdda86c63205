"""Streams: killed and resized, each row once in a pass, and nothing is read again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keepstep.policy.manifest import MANIFEST_NAME, Manifest
from keepstep.run_folder.reader import RunFolder
from tests.helpers.campaigns import cases
from tests.helpers.folders import final_digests
from tests.helpers.ranks import Ranks
from tests.helpers.recipes import argv
from tests.multiprocess.test_elastic import Chain

ALONE: dict[str, Any] = {"strategy": "ddp", "processes": 1}
SIZES = (5, 30, 1, 14)  # 50 rows, 12 a step: a pass has 5 steps, the last of 2 rows
STREAM = {"streaming": True, "keep_ranking": "recency"}


@pytest.fixture(scope="module")
def shards(demo: Path, workspace: Path) -> Path:
    rows = iter((demo / "data/train.jsonl").read_text().splitlines(keepends=True))
    folder = workspace / "shards"
    folder.mkdir()
    for file, size in enumerate(SIZES):
        text = "".join(next(rows) for _ in range(size))
        (folder / f"train-{file}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("workers", "shuffle"), cases([(0, True), (0, False), (2, True)], long=[(0, False), (2, True)])
)
def test_killed_in_a_later_pass(
    ranks: Ranks, demo: Path, tmp_path: Path, shards: Path, workers: int, shuffle: bool
) -> None:
    """Bit for bit, also where the number of workers is another one."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    fields = STREAM | {
        "shuffle_dataset": shuffle,
        "dataset_name": shards,
        "per_device_train_batch_size": 12,
        "save_steps": 1,
    }
    ranks.run(argv(demo, straight, **fields), **ALONE)
    fields["dataloader_num_workers"] = workers
    ranks.killed(argv(demo, broken, **fields), 8, **ALONE)
    again = ranks.run(argv(demo, broken, **fields), **ALONE)
    assert "carrying on from checkpoint-" in again.output
    assert "read again" not in again.output
    assert final_digests(broken, 12) == final_digests(straight, 12)
    last = RunFolder(broken).checkpoint(12).manifest
    assert (last.dealt["passes"], last.dealt["done"], last.dealt["drawn"]) == (2, 2, 24)
    assert last.samples == 2 * sum(SIZES) + 24


def test_two_one_three(ranks: Ranks, still_demo: Path, tmp_path: Path, shards: Path) -> None:
    """The same rows in each step, those of a pass once each; the curve is the undisturbed one's."""
    fields = STREAM | {"dataset_name": shards}
    straight = Chain(ranks, still_demo, tmp_path / "straight", **fields)
    straight.launch("cpu_zero3", 2)
    chain = Chain(ranks, still_demo, tmp_path / "chain", **fields)
    chain.launch("cpu_zero3", 2, stop=5)  # where the first pass ends
    chain.launch("ddp", 1, stop=9)
    assert "12 rows a step (3 x 4, 1 accumulated)" in chain.launch("cpu_zero2", 3)
    assert chain.rows() == straight.rows()
    rows = chain.rows()
    for first in (1, 6, 11):
        steps = [rows[step] for step in range(first, first + 5)]
        assert list(map(len, steps)) == [12, 12, 12, 12, 2]
        assert len({row for step in steps for row in step}) == sum(SIZES)
    for step, (loss, rate, _) in straight.curve().items():
        assert [*chain.curve()[step][:2]] == [pytest.approx(loss, abs=2e-5), rate]


@pytest.mark.long
def test_a_mixture_of_streams_two_one_three(
    ranks: Ranks, still_demo: Path, tmp_path: Path, shards: Path
) -> None:
    """Each row's part is drawn, the same on any processes; small parts begin again."""
    parts = [{"path": str(shards / f"train-{n}.jsonl"), "fraction": 1 + n} for n in (0, 1)]
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(json.dumps({"datasets": parts}))
    fields = {"dataset_name": "", "config": mixture, "shuffle_dataset": True}
    fields = STREAM | fields | {"mixture_stopping_strategy": "all_exhausted"}
    straight = Chain(ranks, still_demo, tmp_path / "straight", **fields)
    straight.launch("cpu_zero3", 2)
    chain = Chain(ranks, still_demo, tmp_path / "chain", **fields)
    chain.launch("cpu_zero3", 2, stop=3)
    chain.launch("ddp", 1, stop=7)
    assert "read again" not in chain.launch("cpu_zero2", 3)
    assert chain.rows() == straight.rows()
    steps = list(chain.rows().values())
    last = next(number for number, step in enumerate(steps) if len(step) < 12)
    first = [row for step in steps[: last + 1] for row in step]
    assert len(set(first)) == sum(SIZES[:2]) < len(first), "in one pass"


def test_a_run_of_an_earlier_version(
    ranks: Ranks, demo: Path, workspace: Path, shards: Path
) -> None:
    """Its manifest knows no place in the stream: the Trainer goes on dealing it."""
    run = workspace / "earlier"
    fields = STREAM | {"dataset_name": shards, "max_steps": 4, "per_device_train_batch_size": 12}
    ranks.run(argv(demo, run, **fields), **ALONE)
    path = run / "checkpoint-4" / MANIFEST_NAME
    manifest = Manifest.from_json(path.read_text())
    for name in ("drawn", "place", "shards"):
        del manifest.dealt[name]
    path.write_text(manifest.to_json())
    again = ranks.run(argv(demo, run, **fields | {"max_steps": 8}), **ALONE)
    assert "4 steps of this stream are read again: the run is an earlier version's" in again.output
    later = RunFolder(run).checkpoint(8).manifest
    assert (later.dealt["done"], later.dealt["drawn"]) == (3, None)
    assert later.settings["dataloader_num_workers"] == 0
    for other, told in (
        (
            {"dataloader_num_workers": 2},
            "each worker reads a part of this stream, and there were 0",
        ),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}, "deals the rows"),
    ):
        refused = ranks.start(argv(demo, run, **fields | {"max_steps": 9} | other), **ALONE)
        assert refused.wait() == [2]
        assert told in refused.output


def test_a_row_that_cannot_be_read(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Behind those that are looked at: the run ends by name, and goes on when it is mended."""
    lines = (demo / "data/train.jsonl").read_text().splitlines()[:60]
    files = [tmp_path / "data" / f"train-{number}.jsonl" for number in (0, 1, 2)]
    files[0].parent.mkdir()
    files[0].write_text("\n".join(lines[:30] * 4))  # 120 rows: the first 100 are looked at
    files[1].write_text("\n".join(lines[:9]))  # datasets reads a file ahead
    files[2].write_text("\n".join([*lines[30:], lines[0][:40]]))
    fields = STREAM | {"dataset_name": files[0].parent, "per_device_train_batch_size": 16}
    fields |= {"save_steps": 1, "max_steps": 9}
    command = argv(demo, tmp_path / "run", **fields)
    ended = ranks.start(command, **ALONE)
    assert ended.wait() == [70], ended.output
    assert re.search(r"cannot be read beyond row 1\d\d of pass 1: ", ended.output)
    assert "Hint: mend that row where it is" in ended.output
    files[2].write_text("\n".join([*lines[30:], lines[0]]))
    assert "Finished: 9 steps" in ranks.run(command, **ALONE).output
