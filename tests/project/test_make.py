"""Every test is in one of the campaigns."""

from __future__ import annotations

import subprocess

import pytest

from tests.helpers.ranks import ROOT


@pytest.mark.parametrize("target", ["test", "test-long"])
def test_every_file_of_tests_is_run_once(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", target]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    runs = [
        line.replace("--ignore ", "--ignore=").split()
        for line in lines.splitlines()
        if "-m pytest" in line
    ]
    for path in (ROOT / "tests").glob("*/test_*.py"):
        file = str(path.relative_to(ROOT))
        assert sum(holds(words, file) for words in runs) == 1, (file, runs)


def holds(run: list[str], file: str) -> bool:
    """Whether a run of pytest has this file: by its name or its folder's; one that names nothing
    has all."""
    names = {file, file.rpartition("/")[0]}
    named = [word for word in run if word.startswith("tests/")]
    ignored = any(f"--ignore={name}" in run for name in names)
    return not ignored and (not named or not names.isdisjoint(named))
