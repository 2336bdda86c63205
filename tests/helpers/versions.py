"""For `make compat`: a pytest plugin that tells which versions a run has tried, and its counts.

COMPAT=oldest python -m pytest -p tests.helpers.versions …
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers.ranks import ROOT

OLDEST = ROOT / "tests/compat/oldest.txt"
# Of these a row of docs/compatibility.md tells the versions; of the others, where they matter.
TOLD = (
    *("torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets"),
    *("huggingface_hub", "safetensors", "numpy", "tenacity"),
)


def requirements() -> list[Requirement]:
    """What pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"]]


def lower_bounds() -> dict[str, Version]:
    """Library → the oldest version that pyproject.toml allows."""
    return {
        requirement.name: Version(bound.version)
        for requirement in requirements()
        for bound in requirement.specifier
        if bound.operator == ">="
    }


def pins(text: str) -> dict[str, Version]:
    """Library → its version, in a file of constraints."""
    found = re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    return {name: Version(number) for name, number in found}


def faults(which: str) -> Iterator[str]:
    """What is installed in place of what this run is to try."""
    for requirement in requirements():
        installed = version(requirement.name)
        if not requirement.specifier.contains(installed, prereleases=True):
            yield f"{requirement.name} {installed} is installed, {requirement} is allowed"
    for name, wanted in pins(OLDEST.read_text()).items() if which == "oldest" else ():
        if Version(Version(version(name)).public) != wanted:
            yield f"{name} {version(name)} is installed, and {wanted} is to be tried"


def row(which: str, passed: int, failed: int) -> str:
    """For the table of docs/compatibility.md."""
    today = datetime.now(UTC).date().isoformat()
    told = ", ".join(f"{name} {Version(version(name)).public}" for name in TOLD)
    python = ".".join(map(str, sys.version_info[:3]))
    return f"| {which} | {today} | {passed} passed, {failed} failed | Python {python}, {told} |"


def pytest_sessionstart(session: pytest.Session) -> None:
    found = list(faults(os.environ["COMPAT"]))
    if found:
        pytest.exit("\n".join(found), returncode=3)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = {n: len(terminalreporter.stats.get(n, [])) for n in ("passed", "failed", "error")}
    failed = counts["failed"] + counts["error"]
    terminalreporter.write_line(row(os.environ["COMPAT"], counts["passed"], failed))
