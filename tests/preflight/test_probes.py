"""Looks at this machine: space, quota, memory, a folder that can be renamed. One process."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from keepstep.preflight import probes
from keepstep.preflight.estimate import Shapes, Strategy
from keepstep.recipe.config import KeepstepConfig, Problem
from keepstep.recipe.parse import parse_recipe
from keepstep.run_folder.reader import RunFolder
from tests.helpers.disks import small_disk_at
from tests.helpers.folders import commit, identify

GB = 10**9
MODEL = Shapes(GB, GB, GB, 291, 10**7, 32, 4096, 32000)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def training(output_dir: Path, **fields: object) -> KeepstepConfig:
    values = {"model_name_or_path": "a/b", "dataset_name": "c/d", "output_dir": output_dir}
    words = [t for name, v in {**values, **fields}.items() for t in (f"--{name}", str(v))]
    return parse_recipe(words).training


def space(args: KeepstepConfig, size: int) -> list[Problem]:
    return list(probes.check_space(args, size))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A disk with so much free space."""

    def set_free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, count))

    return set_free


def test_space_for_the_limit_and_one(tmp_path: Path, free: Any) -> None:
    args = training(tmp_path / "run", save_total_limit=3)
    free(40 * GB)
    assert space(args, 10 * GB) == []
    free(39 * GB)
    (problem,) = space(args, 10 * GB)
    assert (problem.code, problem.severity) == ("space", "error")
    assert "4 checkpoints of 10 GB take 40 GB more" in problem.what
    assert "39 GB are free" in problem.what


def test_a_run_that_saves_when_stopped_only(tmp_path: Path, free: Any) -> None:
    free(15 * GB)
    assert space(training(tmp_path / "run", save_strategy="no"), 10 * GB) == []


def test_space_bounded_by_a_budget_and_kept_for_others(tmp_path: Path, free: Any) -> None:
    args = training(tmp_path / "run", save_total_limit=9, keep_total_bytes="20GB")
    free(30 * GB)
    assert space(args, 10 * GB) == []
    args = training(tmp_path / "run", save_total_limit=2, min_free_bytes="5GB")
    assert "take 35 GB more" in space(args, 10 * GB)[0].what


def test_a_run_that_is_under_way_is_only_warned(tmp_path: Path, free: Any) -> None:
    """Its own checkpoints count: what they take will be free again."""
    for step in (10, 20, 30):
        commit(identify(tmp_path), step)
    there = sum(c.manifest.total_bytes for c in RunFolder(tmp_path).checkpoints())
    args, one = training(tmp_path, save_total_limit=3), there // 3
    free(2 * one)
    assert space(args, one) == []
    free(one // 2)
    assert [p.severity for p in space(args, one)] == ["warning"]


def test_looking_takes_no_space_from_others(tmp_path: Path) -> None:
    """Somebody beside writes into the last free bytes while launches look, again and again."""
    with small_disk_at(tmp_path / "disk", "40m") as disk:
        stop, refused = threading.Event(), []

        def save() -> None:
            while not stop.is_set():
                try:
                    (disk / "save").write_bytes(bytes(30 << 20))
                except OSError as error:
                    refused.append(error)
                (disk / "save").unlink()

        args, beside = training(disk / "run"), threading.Thread(target=save)
        beside.start()
        for _ in range(200):
            space(args, 5 << 20)
            probes.disk_speed(disk)
        stop.set()
        beside.join()
        assert refused == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", "10m") as place:
        yield place


def test_a_full_disk_says_so(small_disk: Path) -> None:
    (problem,) = space(training(small_disk / "run"), 6 << 20)
    assert "10.5 MB are free" in problem.what
    assert probes.disk_speed(small_disk) == 0.0, "256 MB cannot be written to try it"
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_cannot_be_written(small_disk: Path) -> None:
    assert probes.see_together(small_disk / "run") == []
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (problem,) = probes.see_together(small_disk / "run")
    assert problem.code == "not-writable"
    assert f"no folder can be made and renamed in {small_disk}: Read-only" in problem.what


def test_a_disk_that_renames_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some object stores do behind a mount."""

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "rename", refuse)
    (problem,) = probes.see_together(tmp_path / "run")
    assert problem.code == "not-writable"
    assert list(tmp_path.iterdir()) == []


def test_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    args, strategy = training(tmp_path / "run"), Strategy(3, 8, half=True)
    monkeypatch.setattr(probes, "free_host_memory", lambda: 6 * GB)  # 4 of 8 shares of 12 GB
    assert list(probes._host_memory(args, MODEL, strategy)) == []
    monkeypatch.setattr(probes, "free_host_memory", lambda: 5 * GB)
    (problem,) = probes._host_memory(args, MODEL, strategy)
    assert (problem.code, problem.severity) == ("host-memory", "warning")
    args = training(tmp_path / "run", async_save="off")
    assert list(probes._host_memory(args, MODEL, strategy)) == []


def test_no_host_memory_is_asked_for_where_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "free_host_memory", lambda: 1)
    strategy = Strategy(3, 8)
    cases: list[tuple[dict[str, Any], int]] = [({}, 1), ({"save_strategy": "no"}, 0)]
    for fields, count in cases:
        clock = {"save_strategy": "no", "save_interval_seconds": 60.0} if not count else fields
        args = KeepstepConfig(output_dir=str(tmp_path), async_save="lazy", **fields)
        assert len(list(probes._host_memory(args, MODEL, strategy))) == count
        args = KeepstepConfig(output_dir=str(tmp_path), async_save="lazy", **clock)
        assert len(list(probes._host_memory(args, MODEL, strategy))) == 1
