"""Sizes and lengths of time, as people write and read them. Pure."""

from __future__ import annotations

import re
from datetime import datetime

BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def counted(count: int, what: str) -> str:
    """`1 step`, `2,000 steps`, `2 processes`."""
    ends = "" if count == 1 else "es" if what.endswith("ss") else "s"
    return f"{count:,} {what}{ends}"


def be(count: int) -> str:
    """What goes with it: 1 is, 2 are."""
    return "is" if count == 1 else "are"


def human_bytes(count: float) -> str:
    """A size as people read it: powers of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_bytes(text: str | int) -> int:
    """`200GB`, `1.5 TB`, `300M` or a plain number, in powers of 1000.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", str(text).lower())
    if match is None:
        raise ValueError(f"{text!r} is no size like 200GB")
    return int(float(match.group(1)) * BYTES[match.group(2)])


def human_duration(seconds: float) -> str:
    """A length of time as people read it: `2 h 5 min`, `4 min 30 s`, or `9 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def parse_duration(text: str) -> float:
    """Seconds of `90`, `45m`, `3h30m`, `1d`, and of Slurm's `3:30:00` and `1-12:00:00`.

    Raises:
        ValueError: it is none of these.
    """
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip())
    if clock:  # 3:30 would be hours and minutes to one, minutes and seconds to another
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    parts = re.fullmatch(r"(?:\d+(?:\.\d+)?[dhms])+|(\d+(?:\.\d+)?)", text.strip())
    if parts is None:
        raise ValueError(
            f"{text!r} is no length of time, as 45m, 3h30m, 3:30:00 or 90 (seconds) are"
        )
    if parts.group(1):
        return float(parts.group(1))
    found = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    return sum(float(number) * SECONDS[unit] for number, unit in found)


def parse_moment(text: str) -> float:
    """Seconds since the epoch of an ISO 8601 date and time (local, unless it names a zone).

    Raises:
        ValueError: it is none.
    """
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        raise ValueError(f"{text!r} is no moment, as 2026-11-25T08:00 is") from None
