"""The examples run, and the documentation shows what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.ranks import ROOT


def run_example(name: str, cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "launch/examples" / name, *arguments],
        cwd=cwd,
        env={**os.environ, "HF_DATASETS_CACHE": str(cwd / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_textbook_scenario(tmp_path: Path) -> None:
    def plain(text: str) -> list[str]:
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
        return [line.rstrip() for line in text.strip().splitlines()]

    told = run_example("retention_story.py", tmp_path, "runs/story")
    (shown,) = re.findall(
        r"```\n(\$ keepstep ls.*?)```", (ROOT / "docs/checkpoints.md").read_text(), re.S
    )
    assert plain(told) == plain(shown)


def test_exactly_the_best_three_when_the_newest_is_among_them(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "launch/examples"))
    import retention_story

    from keepstep.checkpoint.runfolder import RunFolder

    falling = {500 * n: 2.0 - n / 10 for n in range(1, 7)}
    retention_story.play(tmp_path, falling)
    assert [c.step for c in RunFolder(tmp_path).checkpoints()] == [2000, 2500, 3000]


def test_the_classic_lesson(tmp_path: Path) -> None:
    told = run_example("checkpoint_demo.py", tmp_path, "runs/lesson")
    kept = re.findall(r"kept: (.*)", told)
    assert kept[0] == "checkpoint-2, checkpoint-4"
    best = re.findall(r"best: checkpoint-(\d+), eval_loss (\d\.\d{4})", told)
    resumed = re.search(r"resumed at step (\d+)", told)
    assert resumed is not None
    assert resumed.group(1) == best[0][0]
    assert float(best[1][1]) <= float(best[0][1])
    assert "checkpoint-6" in kept[1]
