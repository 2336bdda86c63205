"""The benchmarks run: on the smallest model, one round. What they measure then means nothing.

Each runs in `make test`: what launches processes of torch has them forked by the tests' warm
process (`forked`), which pays for imports once; as it is started by hand, in the long campaign.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmarks.gpu import launches

from tests.helpers.ranks import ROOT, Ranks
from tests.helpers.waiting import PATIENCE

REPORT = re.compile(r'\{(?:"\w+": [-+.e\d]+(?:, )?)*\}')  # of a worker: names and numbers
SCRIPTS = sorted(ROOT.glob("benchmarks/*.py"))


def bench(name: str, *argv: object, folder: Path = ROOT, timeout: float = PATIENCE) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, argv)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(script: Path, tmp_path: Path) -> None:
    told = bench(script.name, "--help", folder=tmp_path)
    assert told.startswith(f"usage: {script.name}")
    assert "--rounds" in told
    assert not list(tmp_path.iterdir())


def test_every_benchmark_has_a_test_here_that_is_not_long() -> None:
    tests = [
        n for n in ast.parse(Path(__file__).read_text()).body if isinstance(n, ast.FunctionDef)
    ]
    quick = [
        t for t in tests if not any(ast.unparse(d) == "pytest.mark.long" for d in t.decorator_list)
    ]
    assert {f"test_{script.stem}" for script in SCRIPTS} <= {test.name for test in quick}


@pytest.fixture
def forked(
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs a benchmark here, what it launches in forks, on the smallest model; what it tells."""

    def launch(
        command: list[str], *_: Any, variables: dict[str, str] | None = None, **__: Any
    ) -> str:
        """In place of `launches.run`."""
        module = command[command.index("-m", 3 if "launch" in command[2] else 1) + 1]
        folder = ROOT / "src" if module.startswith("keepstep.") else ROOT
        script = folder / f"{module.replace('.', '/')}.py"
        words = command[command.index(module) + 1 :]
        options: dict[str, Any] = {"strategy": "ddp", "processes": 1}
        if "--config_file" in command:
            options["strategy"] = Path(command[command.index("--config_file") + 1]).stem
            options["processes"] = int(command[command.index("--num_processes") + 1])
        environment = {n: v for n, v in (variables or {}).items() if os.environ.get(n) != v}
        return ranks.run(words, script=script, env=environment, **options).output

    def spawn(what: str, count: int, _: Any, script: str = "") -> list[dict[str, float]]:
        """In place of `reshard.spawn`; the ranks' reports stand in one log, also side by side."""
        path = Path(script or sys.modules["benchmarks.reshard"].__file__ or "")
        words = [*sys.argv[1:], "--worker", what]
        output = ranks.run(words, script=path, strategy="ddp", processes=count).output
        reports = REPORT.findall(output)
        assert len(reports) == count, output
        return [json.loads(report) for report in reports]

    def run(name: str, *argv: object) -> str:
        script: ModuleType = importlib.import_module(f"benchmarks.{name}")
        for module in {script, sys.modules.get("benchmarks.reshard")} - {None}:
            if hasattr(module, "spawn"):
                monkeypatch.setattr(module, "spawn", spawn)
        monkeypatch.setattr(launches, "run", launch)
        words = ["--parameters", 1, "--rounds", 1, "--folder", tmp_path / "work", *argv]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        script.main()
        assert not (tmp_path / "work").exists()
        return capsys.readouterr().out

    return run


def test_many_manifests() -> None:
    assert bench("many_manifests.py", 3, "--rounds", 1).count(" s  (") == 5


def test_streams(tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    assert "from its place" in bench("streams.py", 300, "--rounds", 1, "--json", result)
    summary = json.loads(result.read_text())
    assert all(
        summary[f"{k}, {w}"][0] > 0 for k in ("jsonl", "parquet") for w in ("place", "again")
    )


def test_make_bench_runs_every_benchmark() -> None:
    assert {*all_on_cpu().RUNS, "all_on_cpu"} == {script.stem for script in SCRIPTS}
    lines = subprocess.check_output(["make", "--dry-run", "bench"], cwd=ROOT, text=True)
    assert "benchmarks/all_on_cpu.py" in lines


def test_what_a_run_says_of_itself_is_no_row() -> None:
    said = "step  4/57  saved checkpoint-2: 487 MB in 0.23 s (training stopped for 0.03 s)"
    measured = "step after plain  0.699  (0.673 to 0.710)"
    (row,) = all_on_cpu().rows_of("save_stall", f"{said}\n{measured}\n")
    assert (row.what, row.value) == ("save_stall: step after plain", 0.699)


def all_on_cpu() -> ModuleType:
    return importlib.import_module("benchmarks.all_on_cpu")


def test_all_on_cpu(tmp_path: Path) -> None:
    """Two of the cheapest; what they tell becomes rows, and so does one that fails."""
    told = bench(
        "all_on_cpu.py", "--small", "--only", "many_m", "control", "--out", tmp_path / "out"
    )
    assert "| many_manifests: keepstep ls, sizes verified | " in told
    rows = [json.loads(line) for line in (tmp_path / "out/bench.jsonl").read_text().splitlines()]
    assert len(rows) == 5 + 2 * 5
    assert all(row["value"] >= 0 and " to " in row["note"] for row in rows)
    assert rows[0]["torch"]
    assert int(rows[0]["cores"]) > 0
    assert (tmp_path / "out/bench.md").read_text().count("\n| ") == 2 + len(rows)
    assert "10 checkpoints of 15 files" in (tmp_path / "out/logs.txt").read_text()


def test_what_benchmarks_tell_is_read_line_by_line() -> None:
    text = """8 ranks
  save: wire bytes: main process 8, last 3,197
  save: all requests: 1,265
  watchdog: ask the store: 0.0003
tokens/s, ratio            0.991  (0.984 to 1.002)  goal >= 0.99: reached
   2 ranks  decision                  7.6 ms (3.0 to 14.1)
lazy: {'stall': 0.0345}
"""
    rows = list(all_on_cpu().rows_of("x", text))
    assert [(row.what, row.value, row.unit) for row in rows] == [
        ("x: 8 ranks, save: all requests", 1265.0, ""),
        ("x: 8 ranks, watchdog: ask the store", 0.0003, ""),
        ("x: tokens/s, ratio", 0.991, ""),
        ("x: 2 ranks decision", 7.6, "ms"),
    ]
    assert rows[2].note == "0.984 to 1.002; goal >= 0.99: reached"


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


def test_save_stall(ranks: Ranks, tmp_path: Path) -> None:
    """Its ranks; `main` starts them, which the long campaign has."""
    from benchmarks.gpu.inputs import SHAPES, make_inputs

    make_inputs(tmp_path / "work", SHAPES[1])
    result = tmp_path / "result.jsonl"
    argv = ["--parameters", "1", "--rounds", "1", "--folder", str(tmp_path / "work")]
    script = ROOT / "benchmarks/save_stall.py"
    told = ranks.run([*argv, "--json", str(result)], script=script, strategy="cpu_zero3").output
    assert "ZeRO-3, 2 processes" in told
    summary = json.loads(result.read_text())
    for arm in ("plain", "off", "snapshot", "lazy", "dcp", "raw GB/s", "memcpy GB/s"):
        assert summary[arm][0] > 0
    assert summary["lazy facts"]["bytes"] > 0


def test_throughput(forked: Callable[..., str], tmp_path: Path) -> None:
    """Both trainers were trained, on as many tokens, or it would say so."""
    result = tmp_path / "result.jsonl"
    argv = ["--warm", 1, "--steps", 3, "--length", 16, "--rows", 2, "--json", result]
    told = forked("throughput", *argv).splitlines()
    assert told[0].startswith("1 M parameters, zero2, 2 x 2 x 16 tokens, 3 steps a launch; load")
    names = ["tokens/s", "step", "processor", "memory", "first step"]
    arms = ("plain", "keepstep", "ratio")
    assert [line[:22].strip() for line in told[1:]] == [f"{n}, {a}" for n in names for a in arms]
    assert sum("goal" in line for line in told) == 4
    summary = json.loads(result.read_text())
    for name in names:
        assert all(summary[f"{arm} {name}"][0] > 0 for arm in arms)


@pytest.mark.long
def test_all_of_them_as_they_are_started(tmp_path: Path) -> None:
    told = bench("all_on_cpu.py", "--small", "--out", tmp_path / "out", timeout=1800)
    rows = [json.loads(line) for line in (tmp_path / "out/bench.jsonl").read_text().splitlines()]
    assert {row["what"].split(":")[0] for row in rows} == {*all_on_cpu().RUNS}, told


def test_mirror(forked: Callable[..., str], tmp_path: Path) -> None:
    """All saves but the last of each run were copied, or it would say so."""
    result = tmp_path / "result.jsonl"
    told = forked("mirror", "--steps", 6, "--every", 2, "--json", result)
    arms = {
        "stall": ("without", "with"),
        "step": ("without", "with"),
        "upload": ("plain", "keepstep"),
    }
    summary = json.loads(result.read_text())
    for name, pair in arms.items():
        assert all(summary[f"{name}, {arm}"][0] > 0 for arm in pair)
        assert f"{name}, ratio" in told


def test_reshard(forked: Callable[..., str], tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    assert "direct is" in forked("reshard", "--json", result)
    assert json.loads(result.read_text())["universal seconds"][0] > 0


def test_export(forked: Callable[..., str]) -> None:
    told = forked("export")
    assert [line.split()[:2] for line in told.splitlines()] == [
        [arm, name] for arm in ("file", "shards", "stock") for name in ("seconds", "gb")
    ]


@pytest.mark.parametrize(
    ("processes", "against"), [(1, ()), pytest.param(2, (ROOT,), marks=pytest.mark.long)]
)
def test_carry_on(tmp_path: Path, processes: int, against: tuple[Path, ...]) -> None:
    """One process; and two, against itself: both arms are measured, and tell their parts."""
    result = tmp_path / "result.jsonl"
    argv = ["--parameters", 1, "--rounds", 1, "--folder", tmp_path / "work", "--json", result]
    argv += ["--processes", processes, *(word for tree in against for word in ("--against", tree))]
    told = bench("carry_on.py", *argv)
    assert (" x there" in told) == bool(against)
    summary = json.loads(result.read_text())
    for arm in ("here", "there")[: 1 + len(against)]:
        wanted = ("notice", "launch", "ranks", "whole", "cpu", "- imports", "- first_step")
        assert all(summary[f"{arm} {part}"][0] > 0 for part in wanted)
    assert not (tmp_path / "work").exists()
