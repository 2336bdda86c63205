"""Of a run folder on a machine's own disk (`node_local`): whose it is, and where the rest is."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from typing import Self

from keepstep.output.printable import printable, quoted
from keepstep.policy.strict import TextError, build, with_check
from keepstep.run_folder.paths import RunPaths
from keepstep.run_folder.safe_read import OddFileError, read_object


@dataclass(frozen=True)
class Place:
    """Where a machine's part of a run belongs, as the newest attempt wrote it down there.

    Attributes:
        host: the machine.
        main: the main process's machine, which has the run's log.
        mirror: the run's address; None: it has none.
    """

    host: str
    main: str
    mirror: str | None = None

    @classmethod
    def alone(cls, mirror: str | None) -> Self:
        """Of this machine, where it has the main process."""
        return cls(socket.gethostname(), socket.gethostname(), mirror)

    def as_text(self) -> bytes:
        return with_check(json.dumps(asdict(self))).encode() + b"\n"


def read_place(run: RunPaths) -> Place | None:
    """None: it is not known, or the folder is no machine's own."""
    try:
        told = read_object(run.place)
        place: Place = build(Place, told)
    except (OSError, OddFileError, TextError):
        return None
    return place


def tell_place(run: RunPaths) -> str:
    """For people, of a folder that has parts of checkpoints."""
    place = read_place(run)
    if place is None:
        return "This is one machine's part of the run (node_local)"
    log = "with the run's log" if place.main == place.host else f"the run's log is on {place.main}"
    told = f"This is the part of the run on {place.host} (node_local), {log}"
    whole = f"; whole checkpoints: keepstep ls {quoted(place.mirror)}" if place.mirror else ""
    return printable(told + whole)
