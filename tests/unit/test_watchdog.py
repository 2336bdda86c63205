"""Who is dead, frozen or stuck, from what was heard and when."""

from __future__ import annotations

from keepstep.watchdog import Listener


def listener(ranks: int = 3) -> Listener:
    return Listener(list(range(ranks)), (25.0, 600.0))


def test_all_is_well() -> None:
    ears = listener()
    for second in range(0, 5000, 2):
        assert ears.hear([f"{second} {second // 60}"] * 3, float(second)) is None


def test_a_silent_rank_is_dead_or_frozen() -> None:
    ears = listener()
    assert ears.hear(["0 0", "0 0", "0 0"], 0.0) is None
    assert ears.hear(["9 5", "1 4", "9 5"], 10.0) is None
    assert ears.hear(["18 9", "1 4", "18 9"], 35.0) is None
    found = ears.hear(["19 9", "1 4", "19 9"], 36.0)
    assert found == ([1], "gave no sign of life for 25 s: dead or frozen")


def test_a_rank_that_has_left_is_not_missed() -> None:
    ears = listener(2)
    ears.hear(["1 1", "1 1"], 0.0)
    for second in (10, 40, 90):
        assert ears.hear([f"{second} {second}", "left"], float(second)) is None


def test_before_the_first_step_nobody_is_stuck() -> None:
    ears = listener()
    for second in range(0, 5000, 10):
        assert ears.hear([f"{second} 0"] * 3, float(second)) is None


def test_before_the_first_step_the_dead_are_waited_for_longer() -> None:
    ears = listener(2)
    assert ears.hear(["1 0", "1 0"], 0.0) is None
    assert ears.hear(["50 0", "1 0"], 100.0) is None
    found = ears.hear(["51 0", "1 0"], 101.0)
    assert found == ([1], "gave no sign of life for 100 s: dead or frozen")


def test_the_rank_that_is_behind_is_stuck() -> None:
    ears = listener()
    ears.hear(["1 7", "1 7", "1 7"], 0.0)
    ears.hear(["2 8", "2 7", "2 8"], 10.0)
    for second in range(12, 610, 10):  # alive, and none gets on
        assert ears.hear([f"{second} 8", f"{second} 7", f"{second} 8"], float(second)) is None
    found = ears.hear(["999 8", "999 7", "999 8"], 611.0)
    assert found == ([1], "made no progress for 600 s: stuck")
