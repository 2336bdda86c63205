"""Random SIGKILLs of real ZeRO-3 runs: the same command always carries on, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.folders import final_digests
from tests.helpers.ranks import Ranks, Run
from tests.helpers.recipes import argv

STEPS, KILLS_A_RUN = 24, 6
PATIENCE = {"max_attempts_without_progress": 1000}  # kills before the first commit are no loop


def end_like_a_launcher(attempt: Run) -> list[int]:
    """Most survivors notice that a rank is gone; a launcher ends those that do not by force.

    (One that waits for the dead rank in the making of a process group does not, for minutes.)
    """
    deadline = time.monotonic() + 5
    while None in attempt.poll() and time.monotonic() < deadline:
        time.sleep(0.05)
    attempt.kill(signal.SIGKILL)
    return attempt.wait()


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.long)])
def test_random_kills(
    ranks: Ranks, demo: Path, tmp_path: Path, kills: int, tell: Callable[[str], None]
) -> None:
    fields = {"max_steps": STEPS, "save_steps": 3, "eval_steps": 3, "save_total_limit": 2}
    ranks.run(argv(demo, tmp_path / "straight", **fields))
    expected = final_digests(tmp_path / "straight", STEPS)
    chance, fired, torn = random.Random(kills), 0, 0
    for number in range(1000):
        run = tmp_path / f"killed-{number}"
        command = argv(demo, run, **fields, **PATIENCE)
        for _ in range(min(KILLS_A_RUN, kills - fired)):
            attempt = ranks.start(command)
            # Most kills come in the steps and saves, some in the start of an attempt.
            if chance.random() < 0.8:
                attempt.wait_for(r"step +\d+/\d+  loss|nothing to train")
            time.sleep(chance.uniform(0, 2.5))
            victims = chance.choice([[0], [1], [0, 1]])
            alive = [rank for rank, code in enumerate(attempt.poll()) if code is None]
            attempt.kill(signal.SIGKILL, victims)
            codes = end_like_a_launcher(attempt)
            # 0: the run was over, and the process on its way out when the signal came.
            assert {codes[rank] for rank in victims if rank in alive} <= {-signal.SIGKILL, 0}
            fired += -signal.SIGKILL in [codes[rank] for rank in victims]
            torn += len(list((run / ".keepstep/staging").glob("*/*")))
            if set(codes) == {0}:
                break
        ranks.run(command)
        assert final_digests(run, STEPS) == expected
        if fired >= kills:
            break
    tell(f"{fired} kills in {number + 1} runs, {torn} of them in the middle of a save")
    assert fired >= kills
