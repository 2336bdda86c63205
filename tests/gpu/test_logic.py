"""What benchmarks/gpu.sh does beside computing on a GPU: runs anywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import cases, correctness, inputs, launches, machine, speed, stall
from benchmarks.gpu.launches import Budget, LaunchError
from benchmarks.gpu.meter import COPY, WAITS, count_waits
from benchmarks.gpu.table import COLUMNS, Goal, Row, Table

from tests.helpers.ranks import ROOT

SCRIPT = ROOT / "benchmarks/gpu.sh"


def script(*argv: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("part", ["1", "2", "3"])
def test_without_a_gpu_a_part_says_so(tmp_path: Path, part: str) -> None:
    done = script(part, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert f"Part {part}, " in done.stdout
    assert "skipped, there is no CUDA device here" in done.stdout
    assert not (tmp_path / "out").exists()


def test_what_is_asked_for_wrongly_is_refused(tmp_path: Path) -> None:
    done = script("4")
    assert done.returncode == 2
    assert "usage: gpu.sh" in done.stderr
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    done = script("1", "--cpu", "--only", "nothing", "--work", tmp_path)
    assert done.returncode == 2
    assert "name a new folder" in done.stderr
    assert precious.read_text() == "years of work"
    done = script("1", "--cpu", "--only", "LoRE", "QLoRE", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "--only LoRE QLoRE: part 1 has nothing of that name" in done.stdout


def test_the_script_is_good_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_what_is_brought_is_what_is_tested() -> None:
    """Versions of constraints.txt, where it has them."""
    tested = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    brought = dict(re.findall(r"([\w-]+)==([\w.]+)", SCRIPT.read_text()))
    known = tested.keys() & brought.keys()
    assert {"deepspeed", "huggingface_hub", "peft", "transformers", "trl"} <= known
    assert {name: brought[name] for name in known} == {name: tested[name] for name in known}


@pytest.mark.long
def test_a_case_on_cpu(tmp_path: Path) -> None:
    """Killed in a save, and carried on, with the table that comes of it."""
    out = tmp_path / "out"
    done = script(
        *("1", "--cpu", "--only", "ZeRO-2, LoRA"),
        *("--out", out, "--work", tmp_path / "work"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert (row["value"], row["goal"], row["reached"]) == (0, "== 0", "yes")
    assert row["torch"] == torch.__version__
    assert row["what"] in (out / "gpu.md").read_text()
    logs = (out / "logs-1.txt").read_text()
    assert "killed in write 4" in logs
    assert "carrying on from checkpoint-2" in logs
    assert not (tmp_path / "work").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("part", "least"), [("1", len(cases.CASES)), ("2", 30), ("3", len(speed.OTHERS) + 4)]
)
def test_a_whole_part_on_cpu(tmp_path: Path, part: str, least: int) -> None:
    done = script(
        *(part, "--cpu", "--seconds", 3000),
        *("--out", tmp_path / "out", "--work", tmp_path / "work"),
        timeout=3100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/gpu.jsonl").read_text().splitlines()]
    assert len(rows) >= least
    left_out = [row["note"] for row in rows if row["value"] is None]
    assert not [
        note for note in left_out if not note.startswith(("skipped", "nothing", "the peak"))
    ]


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    told = {"date": "today", "card": "none"}
    table = Table(tmp_path, "Part 1", told)
    table.add(Row("step", 1.234567, "s", Goal("<=", 2), "a | b\nc"))
    table.add(Row("slow", 3.0, "s", Goal("<=", 2)))
    table.add(Row("not there", None, note="skipped"))
    assert not table.failed, "a goal that is not reached is a finding"
    table.add(Row("broken", None, note="exit status 1", failed=True))
    assert [row.what for row in table.failed] == ["broken"]
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert "date today, card none" in lines
    assert lines[-4] == "| step | 1.235 s | <= 2 s | yes | a / b c |"
    assert lines[-3].split(" | ")[3] == "NO"
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines if line.startswith("|"))
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["reached"] for row in rows] == ["yes", "NO", None, "FAILED"]
    Table(tmp_path, "Part 2", told).add(Row("step", 1.0))
    assert (tmp_path / "gpu.md").read_text().startswith("\n## Part 1")
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == 5


def test_flops_and_peaks() -> None:
    # PaLM's own: 540 B, 118 layers, 48 heads of 256, 2,048 tokens: 6 N is 3,240 of 3,273 GFLOP.
    gflops = machine.flops_per_token(540_000_000_000, 118, 48 * 256, 2048) / 1e9
    assert gflops == pytest.approx(3240 + 35.6, abs=0.1)
    assert machine.peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert machine.peak_tflops("NVIDIA H100 PCIe") == 756.5
    assert machine.peak_tflops("NVIDIA H200 NVL") == 835.5
    assert machine.peak_tflops("NVIDIA GeForce RTX 4090") is None
    assert machine.lacks("torch", "no_such_package") == "skipped: no_such_package is not installed"
    assert machine.lacks("torch") is None


def test_parameters_are_as_many_as_the_names_say() -> None:
    for millions, (hidden, layers, heads) in inputs.SHAPES.items():
        inner = hidden * 8 // 3
        count = 2 * inputs.VOCABULARY * hidden + layers * hidden * (4 * hidden + 3 * inner)
        assert hidden % heads == 0
        assert count / 1e6 == pytest.approx(millions, rel=0.1), millions


def test_waits_are_counted_by_name() -> None:
    names = ["cudaLaunchKernel", "cudaStreamSynchronize", "cudaStreamSynchronize", "aten::item"]
    names += ["Memcpy DtoH (Device -> Pageable)", "Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD"]
    counted = count_waits(names)
    assert counted == dict.fromkeys((*WAITS, COPY), 0) | {"cudaStreamSynchronize": 2, COPY: 2}
    assert stall.added(counted, counted) == 0
    assert stall.added(counted, counted | {COPY: 5, WAITS[0]: 0}) == 3, "fewer make up for nothing"


def test_rows_of_a_stall() -> None:
    summary = {
        "step after none": [1.0, 0.9, 1.1],
        "step after plain": [1.0, 1, 1],
        "plain": [9.0, 8, 10],
        "step after snapshot": [1.02, 1, 1.1],
        "snapshot": [0.11, 0.1, 0.2],
        "step after lazy": [1.07, 1, 1.2],
        "lazy": [0.01, 0.005, 0.3],
        "snapshot bytes": [5e9, 5e9, 5e9],
        "memcpy GB/s": [50.0, 40, 60],
    }
    rows = {row.what.removeprefix("x: "): row for row in stall.rows_of("x", summary)}
    assert rows["training later by, lazy"].value == pytest.approx(0.08)
    assert rows["plain Trainer's stall, of snapshot's"].value == pytest.approx(9 / 0.13)
    assert rows["plain Trainer's stall, of snapshot's"].reached == "yes"
    assert rows["step while lazy is written"].reached == "NO"
    assert rows["snapshot, of a copy of its bytes"].value == pytest.approx(1.1)
    assert rows["lazy, of a step"].value == pytest.approx(8.0)
    assert rows["lazy, the longest"].reached == "NO"
    assert "training later by, dcp" not in rows


def test_memory_and_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    report = {"allocated": 40_000_000_000, "reserved": 50_000_000_000, "estimate": 43_000_000_000}
    report |= {"matrices": 10**9, "layers": 20, "hidden": 2048, "length": 2048}
    (row,) = speed.memory(speed.MAIN, report)
    assert [row.value, row.reached] == [pytest.approx(7.5), "yes"]
    (row,) = speed.memory(speed.MAIN, report | {"allocated": 0})
    assert row.value is None
    monkeypatch.setattr(speed, "card", lambda: "NVIDIA H100 80GB HBM3")
    (row,) = speed.share_of_peak(speed.MAIN, report, 70_000)
    per_token = 6e9 + 12 * 20 * 2048 * 2048
    assert row.value == pytest.approx(100 * 70_000 * per_token / 989.4e12)
    assert row.reached == "yes"
    monkeypatch.setattr(speed, "card", lambda: None)
    (row,) = speed.share_of_peak(speed.MAIN, report, 70_000)
    assert row.value is None


def test_recipes_are_what_keepstep_reads(tmp_path: Path) -> None:
    """Every case and setting, as it will be on a GPU."""
    from keepstep.recipe.parse import RecipeParser

    parser = RecipeParser()
    known = parser.fields.keys()
    lines = [cases.recipe(case, tmp_path, tmp_path / "run") for case in cases.CASES]
    lines += [speed.recipe(s, tmp_path, tmp_path / "run") for s in (speed.MAIN, *speed.OTHERS)]
    for argv in lines:
        names = {text.removeprefix("--") for text in argv[::2]}
        assert names <= known, names - known
    for case in cases.CASES:
        assert case.millions in inputs.SHAPES
        assert case.strategy in launches.ON_CPU
        assert (ROOT / f"accelerate_configs/{case.strategy}.yaml").is_file()
        assert case.phase == "step" or case.step % cases.EVERY == 0, "a step that is saved"
        assert cases.EVERY < case.step <= cases.STEPS
    largest = max(case.disk_bytes for case in cases.CASES)
    assert largest < 50e9, "of a disk of 64 GB"


def test_what_is_not_the_same_is_named() -> None:
    cases.compare({"a": "1", "b": "2"}, {"a": "1", "b": "2"})
    with pytest.raises(LaunchError, match="2 of 3 files differ: b, c"):
        cases.compare({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
    with pytest.raises(LaunchError, match="no checkpoint-6"):
        cases.end_of(Path("/nonexistent"))


def test_a_launch_that_hangs_or_fails_is_told(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    began = time.monotonic()
    fails = "print('one'); print('two'); raise SystemExit(3)"
    with pytest.raises(LaunchError, match="no end after 1 s"):
        launches.run(["sleep", "900"], log, True, 1)
    with pytest.raises(LaunchError, match=r"exit status 3; one / two \(a.log\)"):
        launches.run([sys.executable, "-c", fails], log, True, 300)
    launches.run([sys.executable, "-c", "raise SystemExit(3)"], log, True, 300, expected="any")
    assert time.monotonic() - began < 300, "the one that sleeps was killed"


def test_a_part_whose_time_is_up_says_what_is_missing(tmp_path: Path) -> None:
    table = Table(tmp_path, "Part 1", {})
    budget = Budget(0)
    for case in cases.CASES:
        row = correctness.row_of(case, tmp_path, True, budget)
        table.add(row)
        assert row.value is None
        assert "time is used up" in row.note or row.note.startswith("skipped")
    speed.run(table, tmp_path, True, budget, only=["padded"])
    assert not table.failed
    assert table.rows == len(cases.CASES) + 1
    assert not list(tmp_path.glob("*.log")), "nothing was launched"
