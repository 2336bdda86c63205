"""Three saves by two ranks; at the second, one rank cannot write files above 1000 bytes."""

from __future__ import annotations

import resource
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist

from keepstep.policy.retention import Policy
from keepstep.ranks import collectives
from keepstep.save.failure import SaveError
from keepstep.save.manager import CheckpointManager
from tests.helpers.folders import manifest

mode: Any
run, culprit, mode = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the kernel answers EFBIG
dist.init_process_group("gloo")
rank = collectives.rank()
manager = CheckpointManager(run, Policy(), mode=mode)
manager.start()
if mode != "off":
    assert manager.saver.reserve(1 << 20) is None
_, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for step in (1, 2, 3):
    limit = 1000 if step == 2 and rank == int(culprit) else unlimited
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited))
    log_position = sys.stdout  # the log is below 1000 bytes, and must stay writable
    try:
        manager.saver.save(
            manifest(step), lambda part: part.save(f"rank{rank}.pt", torch.zeros(5000))
        )
        manager.saver.settle()
    except SaveError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        print(f"told {rank}: {error}\n", end="", file=log_position, flush=True)  # one write
collectives.leave()
