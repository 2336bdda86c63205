"""What a host of containers is told."""

from __future__ import annotations

from keepstep.policy.probes import grace_seconds, health

LIMITS = {"hang_timeout_seconds": 100.0, "save_timeout_seconds": 50.0}


def test_only_what_stands_still_here_for_too_long_is_unhealthy() -> None:
    assert not health(True, 151, LIMITS).healthy
    assert health(True, 150, LIMITS).healthy  # a hang that a save came after
    assert health(True, None, LIMITS).healthy  # it begins
    for alive in (False, None):  # its launcher ends, or begins anew; another machine's
        assert health(alive, 1e9, LIMITS).healthy
    assert health(True, 3000, {}).healthy
    assert not health(True, 3001, {}).healthy


def test_grace() -> None:
    """The longest step, a save under way, the last one, leaving; a copy if there is a mirror."""
    saves = [{"stall": 1.0, "write": 2.0, "commit": 1.0, "longest_step": 3.0}] * 40
    saves += [{"stall": 90.0, "longest_step": 8.5}]  # one in forty is no rule
    assert grace_seconds(saves) == 47  # 8.5 + 2 x 4 + 30, rounded up
    assert grace_seconds(saves, has_mirror=True) == 107
    assert grace_seconds([]) is None
    assert grace_seconds([{"stall": 4.0}]) is None  # of an older version
