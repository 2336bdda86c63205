"""What is far above the steps before, whoever judges, and wherever a run was carried on."""

from __future__ import annotations

import json
import math
import statistics

from hypothesis import assume, given
from hypothesis import strategies as st

from keepstep.policy.spikes import LEAST_DEVIATION, SpikeWatch

losses = st.floats(0, 100, allow_nan=False).map(lambda x: round(x, 6))
steps = st.lists(st.tuples(losses, losses | st.none()), max_size=60)


def test_a_spike_is_named_and_does_not_hide_the_next() -> None:
    watch = SpikeWatch(6, 5)
    for loss in (2.0, 2.1, 1.9, 2.05, 1.95):
        assert watch.judge(loss, 1.0) is None
    before = watch.window
    spike = watch.judge(9.0, 1.0)
    assert spike is not None
    assert (spike.what, spike.value, spike.mean) == ("loss", 9.0, 2.0)
    assert watch.window == before
    assert watch.judge(9.0, 1.0) is not None
    norm = watch.judge(2.0, 50.0)
    assert norm is not None
    assert norm.what == "gradient norm"
    assert watch.judge(0.0, 0.0) is None, "below is no spike"


def test_nothing_is_seen_before_the_window_is_full() -> None:
    watch = SpikeWatch(1, 5)
    assert not any(watch.judge(loss, None) for loss in (1.0, 100.0, 1.0, 100.0, 1e6))


def test_a_new_level_is_none() -> None:
    watch = SpikeWatch(6, 5)
    for _ in range(5):
        watch.judge(1.0, None)
    assert [watch.judge(3.0, None) is not None for _ in range(12)] == [True] * 5 + [False] * 7


@given(steps=steps, sigma=st.floats(0.5, 8), length=st.integers(5, 12))
def test_by_definition(steps: list[tuple[float, float | None]], sigma: float, length: int) -> None:
    watch, window, in_a_row = SpikeWatch(sigma, length), [], 0
    for loss, norm in steps:
        expected = None
        if len(window) == length:
            for what, values, value in (
                ("loss", [numbers[0] for numbers in window], loss),
                ("gradient norm", [numbers[1] for numbers in window], norm),
            ):
                if value is None or None in values or expected is not None:
                    continue
                mean = statistics.fmean(values)
                limit = mean + sigma * max(statistics.pstdev(values), LEAST_DEVIATION * abs(mean))
                assume(not math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-9))
                expected = what if value > limit else None
        found = watch.judge(loss, norm)
        assert (found and found.what) == expected
        in_a_row = in_a_row + 1 if found else 0
        if in_a_row == length:
            window, in_a_row = [], 0
        elif not found:
            window = [*window, (loss, norm)][-length:]
        assert watch.window == window


@given(steps=steps, at=st.integers(0, 60))
def test_carried_on_it_judges_as_if_it_had_gone_on(
    steps: list[tuple[float, float | None]], at: int
) -> None:
    """Where no spike was just seen: the next attempt knows of none."""
    straight, first = SpikeWatch(3, 5), SpikeWatch(3, 5)
    seen = [straight.judge(*step) for step in steps]
    for step in steps[:at]:
        spike = first.judge(*step)
    assume(at == 0 or not steps or spike is None)
    carried = SpikeWatch(3, 5, json.loads(json.dumps(first.window)))
    assert [carried.judge(*step) for step in steps[at:]] == seen[at:]
