"""What a run's wall time went into: the parts are the whole, and nothing is made up."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.policy.goodput import Goodput, goodput
from keepstep.policy.lineage import Spent
from keepstep.policy.strict import with_check
from keepstep.run_folder.events import attempts_of, believed, read_lines

T0 = datetime(2026, 11, 27, 5, 0, tzinfo=UTC).timestamp()


def line(at: float, attempt: int, event: str, /, **facts: Any) -> str:
    time = datetime.fromtimestamp(T0 + at, UTC).isoformat(timespec="milliseconds")
    return with_check(json.dumps({"time": time, "attempt": attempt, "event": event, **facts}))


def stamp(at: float) -> str:
    return datetime.fromtimestamp(T0 + at, UTC).isoformat(timespec="milliseconds")


# Attempt 1: 5 s of start-up before its line, 10 s until its first step, a step a second; killed in
# step 38, 30 is saved. Launched again 20 s later on other processes: from 30 to 60, with an
# evaluation, then finished.
FIRST = [
    line(5, 1, "attempt", run_id="r", spent={"startup": 5.0}),
    line(8, 1, "resume", request="auto", step=None),
    line(9, 1, "training"),
    line(11, 1, "first_step", step=1, seconds={}),
    line(41, 1, "commit", step=30, parent=None, spent={"startup": 10.0, "step": 30.0}),
]
SECOND = [
    line(75, 2, "attempt", run_id="r", spent={"startup": 6.0}),
    line(
        *(75, 2, "heard"),
        of=1,
        at=stamp(49.0),
        step=37,
        spent={"startup": 10, "step": 38, "save": 1},
    ),
    line(76, 2, "resume", request="auto", step=30),
    line(78, 2, "training"),
    line(
        *(113, 2, "commit"),
        step=60,
        parent=30,
        spent={"startup": 8.0, "restore": 2.0, "reshard": 1.0, "step": 30.0, "evaluation": 2.0},
    ),
    line(114, 2, "finished", step=60, newest=60, plan={}),
    line(
        *(115, 2, "end"),
        outcome="finished",
        global_step=60,
        exit=0,
        spent={
            **{"startup": 8.0, "restore": 2.0, "reshard": 1.0, "step": 30.0, "evaluation": 2.0},
            **{"save": 0.5, "ending": 2.5},
        },
    ),
]
LINES = FIRST + SECOND


def of(lines: list[str], **known: Any) -> Goodput:
    events, damaged = read_lines("\n".join(lines))
    return goodput(attempts_of(believed(events, damaged, [])[0]), **known)


def in_seconds(found: Goodput) -> dict[str, float]:
    assert sum(found.parts.values()) == found.wall
    assert all(part >= 0 for part in found.parts.values())
    assert sum(round(10 * share) for share in found.shares().values()) in (0, 1000)
    return {name: part / 1000 for name, part in found.parts.items() if part}


def test_a_run_with_a_kill_and_a_reshard() -> None:
    found = of(LINES, newest=60)
    assert found.wall == 115_000
    assert in_seconds(found) == {
        "productive": 60.0,  # 30 and 30
        "repeated": 8.0,  # 31 to 38 of the first attempt
        "save": 1.5,
        "evaluation": 2.0,
        "startup": 18.0,
        "restore": 2.0,
        "reshard": 1.0,
        "waiting": 20.0,
        "ending": 2.5,
    }
    assert found.told().startswith("52.2 % of 1 min 55 s were productive steps (waiting to be ")


def test_killed_and_nobody_has_launched_it_again() -> None:
    heard = {"heard": Spent(37, {"startup": 10, "step": 38, "save": 1}), "heard_at": stamp(49)}
    at_work = in_seconds(of(FIRST, newest=30, alive=True, **heard))
    assert at_work == {"productive": 38.0, "startup": 10.0, "save": 1.0}
    killed = in_seconds(of(FIRST, newest=30, **heard))
    assert killed == {"productive": 30.0, "repeated": 8.0, "startup": 10.0, "save": 1.0}
    nothing = of([li for li in FIRST if '"commit"' not in li], **heard)
    assert in_seconds(nothing) == {"repeated": 38.0, "startup": 10.0, "save": 1.0}


def test_killed_before_its_first_step() -> None:
    """What it had spent when it began is known; from then on nothing is."""
    found = in_seconds(of([FIRST[0], SECOND[0], *SECOND[2:]], newest=60))
    assert found["startup"] == 5.0 + 8.0
    found = in_seconds(of(FIRST[:2], newest=None))
    assert found == {"startup": 5.0, "unknown": 3.0}


def test_an_older_versions_seconds_are_unknown() -> None:
    values = [json.loads(text) for text in LINES if '"heard"' not in text]
    for value in values:
        del value["check"]
        value.pop("spent", None)
    found = of([json.dumps(value) for value in values], newest=60)
    assert in_seconds(found) == {"unknown": 110.0}


def test_without_a_sign_of_life_nobody_knows_when_it_was_killed() -> None:
    found = in_seconds(of([text for text in LINES if '"heard"' not in text], newest=60))
    assert found["unknown"] == 69.0 - 41.0 + 1.0  # until the next process; and after the sums
    assert "repeated" not in found
    assert "waiting" not in found


def test_a_lost_line_of_the_checkpoint_that_was_gone_on_from() -> None:
    lines = [*FIRST[:4], line(31, 1, "commit", step=20, spent={"startup": 10.0, "step": 20.0})]
    found = in_seconds(of([*lines, *SECOND], newest=60))
    assert (found["productive"], found["unknown"]) == (50.0, 18.0)  # which of 21 to 37 took what?
    assert "repeated" not in found


def test_a_clock_that_was_set_back_hides_no_waiting() -> None:
    """By an hour, while the first attempt made its steps."""
    back = [FIRST[0], *(moved(text, -3600) for text in [*FIRST[1:], *SECOND])]
    assert in_seconds(of(back, newest=60)) == in_seconds(of(LINES, newest=60))
    killed = [li for li in back if '"heard"' not in li][: len(FIRST)]
    heard = {"heard": Spent(37, {"startup": 10, "step": 38, "save": 1}), "heard_at": stamp(-3551)}
    assert in_seconds(of(killed, newest=30, **heard)) == in_seconds(
        of(FIRST, newest=30, **heard | {"heard_at": stamp(49)})
    )


def moved(text: str, seconds: float) -> str:
    """A line, by a clock that was set."""
    value = json.loads(text)
    del value["check"]
    for name in ("time", "at"):
        if name in value:
            then = datetime.fromisoformat(value[name]).timestamp() + seconds
            value[name] = stamp(then - T0)
    return with_check(json.dumps(value))


def test_what_was_begun_in_vain_is_lost_and_costs_the_others_nothing() -> None:
    vain = [
        line(130, 3, "attempt", spent={"startup": 5.0}),
        line(131, 3, "resume", request="20", step=20),
        line(160, 3, "end", outcome="failed", exit=70, spent={"startup": 7.0, "step": 28.0}),
        line(170, 4, "attempt", spent={"startup": 5.0}),
        line(171, 4, "resume", request="auto", step=60),
        line(190, 4, "commit", step=70, parent=60, spent={"startup": 6.0, "step": 10.0}),
    ]
    found = in_seconds(of([*LINES, *vain], newest=70, alive=True))
    assert (found["productive"], found["repeated"]) == (70.0, 8.0 + 28.0)


def test_a_later_line_by_hand_is_none_of_the_run() -> None:
    by_hand = [line(9999, 2, "prune", step=30), line(9999, 2, "publish", step=60)]
    assert of([*LINES, *by_hand], newest=60) == of(LINES, newest=60)


@pytest.mark.parametrize("lines", [[], ["{"], ['{"event": "launch"}']])
def test_nothing_has_begun(lines: list[str]) -> None:
    found = of(lines)
    assert found == Goodput()
    assert set(found.shares().values()) == {0.0}


numbers = st.floats(0, 1e6)
kinds = st.sampled_from(
    ["startup", "restore", "reshard", "step", "evaluation", "save", "ending", "waiting", "x"]
)
event = st.builds(
    lambda at, attempt, kind, step, of_, spent, exit_: line(
        *(at, attempt, kind),
        step=step,
        of=of_,
        at=stamp(at / 2),
        global_step=step,
        spent=spent,
        parent=step // 2,
        request="auto",
        **({"outcome": "failed", "exit": exit_} if kind == "end" else {}),
    ),
    numbers,
    st.integers(1, 4),
    st.sampled_from(["attempt", "resume", "commit", "heard", "end", "training", "prune"]),
    st.integers(0, 50),
    st.integers(1, 3),
    st.dictionaries(kinds, numbers, max_size=4),
    st.integers(1, 70),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(event, max_size=14), st.integers(0, 60) | st.none(), st.booleans())
def test_the_parts_are_the_whole_whatever_the_lines_tell(
    lines: list[str], newest: int | None, alive: bool
) -> None:
    in_seconds(of(lines, newest=newest, alive=alive))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_lost_torn_and_disordered_lines_make_nothing_up(data: st.DataObject) -> None:
    kept = data.draw(st.permutations(LINES))[: data.draw(st.integers(0, len(LINES)))]
    torn = [text[: data.draw(st.integers(0, len(text)))] for text in kept[:2]]
    found = in_seconds(of([*kept[2:], *torn], newest=60))
    whole = in_seconds(of(LINES, newest=60))
    for part in ("save", "evaluation", "startup", "restore", "reshard", "ending"):
        assert found.get(part, 0) <= whole.get(part, 0)
