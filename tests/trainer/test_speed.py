"""How fast an attempt trains: from its own first step on."""

from __future__ import annotations

from keepstep.ranks.time_sheet import TimeSheet
from keepstep.trainer.speed import Speed


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_right_from_the_first_step_after_a_resume() -> None:
    clock = Clock()
    sheet = TimeSheet(clock, began=0.0)
    speed = Speed(sheet)
    clock.now = 600.0  # start-up is none of it
    speed.begin(500, 1_000_000)
    assert speed.seconds_left(500, 600) is None
    assert speed.told(500, 600, 1_000_000, 16) == {}
    sheet.at("step")
    clock.now += 2
    sheet.step_ended(501)
    told = speed.told(501, 600, 1_004_000, 16)
    assert told == {
        "steps_per_second": 0.5,
        "samples_per_second": 8.0,
        "tokens_per_second": 2000.0,
        "seconds_left": 99 * 2.0,
    }
    with sheet.within("evaluation"):
        clock.now += 4
    clock.now += 1
    sheet.step_ended(502)
    told = speed.told(502, 600, 1_004_000, 16)  # tokens are not counted by this Trainer
    assert told == {
        "steps_per_second": 1.0,  # since the line before, without the evaluation
        "samples_per_second": 16.0,
        "seconds_left": 98 * 7 / 2,  # with it
    }
    assert speed.seconds_left(700, 600) == 0


def test_every_moment_is_in_one_kind() -> None:
    clock = Clock()
    sheet = TimeSheet(clock, began=90.0)
    with sheet.within("restore"):
        clock.now += 5
        with sheet.within("save"):
            clock.now += 1
    sheet.at("step")
    clock.now += 3
    sheet.move(2, "step", "save")
    sheet.move(99, "evaluation", "save")  # no more than there is
    assert sheet.told() == {"startup": 10, "restore": 5, "save": 3, "step": 1, "evaluation": 0}
    clock.now -= 50  # a clock that is set back takes nothing away
    assert sum(sheet.told().values()) == 19
