"""What trackers are given: each value of a step once, whatever happened between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.lineage import Attempt
from keepstep.policy.mfu import mfu, peak_of
from keepstep.policy.rewind import Rewind
from keepstep.policy.strict import TextError
from keepstep.policy.tracking import (
    BEGINNING,
    HeldBack,
    Tracked,
    TrackerRun,
    read_tracked,
    went_back,
)

ATTEMPT = st.tuples(
    st.integers(1, 9),  # steps that it makes
    st.integers(0, 3),  # which of its commits is its last: of every third step
    st.booleans(),  # killed between the commit and its being told
)


@given(st.lists(ATTEMPT, max_size=6))
def test_a_tracker_that_takes_nothing_back(attempts: list[tuple[int, int, bool]]) -> None:
    """Attempts are killed anywhere; each goes on from the newest commit. The last one finishes."""
    got: list[tuple[int, str]] = []
    tracked, start, history = Tracked(), BEGINNING, dict[int, str]()
    for made, commits, untold in [*attempts, (5, 9, False)]:
        tracked = tracked.begun_at(start, False)
        assert tracked.branch == 0
        held, reached = HeldBack(), tracked.reached.get("it", tracked.origin)
        held.begin(reached, {"loss"} if reached >= 0 else set())
        for step, value in history.items():
            held.add(step, {"loss": value})
        got += [(step, f"{v}") for step, values in held.take(start) for v in values.values()]
        tracked = tracked.with_reached(["it"], max(start, reached))
        first = max(start, 0) + 1
        for step in range(first, first + made):
            held.add(step, {"loss": f"{step}"})
            if step % 3 == 0 and commits > 0:
                commits -= 1
                start = step
                history |= {s: f"{s}" for s in range(1, step + 1)}
                if untold and commits == 0:
                    break
                got += [(s, v["loss"]) for s, v in held.take(step)]
                tracked = tracked.with_reached(["it"], step)
    got += [(s, v["loss"]) for s, v in held.take(99)]
    assert got == [(step, f"{step}") for step in range(1, first + made)]


def test_of_one_step() -> None:
    held = HeldBack()
    held.begin(4, {"loss"})
    held.add(3, {"loss": 1})
    held.add(4, {"loss": 1, "eval_loss": 2})  # an evaluation that is made up
    held.add(5, {"loss": 1, "epoch": 0.5})
    held.add(5, {"eval_loss": 3, "epoch": 0.6})
    held.add(7, {"loss": 9})
    merged = {"loss": 1, "epoch": 0.5, "eval_loss": 3}
    assert list(held.take(6)) == [(4, {"eval_loss": 2}), (5, merged)]
    held.add(5, {"epoch": 0.5, "train_runtime": 1.0})
    assert list(held.take(6)) == [(5, {"train_runtime": 1.0})]
    held.add(5, {"loss": 1})
    assert list(held.take(6)) == []
    assert list(held.take(9)) == [(7, {"loss": 9})]


def test_a_tracker_run_never_goes_back() -> None:
    first = Tracked().with_reached(["wandb", "mlflow"], 30)
    assert first.begun_at(30, True) is first
    assert first.begun_at(40, True) is first
    assert first.begun_at(20, False) is first
    branch = first.begun_at(20, True)
    assert branch == Tracked(1, 20, {})
    assert branch.with_reached(["wandb"], 50).begun_at(BEGINNING, True) == Tracked(2, BEGINNING, {})
    assert read_tracked(branch.as_text()) == branch
    closed = first.with_ended("wandb").with_ended("comet_ml")
    assert closed.ended == {"wandb": 30}
    assert read_tracked(closed.as_text()) == closed
    assert (closed.begun_at(20, True).ended, closed.copied_to("/runs/b", 30).ended) == ({}, {})
    own = TrackerRun("0123456789ab", "mine", branch.branch, branch.origin)
    assert (own.id, own.title) == ("0123456789ab-branch-1", "mine-branch-1")
    assert TrackerRun("0123456789ab", "mine").id == "0123456789ab"
    for text in (
        '{"branch": -1}',
        '{"reached": {"wandb": -2}}',
        '{"ended": {"wandb": -2}}',
        '{"reached": {"a": true}}',
        "[",
    ):
        with pytest.raises(TextError):
            read_tracked(text)


def test_a_copy_is_told_of_apart() -> None:
    first = Tracked(1, 20).with_reached(["wandb"], 30)
    copy, other = first.copied_to("/runs/b", 30), first.copied_to("/runs/c", 30)
    assert (copy.branch, copy.origin, copy.reached) == (0, 30, {})
    assert copy.copy != other.copy
    assert copy == first.copied_to("/runs/b", 30)
    assert read_tracked(copy.as_text()) == copy
    back = copy.with_reached(["wandb"], 50).begun_at(40, True)
    own = TrackerRun("0123456789ab", "mine", back.branch, back.origin, back.copy)
    assert own.id == f"0123456789ab-copy-{copy.copy}-branch-1"
    assert not own.is_first
    assert own.first_id == "0123456789ab"
    with pytest.raises(TextError):
        read_tracked('{"copy": "../x"}')


def test_who_was_sent_back() -> None:
    rewind = Rewind(2, step=25, to=20, what="spike", rows=(1,), of=3, dataset=None)
    first = Attempt(1, request="auto", commits=2)
    assert not went_back([first, Attempt(2, request="auto")])
    assert not went_back([])
    for request in ("20", "never", "best", "/elsewhere/checkpoint-20"):
        assert went_back([first, Attempt(2, request=request)])
    spoilt = Attempt(2, request="auto", rewind=rewind)
    assert went_back([first, spoilt, Attempt(3, request="auto")])
    assert went_back([first, spoilt, Attempt(3, request="auto"), Attempt(4, request="auto")])
    assert not went_back([spoilt, Attempt(3, request="auto", commits=1), Attempt(4)])


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 9090", None),
    ],
)
def test_peaks(device: str, tera: float | None) -> None:
    assert peak_of(device) == (None if tera is None else tera * 1e12)


def test_mfu() -> None:
    assert mfu(100, 100, 2.0, 6000.0) == 0.2  # six operations for a parameter and a token
    assert mfu(100, 0, 2.0, 8000.0) == 0.1  # an adapter: the model's own gradients are spared
