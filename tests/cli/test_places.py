"""Every command that takes a run, of every place that somebody may name in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner, Result

from keepstep.cli.common import RunArgument
from keepstep.cli.main import app
from keepstep.cli.start import PASS_ALL_ON
from keepstep.policy.samples import Sample, lines_of
from tests.cli.test_history import begin, damaged, failed, of_runs, of_stock
from tests.helpers.folders import commit, identify

runner = CliRunner()
# A command → what it is given behind the run, in each of the ways that it is called.
OF_A_RUN: dict[str, list[list[str]]] = {
    "status": [[], ["--json"], ["--field", "state"]],
    "goodput": [[], ["--json"]],
    "samples": [[], ["--json"], ["--step", "5"]],
    "ls": [[], ["--json"], ["--verbose"]],
    "show": [[], ["--json"]],
    "log": [[], ["--json"], ["--said"]],
    "report": [["--out", "page.html"]],
    "which": [[], ["--json"], ["best"]],
    "verify": [[], ["--json"], ["--deep"]],
    "save-now": [[]],
    "stop": [[]],
    "pin": [["10"]],
    "unpin": [["10"]],
    "prune": [[], ["--dry_run"], ["--json"], ["--leftovers"], ["--save_total_limit", "1"]],
    "rm": [["10"], ["10", "--dry_run", "--json"]],
    "push": [["--repo_id", "a/b", "--dry_run"]],
    "sync": [["--mirror", "file:///nowhere"]],
}
OF_A_CHECKPOINT = {
    "export": [["--to", "out"]],
    "reshard": [["--to", "out", "--num_processes", "2"]],
    "evaluate": [["recipe.yaml"]],
}
COMMANDS = [(name, *flags) for name, calls in OF_A_RUN.items() for flags in calls]
LOADING = [(name, *flags) for name, calls in OF_A_CHECKPOINT.items() for flags in calls]
BOTH = ("verify", *OF_A_CHECKPOINT)  # these take a checkpoint's path


def of_checkpoint(place: Path) -> None:
    commit(identify(place.parent), 10).rename(place)


def of_file(place: Path) -> None:
    place.write_text("")


def inside(place: Path) -> None:
    identify(place.parent)
    place.mkdir()


def of_nothing(place: Path) -> None:
    pass


# What lies there, how it is called, and what each command says of it, in the place of an answer.
NO_RUNS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "empty": (Path.mkdir, "there", "there is empty: no run has begun there"),
    "runs": (of_runs, "there", "there is a folder of runs: a, b"),
    "stock": (of_stock, "there", "there is no run of keepstep: a stock Trainer has written "),
    "checkpoint": (of_checkpoint, "run/checkpoint-10", "is a checkpoint: name its run, "),
    "inside": (inside, "run/notes", "run/notes lies in a run's folder, and is no run"),
    "file": (of_file, "there", "there is a file, not a folder"),
    "nowhere": (of_nothing, "there", "there is no folder there"),
}


def invoke(command: tuple[str, ...], place: str) -> Result:
    name, *flags = command
    return runner.invoke(app, [name, place, *flags])


def test_all_commands_are_here() -> None:
    """A new one that takes a run is in the table."""
    takes = set()
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        given = inspect.get_annotations(command.callback, eval_str=True)
        if any(kind is RunArgument or "RUN" in _metavar(kind) for kind in given.values()):
            takes.add(name)
    takes.discard("adopt")  # --into: which may be a new one
    assert takes == {*OF_A_RUN, "evaluate"}
    assert PASS_ALL_ON  # `evaluate` hands on what is behind the recipe


def _metavar(kind: object) -> str:
    return "".join(str(getattr(one, "metavar", None) or "") for one in get_args(kind)[1:])


@pytest.mark.parametrize("command", [*COMMANDS, *LOADING], ids=" ".join)
def test_what_is_no_run_is_told_as_what_it_is(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 2, nothing on stdout that a program could take for an answer, nothing written."""
    told = {}
    for kind, (make, place, words) in NO_RUNS.items():
        here = tmp_path / kind
        (here / place).parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(here)
        make(here / place)
        if kind == "checkpoint" and command[0] in BOTH:
            continue
        before = sorted(here.rglob("*"))
        done = invoke(command, place)
        assert done.exit_code == 2, (kind, done.output)
        assert words in done.output.splitlines()[0], kind
        assert done.output.startswith("keepstep: ")
        assert sorted(here.rglob("*")) == before
        told[kind] = done.output
    assert len(set(told.values())) == len(told)


@pytest.mark.parametrize(
    ("make", "answers"),
    [
        (
            failed,
            {
                "status": (0, "failed (attempt 1, exit status 70)"),
                "goodput": (0, "there: 0 s, 1 attempt"),
                "samples": (0, "no completions yet"),
                "ls": (0, "no checkpoint is committed yet: failed"),
                "show": (0, "failed (attempt 1, exit status 70)"),
                "log": (0, "failed, exit status 70"),
                "report": (0, "there: failed"),
                "which": (1, "auto takes the beginning"),
                "verify": (1, "no checkpoint is committed yet: failed"),
                "save-now": (2, "its last attempt has ended, nobody is at work"),
                "stop": (2, "its last attempt has ended, nobody is at work"),
                "pin": (2, "there has no checkpoint-10"),
                "unpin": (2, "checkpoint-10 is not pinned"),
                "prune": (0, "nothing to prune"),
                "rm": (2, "there has no checkpoint of step 10; there: none"),
                "push": (2, "there has no best checkpoint"),
                "sync": (2, "there: no committed checkpoint"),
                "export": (2, "there is a run: name a checkpoint of it"),
                "reshard": (2, "there is a run: name a checkpoint of it"),
                "evaluate": (2, "there: no committed checkpoint"),
            },
        ),
        (
            damaged,
            {
                "status": (1, "checkpoint-10: "),
                "goodput": (0, "no attempt has begun"),
                "samples": (0, "no completions yet"),
                "ls": (1, "none of 2 checkpoints can be taken; each says why"),
                "show": (1, "checkpoint-10: "),
                "log": (0, "nothing is written down: there is no events.jsonl"),
                "report": (0, "no attempt has begun"),
                "which": (1, "2 checkpoints exist and none is valid"),
                "verify": (1, "checkpoint-10: "),
                "save-now": (2, "no attempt has begun, there is nobody to ask"),
                "stop": (2, "no attempt has begun, there is nobody to ask"),
                "pin": (2, "there has no checkpoint-10"),
                "unpin": (2, "checkpoint-10 is not pinned"),
                "prune": (0, "nothing to prune"),
                "rm": (2, "there has no checkpoint of step 10; there: none"),
                "push": (2, "there has no best checkpoint"),
                "sync": (2, "there: no committed checkpoint"),
                "export": (2, "there is a run: name a checkpoint of it"),
                "reshard": (2, "there is a run: name a checkpoint of it"),
                "evaluate": (2, "there: no committed checkpoint"),
            },
        ),
    ],
    ids=["failed", "damaged"],
)
def test_a_run_without_a_checkpoint(
    make: Callable[[Path], None],
    answers: dict[str, tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "there")
    calls = {**OF_A_RUN, **OF_A_CHECKPOINT}
    assert answers.keys() == calls.keys()
    for name, (status, words) in answers.items():
        done = invoke((name, *calls[name][0]), "there")
        assert (done.exit_code, words in done.output) == (status, True), (name, done.output)


@pytest.mark.parametrize("command", [("verify",), *LOADING], ids=" ".join)
def test_a_checkpoint_that_is_none(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not there, one that is damaged, one of a stock Trainer."""
    monkeypatch.chdir(tmp_path)
    commit(identify(tmp_path / "run"), 10)
    done = invoke(command, "run/checkpoint-20")
    assert done.exit_code == 2
    assert "there is no folder run/checkpoint-20\n    Hint: run has checkpoint-10" in done.output
    (tmp_path / "run/checkpoint-10/manifest.json").write_text("{")
    done = invoke(command, "run/checkpoint-10")
    assert done.exit_code == (1 if command[0] == "verify" else 2), done.output
    assert "checkpoint-10" in done.output
    assert "manifest" in done.output
    of_stock(tmp_path / "stock")
    done = invoke(command, "stock/checkpoint-500")
    assert done.exit_code == 2
    assert "keepstep adopt stock/checkpoint-500 --into" in done.output


def test_a_probe_of_a_place_where_no_run_has_begun_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may ask ahead of the run's begin; what it has found instead is said."""
    monkeypatch.chdir(tmp_path)
    of_runs(tmp_path / "there")
    done = invoke(("status", "--healthy"), "there")
    told = "no attempt is at work here: there is a folder of runs: a, b\n"
    assert (done.exit_code, done.stdout) == (0, told)


def test_completions_that_are_not_there(tmp_path: Path) -> None:
    """Of a step that is not there, exit status 1; of none at all, why."""
    begin(tmp_path, recipe={"sample_prompts": None})
    told = "no completions: its recipe has no sample_prompts"
    assert told in invoke(("samples",), str(tmp_path)).output
    sample = Sample(5, 1, "2 + 2 =", "4", None)
    (tmp_path / "samples.jsonl").write_text("\n".join(lines_of([sample], 1, "now")))
    assert invoke(("samples", "--step", "5"), str(tmp_path)).exit_code == 0
    done = invoke(("samples", "--step", "6"), str(tmp_path))
    assert (done.exit_code, "there are some of the steps 5" in done.output) == (1, True)
    done = invoke(("samples", "--step", "6", "--json"), str(tmp_path))
    assert (done.exit_code, done.stdout) == (1, "[]\n")
