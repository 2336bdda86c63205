"""Part 1: every way to train, killed and carried on, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.gpu.cases import CASES, LARGE, Case, small, try_case
from benchmarks.gpu.launches import Budget, LaunchError
from benchmarks.gpu.machine import lacks
from benchmarks.gpu.table import Goal, Row, Table

AT_ONCE = 4  # small cases on one GPU: their start takes longest, and that on the host
LEAST_SECONDS = 30  # a case is not begun with less


def run(table: Table, folder: Path, cpu: bool, budget: Budget, only: Sequence[str] = ()) -> None:
    """Add a row for each case. `only`: those whose name holds one of these words."""
    chosen = [case for case in CASES if not only or any(word in case.name for word in only)]
    cases = [small(case) for case in chosen] if cpu else chosen
    with ThreadPoolExecutor(1 if cpu else AT_ONCE) as several, ThreadPoolExecutor(1) as alone:
        tried: dict[Future[Row], Case] = {}
        for case in cases:
            pool = alone if case.millions >= LARGE else several
            tried[pool.submit(row_of, case, folder, cpu, budget)] = case
        for done in as_completed(tried):
            table.add(done.result())


def row_of(case: Case, folder: Path, cpu: bool, budget: Budget) -> Row:
    """Try one case; what came of it."""
    lacking = lacks(*case.packages)
    if lacking is not None:
        return Row(case.name, None, note=lacking)
    if budget.left < LEAST_SECONDS:
        return Row(case.name, None, note="not run: the part's time is used up")
    try:
        seconds = try_case(case, folder, cpu, budget)
    except LaunchError as error:
        if budget.left < 1:
            return Row(case.name, None, note=f"not finished: the part's time is used up ({error})")
        return Row(case.name, None, note=str(error), failed=True)
    note = f"straight, killed and carried on: {seconds:.0f} s"
    return Row(case.name, 0, "files differ", Goal("==", 0), note)
