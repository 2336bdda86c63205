"""Two options of a command: both count, or the pair is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.samples import Sample, lines_of
from tests.cli.test_history import begin
from tests.helpers.folders import commit

runner = CliRunner()
LOOKING = ("status", "goodput", "samples", "ls", "show", "log", "which", "verify", "prune", "rm")
BEHIND = {"prune": ["--dry_run"], "rm": ["10", "--dry_run"]}  # nothing goes
ENDLESS = {"--watch", "--follow"}
VALUES = {  # of options that take one: something that makes a difference
    "--field": "state",
    "--mtbf_hours": "1",
    "--num_processes": "3",
    "--number": "1",
    "--step": "10",
    "--attempt": "1",
    "--save_total_limit": "1",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two attempts, three checkpoints, of which one is damaged in its bytes, completions."""
    for number in (1, 2):
        writer = begin(tmp_path)
        writer.record("resume", request="auto", step=None)
        (writer.run.launched / f"{number}.log").write_text(f"words of {number}\n")
    for step in (10, 20, 30):
        commit(tmp_path, step, run_id=writer.run.run_id(), attempt=2)
        writer.record("commit", step=step, stall=1.0, write=1.0, bytes=10)
    (tmp_path / "checkpoint-10/rng_state_0.pth").write_bytes(b"x" * 520)
    answers = [Sample(step, number, "ask", "told", None) for step in (10, 20) for number in (1, 2)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines_of(answers, 1, "now")))
    facts = {"reason": "x", "global_step": 30, "best_step": None}
    writer.end({"outcome": "failed", **facts, "exit": 70})
    (tmp_path / ".keepstep/quarantine/2/checkpoint-5").mkdir(parents=True)
    (tmp_path / ".keepstep/quarantine/2/checkpoint-5/x").write_text("x")
    return tmp_path


def options_of(command: str) -> list[list[str]]:
    """Each as it is given; a switch of two names by its first."""
    found = []
    for option in typer.main.get_command(app).commands[command].params:  # type: ignore[attr-defined]
        name = option.opts[0]
        if option.param_type_name != "option" or name in ("--help", "--dry_run"):
            continue
        found.append([name] if option.is_flag else [name, VALUES[name]])
    return [given for given in found if given[0] not in ENDLESS]


@pytest.mark.parametrize("command", LOOKING)
def test_no_option_is_silently_ignored_beside_another(command: str, run: Path) -> None:
    def answer(*given: str) -> tuple[int, str]:
        done = runner.invoke(app, [command, str(run), *BEHIND.get(command, []), *given])
        assert done.exit_code in (0, 1, 2), done.output
        return done.exit_code, done.output

    plain, options = answer(), options_of(command)
    alone = {one[0]: answer(*one) for one in options}
    for first, second in itertools.permutations(options, 2):
        both = answer(*first, *second)
        if both[0] == 2:
            continue
        counts = alone[second[0]] not in (plain, (2, alone[second[0]][1]))
        assert not counts or both != alone[first[0]], (first, second)


@pytest.mark.parametrize(
    "given",
    [
        ["status", "RUN", "--healthy", "--json"],
        ["status", "RUN", "--healthy", "--field", "state"],
        ["status", "RUN", "--json", "--field", "state"],
        ["ls", "RUN", "--verbose", "--json"],
        ["ls", "RUN", "--mtbf_hours", "2"],
        ["log", "RUN", "--said", "--follow"],
        ["export", "RUN/checkpoint-10", "--to", "out", "--json"],
    ],
    ids=" ".join,
)
def test_pairs_that_are_refused(given: list[str], run: Path) -> None:
    done = runner.invoke(app, [text.replace("RUN", str(run)) for text in given])
    assert done.exit_code == 2
    assert done.output.startswith("keepstep: --")
    assert "--json" not in given or done.stdout == ""
