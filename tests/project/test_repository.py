"""What stands around the code: version, workflows, hooks, and what is said of security."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

import keepstep
from tests.helpers.ranks import ROOT
from tests.project.documents import text_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = [ROOT / ".pre-commit-config.yaml", *sorted((ROOT / ".github").rglob("*.yml"))]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def scripts() -> list[str]:
    """What the workflows run."""
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    jobs = [job for path in workflows for job in load(path)["jobs"].values()]
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_the_version_has_one_source() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "src/keepstep/__init__.py"}
    assert str(Version(keepstep.__version__)) == keepstep.__version__


def test_the_changelog_begins_with_this_version() -> None:
    """In sections of their own names."""
    text = text_of("CHANGELOG.md")
    heads = re.findall(r"^## (.+)$", text, re.M)
    assert Version(keepstep.__version__).base_version in heads[0]
    assert set(re.findall(r"^### (\w+)$", text, re.M)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_yaml_is_read(path: Path) -> None:
    assert load(path)


def test_issue_forms_have_what_github_asks_for() -> None:
    forms = [load(p) for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")]
    forms = [form for form in forms if "body" in form]
    assert len(forms) >= 2
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        asked = [element for element in form["body"] if element["type"] != "markdown"]
        assert len({element["id"] for element in asked}) == len(asked)
        assert all(element["attributes"]["label"] for element in asked)


def test_workflows_run_what_is_there() -> None:
    text = "\n".join(scripts())
    assert ".ci/run" in text
    for target in re.findall(r"\bmake ([\w-]+)", text):
        known = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True)
        assert known.returncode == 0, target
    for script in scripts():
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_hooks_are_the_checks_of_make_check() -> None:
    """Tools that are installed, and all of those that `make check` runs."""
    hooks = [hook for repo in load(FILES[0])["repos"] for hook in repo["hooks"]]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    makefile = (ROOT / "Makefile").read_text()
    (check,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", makefile, re.M)
    assert tools == set(re.findall(r"\$\(BIN\)/([\w-]+)", check))
    folder = Path(sys.executable).parent
    assert all(shutil.which(tool, path=str(folder)) for tool in tools)


def test_types_are_checked_in_every_file() -> None:
    """Of tests and programs as well: a call with something of another type is not left to CI."""
    config = PROJECT["tool"]["mypy"]
    known = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.check_output(known, cwd=ROOT, text=True).split()
    assert len(listed) > 600
    outside = [p for p in listed if not p.startswith(tuple(f"{f}/" for f in config["files"]))]
    assert outside == []
    settings = [config, *config["overrides"]]
    off = {code for some in settings for code in some.get("disable_error_code", [])}
    assert off == {"import-untyped", "union-attr", "var-annotated"}
    weak = {"ignore_errors", "check_untyped_defs", "exclude"}
    assert config["strict"]
    assert not any(weak & some.keys() for some in settings)


def test_what_is_unpickled_is_what_security_says() -> None:
    """DeepSpeed's shards, in `sharding/`, what ranks send each other, and nothing else."""
    unsafe = r"weights_only=False|\bpickle\.loads?\(|\bUnpickler\(|yaml\.(?:unsafe_|full_)?load\("
    found = {
        path.relative_to(ROOT / "src/keepstep").parts[0]
        for path in (ROOT / "src/keepstep").rglob("*.py")
        if re.search(unsafe, path.read_text())
    }
    assert found == {"ranks", "sharding"}
    for name in ("export", "push", "reshard", "adopt"):
        assert f"`keepstep {name}`" in text_of("SECURITY.md")
