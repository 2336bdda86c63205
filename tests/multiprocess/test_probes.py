"""What only a look at the machines tells: here two ranks that do not see the same disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.helpers.launchers import end, start
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv

APART = PROGRAMS / "apart.py"


def test_a_run_folder_that_is_not_shared(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """Rank 1 has a filesystem of its own in that place, as a node with a local disk has."""
    if os.geteuid() != 0:
        pytest.skip("not root: a rank cannot be given a mount of its own")
    place = tmp_path / "scratch"
    place.mkdir()
    run = ranks.start([str(place), *argv(demo, place / "run")], script=APART)
    assert run.wait() == [2, 2]
    assert f"output_dir: {place}/run is not shared: what the main process writes on" in run.output
    assert "is not seen on another-node" in run.output
    assert "[not-shared]" in run.output
    assert list(place.iterdir()) == [], "nothing of the probe stays"


def test_five_mistakes_in_one_report(demo: Path, tmp_path: Path) -> None:
    """By the real launcher; seconds are told, not asserted."""
    mistakes = {
        "eval_strategy": "no",
        "dataset_name": "no/such/file.jsonl",
        "eval_split_fraction": 2,
        "keep_total_bytes": "lots",
        "save_interval_seconds": 0,
    }
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu_zero3.yaml"]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += ["-m", "keepstep.train", *argv(demo, tmp_path / "run", **mistakes)]
    began = time.monotonic()
    log = tmp_path / "log"
    code, output = end(start(["env", "KEEPSTEP_STATUS_FILE=/dev/null", *command], log), log)
    print(f"{time.monotonic() - began:.1f} s")
    assert code == 1, "the launcher's own"
    assert output.count("keepstep: the recipe has 5 problems:") == 1
    for codes in ("no-evaluation", "data", "size", "number"):
        assert f"[{codes}]" in output
    assert output.count("    Hint: ") >= 1
    assert not (tmp_path / "run").exists()
