"""What every command says of itself: it is understood without having read the rest."""

from __future__ import annotations

import itertools
import re
import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from keepstep.cli.main import EXIT_STATUSES, app

runner = CliRunner()
KEEPSTEP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = KEEPSTEP.commands
# Options that the scripts behind these commands take apart themselves.
OF_SCRIPTS = {
    "submit": {"--nodes", "--gpus-per-node", "--time", "--runs", "--at_most", "--dry_run"}
}


ALL = [("", KEEPSTEP), *COMMANDS.items()]
PARAMETERS = [(name, parameter) for name, command in ALL for parameter in command.params]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_summary_is_one_whole_sentence(name: str) -> None:
    summary = COMMANDS[name].help
    assert re.fullmatch(r"[A-Z][a-z]+ [^\n]{15,100}\.", summary), summary
    assert runner.invoke(app, ["--help"]).stdout.count(f"│ {name} ") == 1


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS, ids=str)
def test_each_argument_and_option_is_explained(name: str, parameter: Any) -> None:
    if not parameter.hidden:
        assert re.fullmatch(r"[A-Za-z][^\n]{10,}\.", parameter.help), parameter.help


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS, ids=str)
def test_options_are_spelled_alike(name: str, parameter: Any) -> None:
    """With underscores, as the fields of a recipe; a dash is taken for one."""
    for option in [*parameter.opts, *parameter.secondary_opts]:
        assert "-" not in option.lstrip("-"), option


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands(name: str) -> None:
    """The command's own parser takes them."""
    title, *examples = COMMANDS[name].epilog.split("\n\n")
    assert title == ("Example:" if len(examples) == 1 else "Examples:")
    own = [example for example in examples if f"keepstep {name}" in example]
    assert own
    for example in own:
        if "$(" in example:
            continue
        words = shlex.split(example.rpartition("&& ")[2])
        words = words[words.index("keepstep") + 1 :]
        words = list(itertools.takewhile(lambda word: word not in (">", ">>"), words))
        assert words[0] == name
        COMMANDS[name].make_context(name, words[1:])
        known = {option for p in COMMANDS[name].params for option in p.opts}
        if name in OF_SCRIPTS:
            flags = {word for word in words[1:] if word.startswith("--")}
            assert flags <= known | OF_SCRIPTS[name]


def test_dashes_are_taken_for_underscores() -> None:
    """Also where a command takes a recipe's fields, and in a command's name."""
    for command, words in {
        "prune": ["run", "--dry-run"],
        "push": ["run", "--repo-id", "a/b", "--dry_run"],
        "check": ["r.yaml", "--num-processes", "3", "--learning-rate", "1"],
        "export": ["c", "--to", "d", "--max-shard-size", "1GB", "--merge-adapter"],
    }.items():
        context = COMMANDS[command].make_context(
            command, words, parent=KEEPSTEP.make_context("", ["ls"])
        )
        taken = context.params
        if command == "check":
            assert taken["num_processes"] == 3
            assert context.args == ["--learning-rate", "1"]
        else:
            assert taken.get("dry_run", True)
    told = runner.invoke(app, ["save_now", "/nowhere"])
    assert (told.exit_code, told.stdout) == (2, "keepstep: there is no folder /nowhere\n")


def test_exit_statuses_are_told() -> None:
    told = " ".join(runner.invoke(app, ["--help"]).stdout.split())
    for line in EXIT_STATUSES:
        assert line in told
