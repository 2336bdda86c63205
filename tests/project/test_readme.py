"""Every command in the README parses, every path in it exists."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.recipe.parse import RecipeParser
from tests.helpers.ranks import ROOT

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/decisions.md",
    "docs/checkpoints.md",
    "docs/elastic.md",
    "docs/json.md",
    "docs/performance.md",
    "docs/preflight.md",
    "docs/publishing.md",
    "docs/trials.md",
    "slurm/README.md",
]
BLOCKS = [
    block
    for document in DOCUMENTS
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
]
COMMANDS = [
    words
    for line in "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]
FIELDS = {action.dest for action in RecipeParser()._actions}


def check_flags(words: list[str]) -> None:
    unknown = {word for word in words if word.startswith("--") and word[2:] not in FIELDS}
    assert not unknown - {"--config"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "keepstep":
        result = CliRunner().invoke(app, [rest[0], "--help"])
        assert result.exit_code == 0
        assert all(flag in result.stdout for flag in rest[1:] if flag.startswith("--"))
    elif program in ("launch/train.sh", "slurm/submit.sh"):
        usage = (ROOT / program).read_text()
        assert (ROOT / rest[0]).is_file()
        check_flags([word for word in rest[1:] if f"#   {word} " not in usage])
    elif program == "cp":
        assert (ROOT / rest[0]).is_file()
    elif program == "python":
        assert importlib.util.find_spec(rest[1])
    elif program == "accelerate":
        module = rest.index("-m")
        assert rest[module + 1] == "keepstep.train"
        assert (ROOT / rest[rest.index("--config_file") + 1]).is_file()
        assert (ROOT / rest[rest.index("--config") + 1]).is_file()
        check_flags(rest[module + 2 :])
    else:
        assert words == ["source", ".venv/bin/activate"], f"no check for {words}"


def test_every_code_is_explained() -> None:
    """And every one that is explained exists."""
    named = set()
    for module in (ROOT / "src/keepstep").rglob("*.py"):
        for call in ast.walk(ast.parse(module.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Problem":
                named |= {k.value.value for k in call.keywords if k.arg == "code"}
                named |= {a.value for a in call.args[2:3] if isinstance(a, ast.Constant)}
    table = (ROOT / "docs/preflight.md").read_text()
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([a-z-]+)`", "".join(rows))) == named | {"field"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_file_tree_names_every_room() -> None:
    text = (ROOT / "README.md").read_text()
    for room in (ROOT / "src/keepstep").glob("*/__init__.py"):
        assert f"{room.parent.name}/ " in text, room


def test_every_test_that_the_trials_name_is_there() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / "docs/trials.md").read_text())
    assert len(named) > 60
    missing = [
        (file, name)
        for file, name in named
        if not (ROOT / file).is_file() or (name and f"def {name}(" not in (ROOT / file).read_text())
    ]
    assert missing == []
