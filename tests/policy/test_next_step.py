"""What a batch job does next, case by case; no job, no shell."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy import next_step
from keepstep.policy.next_step import (
    Ended,
    Next,
    Situation,
    advice,
    after_attempt,
    for_nodes,
    fruitless_after,
    how_it_ended,
    may_claim,
    told_by_nodes,
    when_requeue_failed,
    when_unwritable,
)
from keepstep.ranks.outcome import CONFIG_EXIT_STATUS, EXIT_STATUS
from tests.helpers.ranks import ROOT

TOKEN = "7.0.1"
PREEMPTED = Ended("preempted", "SIGTERM to rank 0", 75, True)
FAILED = Ended("failed", "exit status 1", 1, True)
ALL = ", ".join(f"SIGTERM to rank {rank}" for rank in range(4))
USR1 = ALL.replace("TERM", "USR1")
FOUR = Situation(processes=4)


def test_the_exit_statuses_are_those_of_the_run() -> None:
    """The module repeats them: it imports nothing of keepstep."""
    assert set(next_step.OUTCOMES) == EXIT_STATUS.keys()
    assert EXIT_STATUS["preempted"] == next_step.STOPPED
    assert EXIT_STATUS["no_progress"] == next_step.GIVEN_UP
    assert EXIT_STATUS["failed"] == next_step.NOT_PUBLISHED
    assert CONFIG_EXIT_STATUS == next_step.WRONG_RECIPE


STANDARD = {
    "contextlib",
    "json",
    "os",
    "re",
    "shutil",
    "signal",
    "stat",
    "subprocess",
    "sys",
    "time",
}
STANDARD |= {"traceback", "typing"}
PROGRAM = [ROOT / "src/keepstep/policy/next_step.py", *sorted(ROOT.glob("slurm/*.py"))]


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: path.name)
def test_any_python_of_a_node_can_read_it(path: Path) -> None:
    """A copy in the job's folder is run by the node's own, where the environment is elsewhere."""
    tree = ast.parse(path.read_text(), feature_version=(3, 6))
    imports = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    own = {path.stem for path in PROGRAM}
    assert imports <= own | STANDARD
    assert not own & set(sys.stdlib_module_names), "a name that Python's own library has"
    assert "__future__" not in imports, "annotations of 3.7"


def said(**fields: Any) -> dict[str, Any]:
    return {"owner": TOKEN, "outcome": "finished", "reason": None, "exit": 0} | fields


@pytest.mark.parametrize(
    ("said", "exit_status", "told", "expected"),
    [
        (said(), 143, -1, Ended("finished", "exit status 0", 0, True)),
        (said(outcome="failed", exit=2), 1, -1, Ended("recipe", "exit status 2", 2, True)),
        (said(outcome="preempted", reason="r", exit=75), 1, -1, Ended("preempted", "r", 75, True)),
        (said(outcome="rewound", reason="r", exit=75), 1, -1, Ended("rewound", "r", 75, True)),
        # Of an earlier attempt, or unreadable.
        (
            said(owner="7.0.0"),
            0,
            -1,
            Ended("failed", "exit status 0, before the run began", 0, False),
        ),
        ({}, 0, -1, Ended("failed", "exit status 0, before the run began", 0, False)),
        ({}, 143, 2, Ended("recipe", f"the recipe is wrong: see logs/{TOKEN}.log", 2, False)),
        ({}, 75, -1, Ended("preempted", "stopped before the run began", 75, False)),
        ({}, 2, 75, Ended("preempted", "stopped before the run began", 75, False)),
        # What nobody has written.
        (said(exit="a[$(touch x)]"), 1, -1, Ended("failed", "exit status 1", 1, True)),
        (said(exit=True), 0, -1, Ended("failed", "exit status 1", 1, True)),
        (said(exit=256), 9, -1, Ended("failed", "exit status 9", 9, True)),
        (said(outcome="Finished"), 0, -1, Ended("failed", "exit status 0", 0, True)),
        (said(outcome=["finished"]), 0, -1, Ended("failed", "exit status 0", 0, True)),
        (said(owner=None), 1, -1, Ended("failed", "exit status 1, before the run began", 1, False)),
        (
            said(outcome="failed", reason={}, exit=70),
            1,
            -1,
            Ended("failed", "exit status 70", 70, True),
        ),
    ],
)
def test_how_it_ended(said: dict[str, Any], exit_status: int, told: int, expected: Ended) -> None:
    assert how_it_ended(said, TOKEN, exit_status, told) == expected


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([-1, -1], -1),
        ([75, 75], 75),
        ([75, -1], 1),  # the other was killed, or its site's setup has failed
        ([-1, 75, 70], 70),
        ([75, 2], 2),
    ],
)
def test_what_nodes_tell(told: list[int], expected: int) -> None:
    assert told_by_nodes(told) == expected


def test_one_that_was_killed_had_begun() -> None:
    killed = how_it_ended({}, TOKEN, 137, was_alive=True)
    assert killed == Ended("failed", "exit status 137, without a word of its end", 137, False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner),
    max_leaves=3,
)


@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("owner", "outcome", "reason", "exit"), json_values)
    ),
    st.integers(0, 255),
)
def test_only_the_word_finished_is_a_success(said: dict[str, Any], exit_status: int) -> None:
    """Whatever else stands in the file; and every answer is one that the job's shell can act on."""
    ended = how_it_ended(said, TOKEN, exit_status)
    is_told = said.get("owner") == TOKEN and said.get("outcome") == "finished"
    assert is_told or ended.outcome != "finished"
    step = after_attempt(ended, FOUR)
    assert 0 <= step.exit <= 255
    assert step.exit != 0 or step.action != "stop" or ended.outcome == "finished"


@pytest.mark.parametrize(
    ("ended", "seen", "expected"),
    [
        (Ended("finished", "", 0, True), Situation(stop="time"), Next("stop", "finished", 0)),
        (Ended("finished", "", 70, True), Situation(), Next("stop", "finished", 70)),
        (
            Ended("recipe", "", 2, True),
            Situation(),
            Next("stop", "the same command would fail again: see above", 2),
        ),
        (Ended("no_progress", "", 76, True), FOUR, Next("stop", "no progress: see above", 76)),
        (FAILED, Situation(stop="term"), Next("stop", "Slurm has ended the job", 143)),
        (FAILED, Situation(stop="time"), Next("requeue", "the time is over")),
        (FAILED, Situation(stop_requested=True), Next("stop", "stopped on request", 75)),
        # Who has asked for an end does not want it queued again.
        (FAILED, Situation("time", stop_requested=True), Next("stop", "stopped on request", 75)),
        (PREEMPTED._replace(reason="the deadline"), FOUR, Next("requeue", "the time is over")),
        (FAILED._replace(reason="the deadline"), FOUR, Next("ask-slurm")),
        (PREEMPTED._replace(reason="keepstep stop"), FOUR, Next("stop", "stopped on request", 75)),
        (FAILED, Situation(preempted="yes"), Next("requeue", "preempted by another job")),
        (PREEMPTED, Situation(preempted="no", processes=4), Next("launch")),
        (
            FAILED,
            Situation(preempted="no", fruitless=3, retry_seconds=10),
            Next("launch", pause=15),
        ),
        (PREEMPTED._replace(reason=ALL), FOUR._replace(preempted="no"), Next("ask-nodes")),
        (
            PREEMPTED._replace(reason=ALL),
            FOUR._replace(preempted="no", nodes_answer="yes"),
            Next("stop", f"stopped on request: {ALL}", 75),
        ),
        (
            PREEMPTED._replace(reason=ALL),
            FOUR._replace(preempted="no", nodes_answer="no"),
            Next("launch"),
        ),
        (
            PREEMPTED._replace(reason=USR1),
            FOUR._replace(preempted="no", nodes_answer="yes"),
            Next("requeue", USR1),
        ),
        (
            PREEMPTED._replace(reason="stopped before the run began"),
            FOUR._replace(preempted="no"),
            Next("ask-nodes"),
        ),
        (
            Ended("preempted", "stopped before the run began", 75, False),
            FOUR._replace(preempted="no", requeued=True),
            Next("launch", "a signal for a step of an earlier round: once more"),
        ),
        (
            PREEMPTED._replace(reason=ALL),
            FOUR._replace(preempted="no", requeued=True),
            Next("launch", "a signal for a step of an earlier round: once more"),
        ),
        (
            PREEMPTED._replace(reason="keepstep stop"),
            FOUR._replace(preempted="no", requeued=True),
            Next("stop", "stopped on request", 75),
        ),
        (
            PREEMPTED._replace(reason=f"{ALL} (its launcher is gone)"),
            FOUR._replace(preempted="no"),
            Next("launch"),
        ),
    ],
)
def test_after_an_attempt(ended: Ended, seen: Situation, expected: Next) -> None:
    assert after_attempt(ended, seen) == expected


def test_a_run_that_goes_back_is_launched_at_once() -> None:
    """Unless somebody has asked for something else, or nothing comes of it."""
    rewound = Ended("rewound", "the loss is not finite", 75, True)
    told = "going back: the loss is not finite"
    assert after_attempt(rewound, Situation(fruitless=9)) == Next("launch", told)
    assert after_attempt(rewound, Situation(stop="time")).action == "requeue"
    assert after_attempt(rewound, Situation(stop_requested=True)).action == "stop"
    assert after_attempt(rewound, Situation(fruitless=10, preempted="no")).action == "give-up"
    assert "from before the step" in advice("rewound", 75)


def test_what_a_run_that_is_trained_lacks_is_not_guessed() -> None:
    """Status 70 of a finished run is of the Hub or of the mirror; the reason says which."""
    told = advice("finished", 70)
    assert "`keepstep push`" in told
    assert "`keepstep sync`" in told


def test_the_budget_ends_requeues_and_attempts_alike() -> None:
    spent = Situation(fruitless=3, max_attempts=3, preempted="no")
    given_up = Next("give-up", "3 attempts in a row without a new checkpoint", 76)
    assert after_attempt(FAILED, spent) == given_up
    assert after_attempt(FAILED, spent._replace(stop="time")) == given_up
    assert for_nodes([], 2, 1, 9, 9, spent) == given_up
    assert after_attempt(FAILED, spent._replace(stop="term")).exit == 143, "the job is Slurm's"
    assert (fruitless_after(2, 5, 6), fruitless_after(2, 5, 5), fruitless_after(2, 5, 0)) == (
        0,
        3,
        3,
    )


def test_before_an_attempt() -> None:
    seen = Situation()
    assert for_nodes(["n1"], 2, 1, 0, 9, seen) == Next("launch")
    waiting = for_nodes(["n1"], 2, 2, 8, 9, seen)
    assert waiting == Next("wait", "1 of 2 nodes answer (n1), 2 are needed: waiting")
    assert for_nodes(["n1"], 2, 2, 9, 9, seen) == Next("requeue", "nodes are missing")
    assert for_nodes(["n1"], 2, 1, 0, 9, Situation(stop_requested=True)).exit == 75
    assert for_nodes(["n1"], 2, 1, 0, 9, Situation(stop="time")).action == "requeue"


def test_a_folder_that_takes_no_file() -> None:
    waits = when_unwritable("/run", 0, 9, Situation(retry_seconds=5))
    assert waits == Next("wait", "nothing can be written in /run: waiting", pause=5)
    assert when_unwritable("/run", 9, 9, Situation()).action == "requeue"
    assert when_unwritable("/run", 9, 9, Situation(fruitless=10)).action == "give-up"
    assert when_unwritable("/run", 0, 9, Situation(stop="term")).exit == 143


@pytest.mark.parametrize(
    ("theirs", "mine", "may"),
    [
        ("", "7.0.1", True),
        ("7.0.1", "7.0.2", True),
        ("7.1.1", "7.0.9", False),
        ("7.0.10", "7.0.9", False),
        ("6.3.9", "7.0.1", True),
        ("6.3.9", "7.0.2", False),
        ("8.0.1", "7.1.1", False),
        ("", "7.3.2", True),
        ("$(x)", "7.0.1", True),
        ("$(x)", "7.1.1", False),
        ("7.08.09", "7.9.1", True),
        ("7." + "9" * 5000 + ".1", "7.9.1", False),
    ],
)
def test_who_may_claim_the_run(theirs: str, mine: str, may: bool) -> None:
    assert may_claim(theirs, mine) == may


def test_a_requeue_that_is_never_accepted() -> None:
    refused = when_requeue_failed("Requested operation is presently disabled")
    assert refused == Next("stop", "this job cannot be queued again", 75)
    assert when_requeue_failed("Unable to contact slurm controller") == Next("wait")


# --- slurm/files.py: what it reads of the run folder


def ended(run: Path, exit_status: int, known: int) -> tuple[Ended, int]:
    """How an attempt ended, and how many commits are known, by the Python that a job has."""
    command = [sys.executable, "-BEsS", "-c", ENDED, str(run), str(exit_status), str(known)]
    paths = [str(ROOT / "slurm"), str(ROOT / "src/keepstep/policy")]
    *fields, commits = json.loads(subprocess.check_output([*command, *paths], timeout=300))
    return Ended(*fields), commits


ENDED = """
import json, sys
run, status, known, *sys.path[:0] = sys.argv[1:]
from files import Files
files = Files(run, run + "/logs", run, print)
print(json.dumps([*files.ended("7.0.1", int(status)), files.commits(int(known))]))
"""
FINISHED = '{"outcome": "finished", "reason": null, "exit": 0, "owner": "7.0.1"}'


@pytest.fixture
def private(tmp_path: Path) -> Path:
    (tmp_path / ".keepstep").mkdir()
    (tmp_path / "logs").mkdir()
    return tmp_path / ".keepstep"


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (FINISHED, "finished"),
        (FINISHED[:-1], "failed"),
        (FINISHED[:-1] + ', "outcome": "finished"}', "failed"),
        (f"[{FINISHED}]", "failed"),
        ("[" * 100_000, "failed"),
        ('{"exit": ' + "9" * 10_000 + "}", "failed"),
        (FINISHED + " " * 2**20, "failed"),
        ("\udcff", "failed"),
    ],
)
def test_a_status_file_that_nobody_has_written(private: Path, text: str, outcome: str) -> None:
    (private / "status.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (private.parent / "logs/7.0.1.exit").write_text("$(x)\n")
    told, commits = ended(private.parent, 1, known=4)
    assert told.outcome == outcome
    assert commits == 4, "no log of events: no progress is known"


def test_a_reason_is_one_line(private: Path) -> None:
    (private / "status.json").write_text(
        FINISHED.replace("null", '"a\\n.\\u001b[2J\\ud800' + "x" * 5000 + '"')
    )
    (private / "events.jsonl").write_text('{"event": "commit"}\n' * 6)
    told, commits = ended(private.parent, 1, known=4)
    assert told.reason.startswith("a . [2J ")
    assert len(told.reason) == 400
    assert (told.exit, told.has_begun, commits) == (0, True, 6)
