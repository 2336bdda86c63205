"""`keepstep show`: what a run was, how each attempt ended, and the way on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from keepstep.cli.common import JsonOption, RunArgument, app, console, examples, used_run
from keepstep.cli.rows import JsonObject
from keepstep.cli.status import RunStatus, in_words, job_of, status_of
from keepstep.output.printable import first_few, quoted
from keepstep.output.units import counted
from keepstep.policy.goodput import Goodput
from keepstep.policy.lineage import RECIPE, Attempt
from keepstep.run_folder.by_hand import may_be_at_work
from keepstep.run_folder.launched import Launched, changed, launched_of
from keepstep.run_folder.progress import goodput_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.said import last_words, said_by

LAST_WORDS = 12  # lines
NO_WORD = {"running": "at work", "killed": "killed", "unknown": "no word of its end"}
CUT = 120  # characters of a value, and of a reason in a list
FOLLOWS = {  # outcome → what it means
    "finished": "all that was asked for is trained, and its last save is committed",
    "preempted": "somebody or something asked for a stop; the state is saved",
    "rewound": "a step had spoilt the run: the next attempt goes on from before it",
    "failed": "it ended with an error",
    "no_progress": "every checkpoint that there is has been tried, in vain",
}


@dataclass(frozen=True)
class AttemptShown(JsonObject):
    """One attempt.

    Attributes:
        number: counted from 1.
        began: when (UTC, ISO 8601); null: the line that told it is lost.
        last: its last word or sign of life.
        resumed_from: the step that it began at; null: it had not come so far.
        reached: the step at which it ended, or gave its last sign of life; null: not known.
        commits: checkpoints that it committed.
        outcome: how it ended; null: it has not told.
        exit: its exit status; null: likewise.
        reason: what asked for its end, or the error; null: there is none.
        changed: fields of the recipe that the attempt before had otherwise: name → before, now.
        launched: what is kept of its launch (docs/format.md); null: an older version's, or lost.
        said: the files that hold what it said, in the run folder; empty: an older version's.
        last_words: the last lines of these, if it failed, or was killed; else empty.
    """

    number: int
    began: str | None
    last: str | None
    resumed_from: int | None
    reached: int | None
    commits: int
    outcome: str | None
    exit: int | None
    reason: str | None
    changed: dict[str, Any]
    launched: dict[str, Any] | None
    said: tuple[str, ...]
    last_words: tuple[str, ...]


@dataclass(frozen=True)
class RunShown(JsonObject):
    """What a run was, and how it stands.

    Attributes:
        status: as `keepstep status` has it.
        why: what the outcome, or the state, means.
        attempts: every one, the oldest first.
        way_on: the command that carries on, or null: there is nothing to do, or it is not known.
    """

    status: RunStatus
    why: str
    attempts: tuple[AttemptShown, ...]
    way_on: str | None


@app.command(epilog=examples("keepstep show runs/mine", "keepstep show runs/mine --json"))
def show(run: RunArgument, as_json: JsonOption = False) -> None:
    """Tell what a run was: its model, data, code and hosts, how each attempt ended, the way on."""
    folder = used_run(run)
    with folder.held():
        found = shown(folder)
        spent = goodput_of(folder)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    else:
        _tell_shown(run, found, spent)
    if found.status.faults:
        raise typer.Exit(1)


def _tell_shown(run: Path, found: RunShown, spent: Goodput) -> None:
    _tell(run, found)
    if spent.wall:
        console.tell_named("goodput", spent.told())
    for attempt in found.attempts:
        state = found.status.state if attempt is found.attempts[-1] else "killed"
        _tell_attempt(attempt, NO_WORD.get(state, "no word of its end"))
    _tell_last_words(run, found.attempts)
    for name, fault in (found.status.faults or {}).items():
        console.tell(f"{name}: {fault}")
    if found.way_on is not None:
        mended = ", once that is mended" if found.status.exit == RECIPE else ""
        console.tell(f"the way on{mended}:")
        console.tell_whole(f"  {found.way_on}")


def shown(run: RunFolder) -> RunShown:
    """What is known of a run."""
    status, launched = status_of(run), launched_of(run)
    rows, before = [], None
    for attempt in run.attempts():
        if not attempt.number:  # what was adopted is of none
            continue
        now = launched.get(attempt.number)
        other: dict[str, Any] = changed(before.recipe, now.recipe) if before and now else {}
        rows.append(_row(run, attempt, now, {name: list(pair) for name, pair in other.items()}))
        before = now or before
    if rows and status.outcome is not None and rows[-1].outcome is None:
        # The line about its end is lost; status.json has the same.
        end: dict[str, Any] = {
            "outcome": status.outcome,
            "exit": status.exit,
            "reason": status.reason,
        }
        rows[-1] = replace(rows[-1], **end, reached=status.step or rows[-1].reached)
    return RunShown(
        status=status,
        why=_why(status),
        attempts=tuple(rows),
        way_on=_way_on(run, status, list(launched.values())),
    )


def _row(
    run: RunFolder, attempt: Attempt, launched: Launched | None, other: dict[str, Any]
) -> AttemptShown:
    last = max((spent.step for spent in attempt.spent), default=0) or None
    begun = attempt.request is not None or attempt.commits
    return AttemptShown(
        number=attempt.number,
        began=attempt.began,
        last=attempt.last,
        resumed_from=attempt.resumed_from if begun and attempt.begun_at_known else None,
        reached=last if attempt.outcome is None else attempt.reached,
        commits=attempt.commits,
        outcome=attempt.outcome,
        exit=attempt.exit,
        reason=attempt.reason,
        changed=other,
        launched=None if launched is None else vars(launched).copy(),
        said=tuple(p.relative_to(run.path).as_posix() for p in said_by(run, attempt.number)),
        last_words=_last_words(run, attempt),
    )


def _last_words(run: RunFolder, attempt: Attempt) -> tuple[str, ...]:
    """Of an attempt that did not end as it was to."""
    fine = ("finished", "preempted", "rewound")
    if attempt.outcome in fine or (attempt.outcome is None and may_be_at_work(run)):
        return ()
    return tuple(last_words(run, attempt.number, LAST_WORDS))


def _why(status: RunStatus) -> str:
    if status.outcome == "failed" and status.exit == RECIPE:
        return "it ended with an error, and the same command would again"
    if status.outcome is not None:
        return FOLLOWS[status.outcome]
    return {
        "new": "nobody has launched it",
        "running": "its process is there",
        "killed": "by SIGKILL, for lack of memory, or with its machine: such an end tells nothing",
        "unknown": "nothing has been heard of its end",
        "ended": "",
    }[status.state]


def _way_on(run: RunFolder, status: RunStatus, launched: list[Launched]) -> str | None:
    """The command that carries on: the newest attempt's own."""
    done = status.outcome == "finished" and status.exit == 0
    if done or status.state == "running" or not launched or job_of(run) is not None:
        return None
    newest = launched[-1]
    if newest.command.startswith("cd "):  # a job has told where it was submitted
        return newest.command
    return f"cd {quoted(newest.directory)} && {newest.command}"


def _tell(run: Path, found: RunShown) -> None:
    status, of = found.status, found.attempts
    console.tell(f"{run}: {in_words(status)}")
    newest = next((a.launched for a in reversed(of) if a.launched is not None), None)
    checkpoints = [f"{status.checkpoints} committed"]
    checkpoints += [] if status.newest is None else [f"newest checkpoint-{status.newest}"]
    checkpoints += [] if status.best is None else [f"best checkpoint-{status.best}"]
    lines = {
        "which means": found.why,
        "reason": " ".join((status.reason or "").split()),
        "checkpoints": ", ".join(checkpoints),
        **(launch_in_words(newest) if newest else {}),
        "next": status.next,
    }
    for name, text in lines.items():
        if text:
            console.tell_named(name, text)


def launch_in_words(newest: Mapping[str, Any]) -> dict[str, str]:
    """Where it came from, as the newest attempt was launched."""
    versions, code, hosts = newest["versions"], newest["code"], newest["hosts"]
    known = ("keepstep", "torch", "transformers", "trl", "deepspeed")
    commit = f"commit {code['commit'][:12]}" if "commit" in code else ""
    files = code.get("changed", "0")
    if files != "0":
        differ = "file that differs" if files == "1" else "files that differ"
        commit += f", and {files} {differ} from it"
    named = [f"{host} ({counted(n, 'process')})" for host, n in hosts.items()]
    return {
        "model": newest["model"] or "an object of the script",
        "data": "; ".join(f"{what}: {source}" for what, source in newest["data"].items())
        or "given by the script",
        "hosts": f"{first_few(named)}; {newest['hardware']}",
        "versions": ", ".join(f"{name} {versions[name]}" for name in known if name in versions),
        "code": commit,
    }


def _tell_attempt(attempt: AttemptShown, no_word: str) -> None:
    console.tell(f"attempt {attempt.number}: {_story(attempt, no_word)}")
    reason = " ".join((attempt.reason or "").split())
    if reason:
        console.tell(_cut(f"  {reason}", min(CUT, console.margin or CUT)))
    for line in _changes(attempt.changed):
        console.tell(f"  {line}")


def _tell_last_words(run: Path, attempts: Sequence[AttemptShown]) -> None:
    """What the newest attempt said, and where the rest is."""
    if not attempts or not attempts[-1].said:
        return
    newest = attempts[-1]
    console.tell_named("it said", f"keepstep log {quoted(run)} --said ({newest.said[0]})")
    margin = console.margin
    for line in newest.last_words:
        console.tell(f"    | {line}" if margin is None else _cut(f"    | {line}", margin))


def _story(attempt: AttemptShown, no_word: str) -> str:
    """
    Args:
        no_word: what has become of one that has not told of its end.
    """
    began = "" if attempt.began is None else f"began {attempt.began[:19].replace('T', ' ')} UTC"
    start = attempt.resumed_from
    parts = [began, "" if not start else f"from step {start}"]
    at = "" if attempt.reached is None else f" at step {attempt.reached}"
    if attempt.outcome is not None:
        status = "" if attempt.exit in (None, 0) else f" (exit status {attempt.exit})"
        parts.append(f"{attempt.outcome}{at}{status}")
    else:
        parts.append(f"{no_word}, last heard of{at or ' before its first step'}")
    parts.append(f"{attempt.commits} saved")
    return ", ".join(part for part in parts if part)


def _changes(other: Mapping[str, Any]) -> Iterator[str]:
    for name, (before, now) in other.items():
        yield f"{name}: {_cut(json.dumps(before))} → {_cut(json.dumps(now))}"


def _cut(text: str, at: int = CUT) -> str:
    return text if len(text) <= at else f"{text[: at - 1]}…"
