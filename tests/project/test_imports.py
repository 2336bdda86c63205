"""Imports point down only, and the commands need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT

SOURCE = ROOT / "src/keepstep"
# Lowest first. A module may import from the levels below its own, and from its own level.
LEVELS = [
    {"__init__", "checkpoint.__init__"},
    {
        *(
            "checkpoint.batch",
            "checkpoint.manifest",
            "checkpoint.printable",
            "checkpoint.retention",
            "checkpoint.selection",
        ),
        *("checkpoint.lineage", "checkpoint.schedule", "checkpoint.strict", "noise", "preemption"),
        "checkpoint.history",
        *("trajectory", "evaluations", "streams", "datafiles", "rows"),
        *("publish.__init__", "publish.best", "environment", "estimate"),
    },
    {
        *("checkpoint.failure", "checkpoint.files", "checkpoint.layout", "checkpoint.tensors"),
        *("distributed", "outcome", "terminal", "publish.client"),
    },
    {"checkpoint.storage", "checkpoint.arena", "checkpoint.reading"},
    {"checkpoint.committed"},
    {"checkpoint.listed"},
    {
        *("checkpoint.runfolder", "checkpoint.joint", "checkpoint.serialization"),
        "checkpoint.setbacks",
        *("checkpoint.sources", "watchdog", "workers"),
    },
    {
        "checkpoint.companions",
        *("checkpoint.lookout", "checkpoint.notes"),
        "checkpoint.ownership",
        *("checkpoint.runwriter", "checkpoint.keeping", "checkpoint.trash"),
        "checkpoint.writer",
        "checkpoint.shards",
        "report",
        "sampling",
    },
    {"checkpoint.adopt", "checkpoint.flight", "checkpoint.reshard", "checkpoint.weights"},
    {"checkpoint.export", "checkpoint.offline", "checkpoint.saver"},
    {"checkpoint.manager", "checkpoint.merge", "publish.card"},
    {"publish.bundle"},
    {"publish.prepare", "publish.remote"},
    {"publish.hub"},
    {"publish.process", "publish.push"},
    {"publish.publisher", "publish.by_hand"},
    {"problems", "fields", "values"},
    {"config"},
    {
        *("preflight_saving", "preflight_launch", "preflight_numbers", "preflight_libraries"),
        "unknown",
    },
    {"preflight"},
    {"shapes"},
    {"probes", "preflight_model"},
    {"loading"},
    {"data"},
    {"preparation"},
    {"parsing", "model", "contents", "pacing", "restore", "saving", "trainer"},
    {"inspection"},
    {"about", "console"},
    {"publishing"},
    {"train", "commands"},
    {"transfer", "checking"},
    {"cli"},
]
PURE = LEVELS[1] - {"noise"}
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in SOURCE.rglob("*.py")
    }


def imports(name: str, path: Path) -> tuple[set[str], set[str]]:
    """The keepstep modules and the outside packages that a module imports."""
    package = name.split(".")[:-1]
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            if node.module:
                inside.add(".".join([*base, node.module]))
            else:
                for alias in node.names:
                    full = ".".join([*base, alias.name])
                    inside.add(full if full in modules() else ".".join([*base, "__init__"]))
    return inside, outside


def test_every_module_has_a_level() -> None:
    assert set(modules()) == set(LEVEL_OF)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_down(name: str) -> None:
    inside, outside = imports(name, modules()[name])
    above = {other for other in inside if LEVEL_OF[other] > LEVEL_OF[name]}
    assert not above, f"{name} imports from above: {above}"
    if name in PURE:
        assert outside <= sys.stdlib_module_names, f"{name} is pure: the standard library alone"


def test_commands_do_not_import_torch() -> None:
    code = "import sys, keepstep.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
