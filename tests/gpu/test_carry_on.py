"""Killed and carried on, bit for bit, on one GPU. The same cases as part 1 of benchmarks/gpu.sh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.gpu.cases import CASES, Case, try_case
from benchmarks.gpu.launches import Budget
from benchmarks.gpu.machine import lacks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SECONDS = 900


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("carry-on")  # models are made once for all cases


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_killed_and_carried_on(folder: Path, case: Case) -> None:
    lacking = lacks(*case.packages)
    if lacking is not None:
        pytest.skip(lacking)
    try_case(case, folder, cpu=False, budget=Budget(SECONDS))
