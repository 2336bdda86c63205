"""What is imported is declared, what is declared is imported, and every bound holds a pin."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions

from packaging.requirements import Requirement

from tests.helpers import versions
from tests.helpers.ranks import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

CHOSEN = {"trackio", "wandb"}  # by `report_to`: imported where their callbacks have been


def normal(name: str) -> str:
    """A distribution's name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[<>=! \[]", requirement)[0]) for requirement in requirements}


def imported() -> dict[str, str]:
    """Third-party packages that src/ imports, anywhere in a file → a file that does."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [str(node.module)]
            found |= {module.split(".")[0]: path.name for module in modules}
    own = {*sys.stdlib_module_names, "keepstep"}
    return {package: file for package, file in found.items() if package not in own | CHOSEN}


def test_every_import_is_declared_and_every_dependency_is_imported() -> None:
    """What comes along with another library today may not tomorrow."""
    providers = packages_distributions()
    used = {package: {normal(n) for n in providers[package]} for package in imported()}
    declared = names_of(PROJECT["dependencies"])
    assert {p: imported()[p] for p, names in used.items() if not names & declared} == {}
    assert declared - set().union(*used.values()) == set()


def test_every_dependency_has_a_lower_bound_and_a_pin_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normal(n): v for n, v in (line.split("==") for line in lines if "==" in line)}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert any(s.operator == ">=" for s in requirement.specifier), text
        assert requirement.specifier.contains(pins[normal(requirement.name)]), text
    assert names_of(PROJECT["optional-dependencies"]["dev"]) <= pins.keys()


def closure(name: str, found: set[str]) -> set[str]:
    """All that comes along with a distribution here, without extras."""
    if normal(name) not in found:
        found.add(normal(name))
        for requirement in map(Requirement, distribution(name).requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                closure(requirement.name, found)
    return found


def test_what_comes_along_has_a_pin() -> None:
    """Else an image of tomorrow holds what no test has seen. (What torch needs on CUDA it pins
    itself, but for these three.)"""
    pins = {normal(name) for name in versions.pins((ROOT / "constraints.txt").read_text())}
    needed = closure("keepstep", set()) - {"keepstep"}
    needed |= {"cuda-bindings", "cuda-pathfinder", "nvidia-nvjitlink"}
    assert needed - pins == set()


def test_what_builds_has_a_pin() -> None:
    """keepstep's own backend with what comes along, and setuptools with wheel: DeepSpeed comes as
    its source, without a pyproject.toml."""
    pins = {normal(name) for name in versions.pins((ROOT / "constraints.txt").read_text())}
    needed = {"editables", "setuptools", "wheel"}  # the first: hatchling's, for `-e`
    for requirement in PYPROJECT["build-system"]["requires"]:
        closure(Requirement(requirement).name, needed)
    assert needed - pins == set()


def test_the_oldest_versions_that_are_tried_are_the_lower_bounds() -> None:
    """`make compat-oldest` tries what pyproject.toml promises."""
    assert versions.pins(versions.OLDEST.read_text()) == versions.lower_bounds()


def test_a_run_with_other_versions_is_none() -> None:
    """Here the pinned ones are installed: allowed, but not the oldest."""
    assert list(versions.faults("newest")) == []
    found = list(versions.faults("oldest"))
    assert any(f.startswith("transformers 5.") and "is to be tried" in f for f in found)
