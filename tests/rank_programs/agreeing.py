"""Three ranks compare their settings, and tell each other their problems."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch.distributed as dist

from keepstep.preflight import agreement
from keepstep.preflight.agreement import agree, differing
from keepstep.ranks import collectives
from keepstep.recipe.problems import ConfigError, Problem


def say(text: object) -> None:
    os.write(1, f"rank {collectives.rank()}: {text}\n".encode())


dist.init_process_group("gloo")
rank = collectives.rank()
alike = {"dataset": "0f3c", "seed": 1}
say(f"alike: {differing(alike)}")
apart = alike | ({"seed": 2} if rank == 1 else {}) | ({"late": True} if rank == 2 else {})
say(f"apart: {'; '.join(problem.what for problem in differing(apart))}")
versions = {"keepstep": f"0.{rank // 2}", "torch": f"2.{rank}"}
of_all = differing(alike, versions)
say(f"versions: {'; '.join(f'{one.severity}: {one.what}' for one in of_all)}")
with tempfile.TemporaryDirectory() as other:
    if rank == 1:
        agreement.PACKAGE = shutil.copytree(agreement.PACKAGE, Path(other) / "keepstep")
        with (agreement.PACKAGE / "train.py").open("a") as train:
            train.write("# changed on this machine alone\n")
    (problem,) = differing(alike)
    say(f"code: {problem.severity}: {problem.what}")
agree([])
agree([Problem("a warning", severity="warning")])
try:
    agree([Problem("rank 2 cannot read it")] if rank == 2 else [])
except ConfigError as error:
    say(f"refused: {error.problems[0].what}")
collectives.leave()
