"""What a test tells the peer to do wrong."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal[
    "status",
    "reset",
    "hang",
    "delay",
    "throttle",
    "apply_then_status",
    "apply_then_reset",
    "stall",
    "cut",
    "damage",
    "no digest",
    "stale",
]
Role = Literal["hub", "storage"]


@dataclass
class Fault:
    """One rule. It skips `skip` requests that match, then meets the next `times`; -1 is for ever.

    Kinds:
        status: answers `status` with `headers` and does nothing.
        reset: reads `after_bytes` of the body, then resets the connection.
        hang: reads the body and says nothing until the peer stops.
        delay: waits `seconds`, or until `end`, then goes on as usual.
        throttle: reads the body at `rate` bytes a second.
        apply_then_status, apply_then_reset: do what was asked, and then say that it failed.

    Of the S3 server alone:
        stall, cut: half of what was asked for, and then nothing; or the connection ends.
        damage: one bit of what is read, or of what is stored, is another.
        no digest: the object's tag is none, as where the store has encrypted it.
        stale: a listing as it was when the same was last asked.
    """

    do: Kind
    method: str | None = None
    path: str = ""  # a regular expression, searched for in the path with its query
    role: Role | None = None
    skip: int = 0
    times: int = 1
    status: int = 503
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int = 0
    seconds: float = 1.0
    rate: float = 1e6
    hits: int = 0
    ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        if self.do not in get_args(Kind):
            raise ValueError(f"no such fault: {self.do}")

    def end(self) -> None:
        """Let go on what it delays."""
        self.ended.set()

    def matches(self, method: str, target: str, role: Role) -> bool:
        return (
            self.method in (None, method)
            and self.role in (None, role)
            and re.search(self.path, target) is not None
        )


class Faults:
    """The rules in force. The first that matches and is not used up counts."""

    def __init__(self) -> None:
        self._rules: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._rules.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            for rule in self._rules:
                rule.end()
            self._rules.clear()

    def take(self, method: str, target: str, role: Role) -> Fault | None:
        with self._lock:
            for fault in self._rules:
                if fault.times == 0 or not fault.matches(method, target, role):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1 if fault.times > 0 else 0
                fault.hits += 1
                return fault
        return None
