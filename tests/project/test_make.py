"""Every test is in one of the campaigns."""

from __future__ import annotations

import subprocess

import pytest

from tests.helpers.ranks import ROOT


@pytest.mark.parametrize("target", ["test", "test-long"])
def test_every_folder_of_tests_is_run_once(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", target]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    runs = [line.split() for line in lines.splitlines() if "-m pytest" in line]
    folders = {f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/test_*.py")}
    for folder in folders:
        named = sum(
            folder in words and f"--ignore {folder}" not in " ".join(words) for words in runs
        )
        others = sum(not any(w.startswith("tests/") for w in ignoring(words)) for words in runs)
        ignored = sum(f"--ignore {folder}" in " ".join(words) for words in runs)
        assert named + others - ignored == 1, (folder, runs)


def ignoring(words: list[str]) -> list[str]:
    """What a run names, without what it ignores; a run that names nothing runs all."""
    skipped = {i + 1 for i, word in enumerate(words) if word == "--ignore"}
    return [word for i, word in enumerate(words) if i not in skipped]
