"""Whatever saves, branches and prunes follow on each other, the disk is as the policy says."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from keepstep.policy.lineage import Node
from keepstep.policy.retention import Policy, Record
from keepstep.policy.selection import SelectionError
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from tests.helpers.attempts import Launch
from tests.policy.test_retention import brute_force

saves = st.lists(
    st.tuples(
        st.sampled_from(["evaluated", "evaluated", "not evaluated", "relaunch", "rewind"]),
        st.one_of(st.sampled_from([1.0, 2.0, math.nan, math.inf]), st.floats(0, 5)),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(
    saves,
    st.one_of(st.none(), st.integers(1, 4)),
    st.sampled_from(["metric", "recency"]),
    st.booleans(),
)
def test_the_disk_equals_the_policy_after_every_save(
    script: list[tuple[str, float]], limit: int | None, ranking: str, greater: bool
) -> None:
    """Scripted metrics with NaN and ties, saves without evaluation, resumes and rewinds."""
    policy = Policy(limit, ranking, "eval_loss", greater)  # type: ignore[arg-type]
    expected: dict[int, Node] = {}
    history: list[Node] = []  # every commit ever made, pruned or not
    losses: dict[int, float | None] = {}
    with tempfile.TemporaryDirectory() as name:
        launch, step = Launch(Path(name), policy), 0
        for action, loss in script:
            if action == "rewind" and launch.steps():
                launch.end("finished", step)
                launch = Launch(Path(name), policy, request=str(launch.steps()[0]))
            elif action == "relaunch":
                launch = Launch(Path(name), policy)
            if action in ("rewind", "relaunch"):
                step = launch.step
            step += 10
            losses[step] = loss if action == "evaluated" else None
            launch.save(step, losses[step])
            expected[step] = Node(step, launch.writer.attempt, launch.parent or 0)
            history.append(expected[step])
            expected = prune_by_the_book(expected, history, losses, policy)
            assert launch.steps() == sorted(expected)


def prune_by_the_book(
    disk: dict[int, Node],
    history: list[Node],
    losses: dict[int, float | None],
    policy: Policy,
) -> dict[int, Node]:
    """The policy in so many words: abandoned ones stay uncounted, of the rest the best subset."""
    abandoned = {
        node.step
        for node in disk.values()
        if any(n.attempt > node.attempt and n.parent < node.step for n in history)
    }
    alive = [Record(step, losses[step]) for step in disk if step not in abandoned]
    kept = brute_force(alive, policy) | abandoned
    return {step: node for step, node in disk.items() if step in kept}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["save", "save", "make room", "pin", "prune", "relaunch", "go back"]),
            st.integers(0, 5),
        ),
        max_size=10,
    ),
    st.integers(1, 3),
)
@example([("save", 4), ("save", 4), ("go back", 0), ("make room", 0), ("save", 0)], 2)
def test_making_room_leaves_what_the_run_stands_on(
    script: list[tuple[str, int]], limit: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        launch = Launch(Path(name), Policy(limit, "recency"))
        step, committed = 0, True
        for action, which in script:
            there = launch.steps()
            alive = [r.step for r in launch.folder.records(None) if not r.abandoned]
            needed = {*alive[-1:], *launch.folder.pinned()}
            if not committed and launch.parent is not None:
                needed.add(launch.parent)
            if action == "save":
                step += 1 + which
                launch.save(step)
                committed = True
                continue
            if action == "make room":
                launch.writer.make_room(step + 1)
            elif action == "prune":
                RunWriter(launch.folder, Policy(limit, "recency"), Storage()).prune(False)
            elif action == "pin" and there:
                launch.writer.pin(there[which % len(there)])
                continue
            elif action in ("relaunch", "go back") and there:
                launch.end("failed", step)
                back = str(there[which % len(there)])
                request = "auto" if action == "relaunch" and alive else back
                try:
                    launch = Launch(Path(name), Policy(limit, "recency"), request=request)
                except SelectionError:  # tried too often
                    return
                step, committed = launch.step, False
            assert needed <= set(launch.steps()), action
