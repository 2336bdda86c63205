"""The benchmarks run: on the smallest model, one round. What they measure then means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT

SCRIPTS = sorted(ROOT.glob("benchmarks/*.py"))


def bench(name: str, *argv: object, folder: Path = ROOT) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, argv)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(script: Path, tmp_path: Path) -> None:
    told = bench(script.name, "--help", folder=tmp_path)
    assert told.startswith(f"usage: {script.name}")
    assert "--rounds" in told
    assert not list(tmp_path.iterdir())


def test_many_manifests() -> None:
    assert bench("many_manifests.py", 3, "--rounds", 1).count(" s  (") == 5


def test_many_ranks(tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    told = bench("many_ranks.py", 4, 8, "--rounds", 2, "--folder", tmp_path, "--json", result)
    assert [line for line in told.splitlines() if line.endswith(" ranks")] == ["4 ranks", "8 ranks"]
    few, more = map(json.loads, result.read_text().splitlines())
    assert more["phases"]["save"]["files"] == few["phases"]["save"]["files"] + 4 * 3
    assert few["steps"]["save: retention and removal"][0] > 0
    assert few["watchdog"]["bytes"] > 0
    assert list(tmp_path.iterdir()) == [result]


def test_control_plane() -> None:
    assert bench("control_plane.py", 2, 3, "--rounds", 2).count(" ms (") == 2 * 5


def test_save_stall(tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    argv = ["--parameters", 1, "--rounds", 1, "--folder", tmp_path / "work", "--json", result]
    told = bench("save_stall.py", *argv)
    assert "ZeRO-3, 2 processes" in told
    summary = json.loads(result.read_text())
    for arm in ("plain", "off", "snapshot", "lazy", "dcp", "raw GB/s", "memcpy GB/s"):
        assert summary[arm][0] > 0
    assert summary["lazy facts"]["bytes"] > 0
    assert not (tmp_path / "work").exists()


@pytest.mark.long
def test_reshard(tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    argv = ["--parameters", 1, "--rounds", 1, "--folder", tmp_path / "work", "--json", result]
    assert "direct is" in bench("reshard.py", *argv)
    assert json.loads(result.read_text())["universal seconds"][0] > 0


@pytest.mark.long
def test_export(tmp_path: Path) -> None:
    told = bench("export.py", "--parameters", 1, "--rounds", 1, "--folder", tmp_path / "work")
    assert [line.split()[:2] for line in told.splitlines()] == [
        [arm, name] for arm in ("file", "shards", "stock") for name in ("seconds", "gb")
    ]


@pytest.mark.long
def test_carry_on(tmp_path: Path) -> None:
    """Against itself: both arms are measured, and tell their parts."""
    result = tmp_path / "result.jsonl"
    argv = ["--parameters", 1, "--rounds", 1, "--folder", tmp_path / "work", "--json", result]
    told = bench("carry_on.py", *argv, "--against", ROOT)
    assert " x there" in told
    summary = json.loads(result.read_text())
    for arm in ("here", "there"):
        wanted = ("notice", "launch", "ranks", "whole", "cpu", "- imports", "- first_step")
        assert all(summary[f"{arm} {part}"][0] > 0 for part in wanted)
    assert not (tmp_path / "work").exists()
