"""The table of a save's states: whatever happens, and in whichever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepstep.policy.save_states import (
    FIRST,
    TRANSITIONS,
    SaveEvent,
    SaveState,
    TransitionError,
    picture,
    transition,
)

GOES_WELL = [
    (SaveEvent.COPIED, SaveState.WRITING),
    (SaveEvent.WRITTEN, SaveState.REPORTED),
    (SaveEvent.ALL_WRITTEN, SaveState.COMMITTING),
    (SaveEvent.RENAMED, SaveState.COMMITTED),
]


def reachable(begin: SaveState) -> set[SaveState]:
    found, left = {begin}, [begin]
    while left:
        state = left.pop()
        new = {then for (before, _), then in TRANSITIONS.items() if before is state} - found
        found |= new
        left += new
    return found


def test_a_save_that_goes_well() -> None:
    state = FIRST
    for event, then in GOES_WELL:
        state = transition(state, event)
        assert state is then
    assert state.is_terminal


def test_a_commit_that_is_slow_may_still_come_or_fail() -> None:
    state = transition(SaveState.COMMITTING, SaveEvent.SLOW)
    assert not state.is_given_up
    assert transition(state, SaveEvent.RENAMED) is SaveState.COMMITTED
    assert transition(state, SaveEvent.ERROR) is SaveState.FAILING


@given(st.lists(st.sampled_from(SaveEvent)))
def test_whatever_happens(events: list[SaveEvent]) -> None:
    """What has ended stays so; what is given up is never committed; nothing is committed but by the
    rename, after every rank has reported."""
    state, seen = FIRST, [FIRST]
    for event in events:
        if (state, event) not in TRANSITIONS:
            with pytest.raises(TransitionError, match=f"{event.name} .* {state.name}$"):
                transition(state, event)
            continue
        then = transition(state, event)
        assert not state.is_terminal
        assert not (state.is_given_up and not then.is_given_up)
        if then is SaveState.COMMITTED:
            assert event is SaveEvent.RENAMED
            assert SaveState.COMMITTING in seen
        assert then not in seen, "no way leads back"
        state = then
        seen.append(state)


def test_every_state_and_event_is_used() -> None:
    assert reachable(FIRST) == set(SaveState)
    assert {event for _, event in TRANSITIONS} == set(SaveEvent)


@pytest.mark.parametrize("state", SaveState)
def test_every_state_ends_well_or_is_told_to_have_failed(state: SaveState) -> None:
    ends = {end for end in reachable(state) if end.is_terminal}
    assert ends, "there is a way out"
    assert state.is_terminal == (reachable(state) == {state})
    if state.is_given_up:
        assert ends == {SaveState.FAILED}
    elif not state.is_terminal:
        assert ends == {SaveState.COMMITTED, SaveState.FAILED}, (
            "any save may fail until it is there"
        )


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[SaveState.FAILED, SaveEvent.COPIED] = SaveState.WRITING  # type: ignore[index]


def test_the_picture_has_every_transition() -> None:
    lines = list(picture())
    assert lines[0] == "stateDiagram-v2"
    arrows = [line.strip() for line in lines[1:]]
    ends = sum(state.is_terminal for state in SaveState)
    assert len(arrows) == len(set(arrows)) == len(TRANSITIONS) + 1 + ends
    for (state, event), then in TRANSITIONS.items():
        assert f"{state.name} --> {then.name}: {event.value}" in arrows
    # A colon or a semicolon in a label would end it (Mermaid's grammar).
    assert not any(sign in event.value for event in SaveEvent for sign in ":;#")
