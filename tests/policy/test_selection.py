from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from keepstep.policy.selection import (
    Candidate,
    NewerError,
    NoProgressError,
    SelectionError,
    Situation,
    UnreadableError,
    choose,
)

STEPS = (10, 20, 30)


def situation(faults: dict[int, str] | None = None, **changes: Any) -> Situation:
    """Checkpoints at 10 (best), 20 and 30; `faults` of some of them."""
    values: dict[str, Any] = {
        "candidates": [Candidate(step) for step in STEPS],
        "best": 10,
        "verify": lambda step: [faults[step]] if faults and step in faults else [],
        **changes,
    }
    return Situation(**values)


@pytest.mark.parametrize(
    ("request_", "step"),
    [("auto", 30), ("latest", 30), ("best", 10), ("20", 20), ("never", None)],
)
def test_what_each_request_takes(request_: str, step: int | None) -> None:
    assert choose(request_, situation()).step == step


def test_auto_passes_by_what_is_damaged_and_says_why() -> None:
    choice = choose("auto", situation({30: "model.safetensors is missing"}))
    assert choice.step == 20
    assert choice.passed_by == choice.invalid == {30: "model.safetensors is missing"}


def test_auto_verifies_no_more_than_it_must() -> None:
    seen: list[int] = []

    def verify(step: int) -> list[str]:
        seen.append(step)
        return []

    choose("auto", situation(verify=verify))
    assert seen == [30]


def test_auto_starts_from_the_beginning_only_without_checkpoints() -> None:
    assert choose("auto", situation(candidates=[])).step is None
    with pytest.raises(SelectionError, match="checkpoint-30: torn") as caught:
        choose("auto", situation(dict.fromkeys(STEPS, "torn")))
    assert "3 checkpoints exist and none is valid" in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "changes"),
    [
        ("15", {}),
        ("best", {"best": None}),
        ("latest", {"candidates": []}),
        ("latest", {"faults": {30: "torn"}}),
        ("20", {"faults": {20: "torn"}}),
    ],
)
def test_what_cannot_be_had_is_an_error_that_lists_what_exists(
    request_: str, changes: dict
) -> None:
    with pytest.raises(SelectionError, match=r"there are (checkpoints at: 30, 20, 10|none)"):
        choose(request_, situation(**changes))


def test_an_abandoned_branch_does_not_count_but_can_be_asked_for() -> None:
    candidates = [Candidate(10), Candidate(20), Candidate(30, abandoned=True)]
    assert choose("auto", situation(candidates=candidates)).step == 20
    assert choose("latest", situation(candidates=candidates)).step == 20
    assert choose("30", situation(candidates=candidates)).step == 30


def test_a_rewind_is_done_once() -> None:
    choice = choose("10", situation(under_way=True))
    assert choice.step == 30
    assert choice.under_way


def test_crash_loops_step_back_and_end() -> None:
    assert choose("auto", situation(fruitless={30: 2})).step == 30
    back = choose("auto", situation(fruitless={30: 3}))
    assert back.step == 20
    assert back.passed_by == {30: "resumed 3 times without progress"}
    assert back.invalid == {}
    with pytest.raises(NoProgressError, match="nothing is left"):
        choose("auto", situation(fruitless=dict.fromkeys(STEPS, 3)))
    with pytest.raises(NoProgressError, match="from the beginning 3 times"):
        choose("auto", situation(candidates=[], fruitless={0: 3}))
    with pytest.raises(NoProgressError, match="from checkpoint-20 3 times"):
        choose("20", situation(fruitless={20: 3}))


def of_steps(errors: Mapping[int, Exception]) -> dict[str, Any]:
    def verify(step: int) -> list[str]:
        if step in errors:
            raise errors[step]
        return []

    return {"verify": verify}


def test_what_cannot_be_read_is_passed_by_and_is_no_damage() -> None:
    choice = choose("auto", situation(**of_steps({30: UnreadableError("EIO: model.safetensors")})))
    assert (choice.step, choice.invalid) == (20, {})
    assert choice.passed_by == {30: "EIO: model.safetensors"}
    unseen = of_steps({10: UnreadableError("not looked at")})
    assert choose("auto", situation(**unseen)).step == 30
    nothing = situation(**of_steps(dict.fromkeys(STEPS, UnreadableError("EIO"))))
    for request in ("auto", "latest", "30"):
        with pytest.raises(UnreadableError, match="EIO"):
            choose(request, nothing)


def test_an_older_one_is_not_gone_on_from_where_a_newer_version_has_written() -> None:
    newer = of_steps({30: NewerError("format 9")})
    for request in ("auto", "latest"):
        with pytest.raises(NewerError, match="format 9"):
            choose(request, situation(**newer))
    assert choose("20", situation(**newer)).step == 20  # by name
    assert choose("auto", situation(**of_steps({20: NewerError("format 9")}))).step == 30


def test_auto_passes_by_what_is_not_finite_and_a_person_may_name_it() -> None:
    known = [Candidate(10), Candidate(20), Candidate(30, is_finite=False)]
    choice = choose("auto", situation(candidates=known))
    assert (choice.step, choice.invalid) == (20, {})
    assert choice.passed_by == {30: "its state is not finite"}
    assert choose("30", situation(candidates=known)).step == 30
    with pytest.raises(SelectionError, match="its state is not finite"):
        choose("auto", situation(candidates=known[2:]))
