"""What the machines of a run have together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.node_parts import (
    Held,
    Machine,
    left_over,
    runs_of,
    to_show,
    together,
    whose_log,
)

files = st.frozensets(st.sampled_from("abcdef"))
branches = st.sampled_from(["old", "new"])
parts = st.dictionaries(st.integers(0, 3), st.builds(Held, branches, st.just(6), files))


@given(st.dictionaries(st.integers(0, 7), parts))
def test_whole_is_what_lacks_no_file(held: dict[int, dict[int, Held]]) -> None:
    """Of one branch; and whoever is said to have a file has it."""
    found = together(held)
    for step, sources in found.items():
        assert set(sources) == set("abcdef")
        assert all(name in held[rank][step].names for name, rank in sources.items())
        assert len({held[rank][step].whole for rank in sources.values()}) == 1
    for step in {step for parts in held.values() for step in parts} - found.keys():
        for whole in ("old", "new"):
            here = [p[step].names for p in held.values() if step in p and p[step].whole == whole]
            assert len(frozenset().union(*here)) < 6


def part(names: str, attempt: int = 1, run: str = "r", whole: str = "w") -> Held:
    return Held(whole, 2, frozenset(names), run, attempt)


def test_of_two_branches_the_later_one() -> None:
    """Also where another run has left its own there."""
    held = {0: {4: part("ab", attempt=2, whole="z")}, 1: {4: part("ab", attempt=3, whole="a")}}
    assert together(held) == {4: {"a": 1, "b": 1}}
    held[1][4] = part("ab", attempt=9, run="other")
    assert together(held, "r") == {4: {"a": 0, "b": 0}}


def test_whose_log_is_taken() -> None:
    """Of the run, and ahead of the main process's own; any, where that has none."""
    machines = {0: Machine("n0", "r", (3, 90)), 2: Machine("n1", "r", (4, 20))}
    assert whose_log(machines, "r") == 2
    assert whose_log({**machines, 0: Machine("n0", "r", (4, 21))}, "r") is None
    assert whose_log({**machines, 4: Machine("n2", "other", (9, 9))}, "r") == 2
    new = {0: Machine("n0", None), 2: Machine("n1", "r"), 4: Machine("n2", "r", (1, 5))}
    assert whose_log(new, "r") == 4
    assert whose_log({0: Machine("n0", None), 2: Machine("n1", "r")}, "r") == 2, "its run.json"
    assert whose_log({0: Machine("n0", None)}, "r") is None


def test_which_run_it_is() -> None:
    """Checkpoints tell, before folders that once were a run's."""
    idle, busy = Machine("n1", "old"), Machine("n2", "r", parts={4: part("a")})
    assert runs_of([Machine("n0", None), idle, busy]) == {"r": ["n2"]}
    assert runs_of([Machine("n0", None), idle]) == {"old": ["n1"]}
    assert runs_of([Machine("n0", None)]) == {}


def test_what_the_main_process_is_shown() -> None:
    """What it has nothing of, and what it has of another branch."""
    machines = {
        0: Machine("n0", "r", parts={4: part("a"), 6: part("ab", whole="other")}),
        1: Machine("n1", "r", parts={s: part("ab", attempt=2) for s in (4, 6, 8)}),
    }
    machines[0].parts[4] = part("a", attempt=2)  # type: ignore[index]
    found = together({rank: machine.parts for rank, machine in machines.items()})
    assert to_show(machines, found) == {6: 1, 8: 1}


def test_what_cannot_be_had_any_more() -> None:
    """What only others have was committed, if the main process's machine had no part in that
    attempt; else it would know."""
    parts = {4: part("b", 3), 6: part("b", 4)}
    lost = {0: Machine("n0", None), 1: Machine("n1", "r", parts=parts), 2: Machine("n1", "r")}
    assert left_over(lost, "r", 0, {}) == {4: ["n1"], 6: ["n1"]}
    assert left_over(lost, "r", 0, {4}) == {6: ["n1"]}
    assert left_over(lost, "r", 3, ()) == {6: ["n1"]}
    own = {**lost, 0: Machine("n0", "r", parts={4: part("a", 3)})}
    assert left_over(own, "r", 4, ()) == {4: ["n0", "n1"]}
    assert left_over(own, "another", 0, ()) == {}
