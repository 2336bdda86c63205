"""Every command in the documents parses, every path and link in them leads somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from benchmarks.gpu.__main__ import parse as arguments_of_gpu
from torch.distributed.run import get_args_parser

from keepstep.cli.main import app
from keepstep.recipe.parse import RecipeParser
from tests.helpers.ranks import ROOT
from tests.project.documents import DOCUMENTS, Block, anchors, blocks, commands, text_of

FIELDS = {action.dest for action in RecipeParser()._actions}
KEEPSTEP = typer.main.get_command(app)
# British spellings of words that the code spells in American English.
BRITISH = r"(?i)\b\w*(?:isation|(?:recogn|organ|token|normal|initial)is(?:e|ed|es|ing)\b|"
BRITISH += r"(?:neighb|hon|col|behavi|fav)our)\w*"


def check_flags(words: list[str]) -> None:
    unknown = {word for word in words if word.startswith("--") and word[2:] not in FIELDS}
    assert not unknown - {"--config"}


def check_run(words: list[str]) -> None:
    """What follows the launcher's own arguments: `-m keepstep.train …`, or a script."""
    if words[0] == "keepstep.train":
        assert (ROOT / words[words.index("--config") + 1]).is_file()
        check_flags(words[1:])
    else:
        assert words[0].endswith(".py"), words


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(words: list[str]) -> None:
    program, *rest = words
    if program == "make":
        subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "keepstep":
        command, arguments = KEEPSTEP, rest
        while arguments and (inner := getattr(command, "commands", {}).get(arguments[0])):
            command, arguments = inner, arguments[1:]
        assert command is not KEEPSTEP, f"there is no command {rest[0]}"
        command.make_context(rest[0], list(arguments))  # its own parser: it raises
        if command.context_settings.get("allow_extra_args"):  # a recipe's fields
            own = {option for p in command.params for option in p.opts}
            check_flags([w for w in arguments if w not in own])
    elif program in ("launch/train.sh", "slurm/submit.sh"):
        usage = (ROOT / program).read_text()
        assert (ROOT / rest[0]).is_file()
        check_flags([word for word in rest[1:] if f"#   {word} " not in usage])
    elif program == "benchmarks/gpu.sh":
        if rest[0] != "wheels":
            arguments_of_gpu(rest)
        assert rest[2:] in ([], ["quantization"]) or rest[0] != "wheels"
    elif program == "cp":
        assert (ROOT / rest[0]).is_file()
    elif program == "python":
        if rest[0] == "-m":
            assert importlib.util.find_spec(rest[1])
        elif rest[0] != "script.py":  # a person's own
            text = (ROOT / rest[0]).read_text()
            assert [w for w in rest if w.startswith("--") and f'"{w}"' not in text] == []
    elif program == "accelerate":
        assert rest[0] == "launch"
        asked = launch_command_parser().parse_args(rest[1:])
        config = asked.config_file or ""
        name = re.fullmatch(r"\$\(keepstep config (\w+)\)", config)
        config = f"accelerate_configs/{name[1]}.yaml" if name else config
        assert not config or (ROOT / config).is_file()
        check_run([asked.training_script, *asked.training_script_args])
    elif program == "torchrun":
        asked = get_args_parser().parse_args(rest)
        check_run([asked.training_script, *asked.training_script_args])
    else:
        assert words == ["source", ".venv/bin/activate"], f"no check for {words}"


def test_every_shell_block_is_bash() -> None:
    """And bash finds no mistake in it."""
    assert blocks("sh", "shell", "console", "zsh") == []
    for block in blocks("bash"):
        done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
        assert done.returncode == 0, f"{block}: {done.stderr}"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_recipe_is_one(block: Block) -> None:
    """Its fields, at least: a part of a recipe is one."""
    assert sorted(yaml.safe_load(block.text).keys() - FIELDS) == []


def test_every_code_is_explained() -> None:
    """And every one that is explained exists."""
    named = set()
    for module in (ROOT / "src/keepstep").rglob("*.py"):
        for call in ast.walk(ast.parse(module.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Problem":
                named |= {ast.literal_eval(k.value) for k in call.keywords if k.arg == "code"}
                named |= {a.value for a in call.args[2:3] if isinstance(a, ast.Constant)}
    table = (ROOT / "docs/preflight.md").read_text()
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([a-z-]+)`", "".join(rows))) == named | {"field"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = path.parent / file if file else path
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_one_spelling(document: str) -> None:
    assert re.findall(BRITISH, text_of(document)) == []


def test_every_document_is_named_in_the_readme() -> None:
    text = text_of("README.md")
    missing = [d for d in DOCUMENTS if d.startswith("docs/") and f"({d})" not in text]
    assert missing == [], "README.md, `Where to go next`, does not name these"


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


def test_every_guarantee_names_its_tests() -> None:
    table = text_of("docs/guarantees.md").split("## Tested with")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    assert [row for row in rows if "](../tests/" not in row.split("|")[-2]] == []


def test_decisions_are_numbered() -> None:
    """Rising, by date, and without a word about files that are not in the repository."""
    text = text_of("docs/decisions.md")
    heads = re.findall(r"^\*\*(\d+)\. (\d{4}-\d\d-\d\d), \S", text, re.M)
    numbers = [int(number) for number, _ in heads]
    assert numbers == sorted(set(numbers))
    assert [date for _, date in heads] == sorted(date for _, date in heads)
    assert len(heads) == len(re.findall(r"^\*\*", text, re.M))
    tops = [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    there = {path.name for top in tops for path in (top, *top.rglob("*"))}
    named = set(re.findall(r"\b([\w-]+\.(?:md|py|sh|yaml|toml))\b", text))
    assert named - there <= {"zero_to_fp32.py", "engine.py"}  # DeepSpeed's own
