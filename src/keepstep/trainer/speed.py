"""How fast this attempt trains, from its own first step on: what earlier attempts made counts
nowhere here."""

from __future__ import annotations

from collections.abc import Mapping

from keepstep.ranks.time_sheet import TimeSheet


class Speed:
    """Ranks: any, each by its own clock."""

    def __init__(self, time_sheet: TimeSheet) -> None:
        self._time_sheet = time_sheet
        self._began: tuple[int, int, Mapping[str, float]] = 0, 0, {}
        self._told = self._began

    def begin(self, step: int, tokens: int) -> None:
        """Training begins at this step, with so many tokens seen by earlier attempts."""
        self._began = self._told = step, tokens, self._time_sheet.told()

    def seconds_left(self, step: int, planned: int) -> float | None:
        """Until the last planned step, with the evaluations and saves that there were so far; None:
        no step is made yet."""
        made = step - self._began[0]
        if made <= 0:
            return None
        spent, before = self._time_sheet.told(), self._began[2]
        whole = sum(_since(before, spent, kind) for kind in ("step", "evaluation", "save"))
        return max(0, planned - step) * whole / made

    def told(self, step: int, planned: int, tokens: int, rows: int) -> dict[str, float]:
        """Since this was told last: `steps_per_second`, `samples_per_second`, and, where tokens are
        counted, `tokens_per_second`: of the time of steps alone; and `seconds_left`.

        Args:
            tokens: of all attempts together.
            rows: of a step, on all processes.
        """
        now = step, tokens, self._time_sheet.told()
        before, self._told = self._told, now
        steps, seconds = now[0] - before[0], _since(before[2], now[2], "step")
        if steps <= 0 or seconds <= 0:
            return {}
        found = {
            "steps_per_second": steps / seconds,
            "samples_per_second": rows * steps / seconds,
        }
        if now[1] > before[1]:
            found["tokens_per_second"] = (now[1] - before[1]) / seconds
        left = self.seconds_left(step, planned)
        return found if left is None else found | {"seconds_left": left}


def _since(before: Mapping[str, float], now: Mapping[str, float], kind: str) -> float:
    return now.get(kind, 0.0) - before.get(kind, 0.0)
