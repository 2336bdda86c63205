"""What one rank sees, all ranks tell; what is not the same on all is named with the ranks."""

from __future__ import annotations

import re

from tests.helpers.ranks import PROGRAMS, Ranks


def test_ranks_agree_or_end_alike(ranks: Ranks) -> None:
    run = ranks.start(strategy="ddp", processes=3, script=PROGRAMS / "agreeing.py")
    assert run.wait() == [0, 0, 0], run.output
    late = "late differs between ranks: not set on rank 0, True on rank 2"
    seed = "seed differs between ranks: 1 on rank 0, 2 on rank 1"
    keepstep = "error: the version of keepstep differs between ranks: 0.0 on rank 0, 0.1 on rank 2"
    torch = "warning: the version of torch differs between ranks: 2.0 on rank 0, 2.1 on rank 1"
    code = "error: the code of keepstep differs between ranks: [0-9a-f]{12} on rank 0, "
    code += "[0-9a-f]{12} on rank 1"
    for rank in range(3):
        assert re.search(f"rank {rank}: code: {code}\n", run.output)
        assert f"rank {rank}: versions: {keepstep}; {torch}" in run.output
        assert f"rank {rank}: alike: []" in run.output
        assert f"rank {rank}: apart: {late}; {seed}" in run.output
        assert f"rank {rank}: refused: rank 2 cannot read it" in run.output
    assert run.output.count("a warning") == 1
