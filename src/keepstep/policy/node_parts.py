"""Which checkpoints the machines of a run have together, each a part on its own disk; and what the
main process's machine lacks that another one has. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Held:
    """What a machine has of a checkpoint.

    Attributes:
        whole: a digest of the whole checkpoint's manifest: a branch may have saved its step again.
        count: how many files the whole has.
        names: of the files that this machine has.
        run: the run's name.
        attempt: that has saved it.
    """

    whole: str
    count: int
    names: frozenset[str]
    run: str = ""
    attempt: int = 0


@dataclass(frozen=True)
class Machine:
    """What a machine's folder tells of the run.

    Attributes:
        host: its name.
        run: the run's name; None: no run has used the folder.
        log: the newest attempt that its log tells of, and how many lines that has. (An attempt's
            log is whole where its main process was, and elsewhere the beginning of it, or none.)
        parts: what it has of each checkpoint, by step.
    """

    host: str
    run: str | None
    log: tuple[int, int] = (0, 0)
    parts: Mapping[int, Held] = field(default_factory=dict)


def together(
    held: Mapping[int, Mapping[int, Held]], run: str | None = None
) -> dict[int, dict[str, int]]:
    """The checkpoints of which no file is missing. Of several of one step the latest attempt's.

    Args:
        held: of each machine's first rank, what the machine has: step → part.
        run: of this run; None: of any.

    Returns:
        step → file → the first rank of a machine that has it: the lowest.
    """
    files: dict[tuple[int, int, str], dict[str, int]] = {}
    counts: dict[tuple[int, int, str], int] = {}
    for rank in sorted(held, reverse=True):
        for step, part in held[rank].items():
            if run is not None and part.run != run:
                continue
            key = step, part.attempt, part.whole
            files.setdefault(key, {}).update(dict.fromkeys(part.names, rank))
            counts[key] = part.count
    whole = {key: found for key, found in files.items() if len(found) == counts[key]}
    return {step: found for (step, _, _), found in sorted(whole.items())}


def runs_of(machines: Iterable[Machine]) -> dict[str, list[str]]:
    """The runs whose checkpoints machines have; where none has any, those that have used their
    folders: run → hosts."""
    by_parts: dict[str, list[str]] = {}
    by_folder: dict[str, list[str]] = {}
    for machine in machines:
        for run in sorted({part.run for part in machine.parts.values()}):
            by_parts.setdefault(run, []).append(machine.host)
        if machine.run is not None:
            by_folder.setdefault(machine.run, []).append(machine.host)
    return by_parts or by_folder


def whose_log(machines: Mapping[int, Machine], run: str) -> int | None:
    """The rank whose machine knows more of what has happened in the run than the main process's
    does; None: nobody does.

    Args:
        machines: by their first ranks; the main process is the lowest.
    """
    main, *others = sorted(machines)
    known = machines[main].log if machines[main].run == run else (-1, 0)
    ahead = [rank for rank in others if machines[rank].run == run and machines[rank].log > known]
    return max(ahead, key=lambda rank: machines[rank].log, default=None)


def to_show(
    machines: Mapping[int, Machine], found: Mapping[int, Mapping[str, int]]
) -> dict[int, int]:
    """The checkpoints that the machines have together and of which the main process's has nothing,
    or another branch's: step → a rank that can tell what belongs to it.

    Args:
        machines: by their first ranks; the main process is the lowest.
        found: as `together` has found it.
    """
    parts = machines[min(machines)].parts
    lacking = {}
    for step, sources in found.items():
        source = next(iter(sources.values()))
        if step not in parts or parts[step].whole != machines[source].parts[step].whole:
            lacking[step] = source
    return lacking


def left_over(
    machines: Mapping[int, Machine], run: str, known: int, takeable: Collection[int]
) -> dict[int, list[str]]:
    """Checkpoints that have been saved, and cannot be had any more, as far as anybody has a part:
    step → the hosts that have one.

    The main process commits last, so a part that only others have may be of no checkpoint; its
    machine knows that of the attempts that its own log tells of.

    Args:
        machines: by their first ranks; the main process is the lowest.
        known: the newest attempt that the main process's folder tells of, by itself.
        takeable: the steps that can be had.
    """
    main, lost = min(machines), dict[int, list[str]]()
    own = machines[main].parts
    for _, machine in sorted(machines.items()):
        for step, part in machine.parts.items():
            saved = part.attempt > known or (step in own and own[step].whole == part.whole)
            hosts = lost.setdefault(step, []) if part.run == run and saved else []
            if machine.host not in hosts:
                hosts.append(machine.host)
    return {step: lost[step] for step in sorted(lost) if step not in takeable}
