"""Who is dead, frozen or stuck, from what was heard and when."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from keepstep.policy.standstill import ENOUGH, Phase, Standstills
from keepstep.ranks import listener as module
from keepstep.ranks.listener import PERIOD_SECONDS, Listener, named
from keepstep.ranks.watchdog import _causes, _is_of_the_connection

Found = tuple[list[int], str] | None


def listener(ranks: int = 3) -> Listener:
    return Listener(list(range(ranks)), 25.0, Standstills(600.0, 600.0))


class Ears:
    """A listener that comes round in time; where a text has a `*`, it counts the rounds."""

    def __init__(self, ranks: int = 3) -> None:
        self.listener = listener(ranks)
        self.now = 0.0
        self._round = itertools.count()

    def hear(self, said: list[str], until: float) -> Found:
        """The same from all until then; the first verdict, or None."""
        found: Found = None
        while found is None and self.now < until:
            self.now += PERIOD_SECONDS
            number = str(next(self._round))
            found = self.listener.hear([text.replace("*", number) for text in said], self.now)
        return found


def test_all_is_well() -> None:
    ears = Ears()
    for minute in range(100):
        assert ears.hear([f"* {minute}"] * 3, 60.0 * minute) is None


def test_a_silent_rank_is_dead_or_frozen() -> None:
    ears = Ears()
    assert ears.hear(["* 5", "1 4", "* 5"], 26) is None
    found = ears.hear(["* 9", "1 4", "* 9"], 30)
    assert found == ([1], "gave no sign of life for 25 s: dead or frozen")


def test_a_rank_that_has_left_is_not_missed() -> None:
    ears = Ears(2)
    for second in range(10, 200, 10):
        assert ears.hear([f"* {second}", "left"], second) is None


def test_before_the_first_step_nobody_is_stuck() -> None:
    assert Ears().hear(["* 0 7"] * 3, 5000) is None


def test_before_the_first_step_the_dead_are_waited_for_longer() -> None:
    ears = Ears(2)
    assert ears.hear(["* 0", "1 0"], 102) is None
    found = ears.hear(["* 0", "1 0"], 110)
    assert found == ([1], "gave no sign of life for 100 s: dead or frozen")


@pytest.mark.parametrize("victim", range(3))
def test_the_rank_that_is_behind_is_stuck(victim: int) -> None:
    """In its loader, in front of a collective that others have entered, in a forward."""
    for behind, ahead in (("7 40", "8 40"), ("8 40", "8 41"), ("7 41", "8 41")):
        said = [f"* {behind if rank == victim else ahead}" for rank in range(3)]
        ears = Ears()
        assert ears.hear(said, 600) is None
        assert ears.hear(said, 700) == ([victim], "made no progress for 600 s at the start: stuck")


def test_among_thousands_the_one_behind_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was once for every rank: half a second in which the listener itself was late."""
    looks: list[int] = []

    def counted(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        looks.append(1)
        return min(counts)

    monkeypatch.setattr(module, "min", counted, raising=False)
    ears = Ears(500)
    found = ears.hear([f"* {7 if rank == 3 else 8} 40" for rank in range(500)], 700)
    assert found == ([3], "made no progress for 600 s at the start: stuck")
    assert len(looks) == 1


def test_of_many_ranks_the_first_are_named() -> None:
    hosts = [f"n{rank // 8}" for rank in range(4096)]
    assert named([1, 9], hosts) == "rank 1 on n0, rank 9 on n1"
    told = named(list(range(2048)), hosts)
    assert told.startswith("rank 0 on n0, rank 1 on n0, ")
    assert told.endswith("rank 7 on n0, and 2,040 more")


def test_where_none_is_behind_none_is_accused() -> None:
    found = Ears().hear(["* 8 40"] * 3, 700)
    what = "made no progress for 600 s at the start, and none is behind the others: stuck"
    assert found == ([0, 1, 2], what)


def test_other_ranks_do_not_pronounce_the_main_one_stuck() -> None:
    """It would be the wrong one: they hear nobody else."""
    ears = Ears(1)
    assert ears.hear(["* 8 40"], 5000) is None
    assert ears.hear(["1 8 40"], 5040) == ([0], "gave no sign of life for 25 s: dead or frozen")


def test_a_listener_that_was_late_counts_anew() -> None:
    """All ranks were stopped, and go on one after the other."""
    ears = Ears()
    assert ears.hear(["* 8 40"] * 3, 590) is None
    ears.now += 400
    assert ears.hear(["* 8 40", "1 8 40", "1 8 40"], 1010) is None
    assert ears.hear(["* 9 41"] * 3, 1500) is None
    ears.now += 3600
    assert ears.hear(["* 9 41", "2 9 41", "* 9 41"], 5140) is not None, "but not for ever"


def test_whoever_is_silent_when_a_connection_broke_is_behind_it() -> None:
    ears = Ears()
    assert ears.hear(["* 8 40", "* 8 40", "1 8 40"], 6) is None
    found = ears.hear(["* 8 40", "* 8 40 seeks", "1 8 40"], 12)
    assert found == ([2], "gave no sign of life for 6 s: dead or frozen")


def test_a_rank_whose_process_is_gone_is_dead_at_once_unless_it_has_left() -> None:
    for begun in ("8 40", "0 40"):
        said = [f"1 {begun}", "left", f"1 {begun}"]
        assert listener().hear(said, 2, gone={1}) is None
        assert listener().hear(said, 2, gone={1, 2}) == ([2], "died: the process is gone")


def test_the_last_words_of_a_rank_that_is_gone_are_believed() -> None:
    found = listener(2).hear(["1 8 40", "failed ValueError: no such row"], 2, gone={1})
    assert found == ([1], "failed: ValueError: no such row")


def test_a_rank_that_knows_the_verdict_is_not_missed() -> None:
    assert Ears(2).hear(["* 8 40", "heard"], 200) is None


def test_a_rank_that_failed_says_of_what() -> None:
    found = Ears().hear(["* 8 40", "failed ValueError: no such row", "* 8 41"], 4)
    assert found == ([1], "failed: ValueError: no such row")


def test_errors_that_may_come_of_another_ranks_end() -> None:
    gloo = RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:1726")
    wrapped = OSError("the save failed")
    wrapped.__cause__ = gloo
    assert any(map(_is_of_the_connection, _causes(wrapped)))
    assert not any(map(_is_of_the_connection, _causes(ValueError("no such row"))))


def taught(phase: Phase, seconds: float, least: float = 60.0) -> Standstills:
    """Of a run that has stood still for so long in each of enough steps, evaluations, …"""
    standstills, now = Standstills(least, 600.0), 0.0
    other: Phase = "write" if phase != "write" else "save"
    for _ in range(ENOUGH.get(phase, 100)):
        standstills.got_on(now, phase)
        now += seconds
        standstills.got_on(now)
        standstills.got_on(now, other)
    return standstills


@pytest.mark.parametrize(("phase", "seconds"), [("step", 60), ("evaluation", 60), ("save", 300)])
def test_a_rank_is_stuck_after_what_the_run_has_taught(phase: Phase, seconds: float) -> None:
    ears = Ears()
    ears.listener = Listener([0, 1, 2], 25.0, taught(phase, 1.25))
    said = [f"* 8 40 {phase}", f"* 7 40 {phase}", f"* 8 40 {phase}"]
    assert ears.hear(said, seconds) is None
    found = ears.hear(said, 700)
    assert ears.now <= seconds + 3 * PERIOD_SECONDS
    assert found is not None
    ranks, told = found
    assert ranks == [1]
    article = "an" if phase == "evaluation" else "a"
    learnt = f"in {article} {phase}, where none of the last {ENOUGH[phase]} stood still for longer"
    assert told.startswith(f"made no progress for {seconds} s {learnt} than 1.2 s: stuck (learnt")
    assert ears.listener.hang is not None
    assert ears.listener.hang.is_learnt


def test_what_one_rank_is_at_may_take_longer() -> None:
    """A rank is behind in an evaluation, of which nothing is known; the others are ahead of it."""
    ears = Ears()
    ears.listener = Listener([0, 1, 2], 25.0, taught("step", 1.0))
    assert ears.hear(["* 8 40 step", "* 7 40 evaluation", "* 8 41 step"], 590) is None
    found = ears.hear(["* 8 40 step", "* 7 40 evaluation", "* 8 41 step"], 700)
    assert found == ([1], "made no progress for 600 s in an evaluation: stuck")
    assert ears.listener.hang is not None
    assert not ears.listener.hang.is_learnt


def test_a_pause_of_all_ranks_is_no_hang_in_learnt_time_either() -> None:
    ears = Ears()
    ears.listener = Listener([0, 1, 2], 25.0, taught("step", 1.0))
    assert ears.hear(["* 8 40 step"] * 3, 50) is None
    ears.now += 400
    assert ears.hear(["* 8 40 step"] * 3, 500) is None
    assert ears.hear(["* 8 40 step"] * 3, 530) is not None, "but not for ever"


@pytest.mark.parametrize("text", ["1 8 40", "1 8 40 seeks", "1 8 40 dancing", "1 8 40 step seeks"])
def test_what_a_rank_says_may_lack_what_it_is_at(text: str) -> None:
    ears = Ears()
    ears.listener = Listener([0, 1, 2], 10_000, taught("step", 1.0))
    said = [text.replace("1 8", "* 8"), "* 9 40 step", "* 9 40 step"]
    found = ears.hear(said, 700)
    assert found is not None
    assert found[0] == [0]
    assert ears.now > (60 if "step" in text else 600)
