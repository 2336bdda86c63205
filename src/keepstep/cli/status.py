"""`keepstep status`: how a run stands, in a sentence for people, a value for shells, or JSON."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keepstep.cli.common import (
    JsonOption,
    RunArgument,
    app,
    console,
    errors_apart,
    examples,
    fail,
    one_answer,
    used_run,
)
from keepstep.cli.probe import health_at, health_of
from keepstep.cli.rows import JsonObject
from keepstep.output.printable import printable, quoted
from keepstep.output.units import human_duration
from keepstep.policy.lineage import Attempt
from keepstep.policy.manifest import BOUNDS
from keepstep.policy.next_step import advice
from keepstep.policy.probes import grace_seconds
from keepstep.policy.retention import best_step
from keepstep.policy.strict import TextError, build
from keepstep.ranks.outcome import Word
from keepstep.run_folder.notes import notes_on
from keepstep.run_folder.ownership import process_lives
from keepstep.run_folder.progress import goodput_of, reached_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, OddFileError, is_file, read_object, read_text

State = Literal["new", "running", "ended", "killed", "unknown"]


@dataclass(frozen=True)
class RunStatus(JsonObject):
    """How a run stands.

    Attributes:
        state: `new`: no attempt has begun. `running`: the newest attempt's process is there.
            `ended`: it has told how it ended. `killed`: its process is gone, without a word.
            `unknown`: it may be at work on another machine, or was killed there.
        outcome: how the newest attempt ended; null: it has not told.
        reason: what asked for the stop, or the error; null: there is none.
        exit: the exit status that the attempt named.
        step: the optimizer steps completed when it ended.
        attempt: the number of the newest attempt, which is how many there were; 0: none.
        newest: the step of the newest checkpoint that is on no abandoned branch.
        best: the step of the best checkpoint by the metric.
        checkpoints: how many are committed.
        owner: the name of the attempt that may change the run folder.
        owner_alive: whether its process is there; null: that cannot be seen from this machine.
        silent_seconds: since the last sign of life in the run folder, by this machine's clock.
        reached: the optimizer steps completed, by the newest sign of life, or its end; null: none
            is known.
        planned: the steps that the run is to have; null: not known.
        loss: the training loss that the newest attempt has logged last; null: none is known.
        tokens_per_second: between its last two log lines, of the time of steps alone; null: not
            known, or no longer: it is not at work.
        samples_per_second: likewise, rows.
        seconds_left: until the last step, by what this attempt's steps, evaluations and saves have
            taken; null: likewise.
        goodput: the share of the wall time that were productive steps, in percent; null: nothing is
            known of it.
        grace_seconds: what a stop request is to be given before SIGKILL: the longest step, twice
            what 95 % of saves took at most, 60 s for a copy if there is a mirror, 30 s to leave;
            null: no save has told yet.
        job: the batch job that is queued or at work for the run.
        requests: what somebody has asked for, and nobody has taken up: stop, save-now.
        faults: the run's own files that cannot be believed, and why; and its checkpoints, if none
            of them can be taken.
        next: what a person may do now.
    """

    state: State = "new"
    outcome: Word | None = None
    reason: str | None = None
    exit: int | None = None
    step: int | None = None
    attempt: int = 0
    newest: int | None = None
    best: int | None = None
    checkpoints: int = 0
    owner: str | None = None
    owner_alive: bool | None = None
    silent_seconds: float | None = None
    reached: int | None = None
    planned: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    goodput: float | None = None
    grace_seconds: int | None = None
    job: str | None = None
    requests: tuple[str, ...] = ()
    faults: dict[str, str] | None = None
    next: str = ""


@dataclass(frozen=True)
class _Told:
    """What an attempt writes into status.json."""

    outcome: Word
    exit: int
    reason: str | None = None
    global_step: int | None = None
    owner: str | None = None


FIELDS = tuple(field.name for field in fields(RunStatus))


def read_told(path: Path) -> _Told:
    """What a status file tells.

    Raises:
        OddFileError, OSError: nothing that can be believed.
    """
    values, known = read_object(path), {field.name for field in fields(_Told)}
    try:
        told: _Told = build(_Told, {n: v for n, v in values.items() if n in known})
    except TextError as error:
        raise OddFileError(str(error)) from error
    if not 0 <= told.exit <= 255 or (told.outcome != "finished" and told.exit == 0):
        raise OddFileError(f"{told.outcome} does not go with exit status {told.exit}")
    if told.global_step is not None and not 0 <= told.global_step <= BOUNDS["global_step"][1]:
        raise OddFileError("global_step is beyond all counts")
    return told


def status_of(run: RunFolder) -> RunStatus:
    """How the run stands, as far as that can be seen from this machine. Nothing is changed."""
    attempts, faults = run.attempts(), notes_on(run)
    policy = run.policy()
    alive = [record for record in run.records(policy.metric) if not record.abandoned]
    owner, owner_alive = None, None
    try:
        words = run.owner_words()
        owner, owner_alive = next(iter(words), None), process_lives(words)
    except OSError as error:
        faults[run.owner_file.relative_to(run.path).as_posix()] = str(error)
    told = None
    try:
        told = read_told(run.status)
        if owner is not None and told.owner not in (None, owner):
            told = None  # of an earlier attempt: this one has only begun
    except ABSENT:
        pass
    except (OSError, OddFileError) as error:
        faults[run.status.relative_to(run.path).as_posix()] = str(error)
    checkpoints = run.checkpoints()
    faults |= {} if checkpoints else run.odd()
    begun, job = any(attempt.number for attempt in attempts), job_of(run)  # 0: what was adopted
    state = _state(begun, told, owner_alive)
    return RunStatus(
        state=state,
        outcome=told.outcome if told else None,
        reason=told.reason if told else None,
        exit=told.exit if told else None,
        step=told.global_step if told else None,
        attempt=attempts[-1].number if attempts else 0,
        newest=max((record.step for record in alive), default=None),
        best=best_step(alive, policy),
        checkpoints=len(checkpoints),
        owner=owner,
        owner_alive=owner_alive,
        silent_seconds=_silence(run) if state in ("running", "unknown") else None,
        **_progress(run, attempts[-1] if attempts else None, state, told),
        grace_seconds=grace_seconds(run.commits(), run.mirror() is not None),
        job=job,
        requests=run.requests(),
        faults=faults or None,
        next=_next(run, state, told, job),
    )


def _progress(
    run: RunFolder, newest: Attempt | None, state: State, told: _Told | None
) -> dict[str, Any]:
    """How far the newest attempt has got, and how fast it is."""
    spent, last = goodput_of(run), reached_of(run)
    found: dict[str, Any] = {"goodput": spent.shares()["productive"]} if spent.is_known else {}
    if newest is None:
        return found
    if last is not None and last.attempt == newest.number:
        planned = last.figures.get("planned_steps")
        found |= {"reached": last.step, "planned": None if planned is None else int(planned)}
        at_work = ("tokens_per_second", "samples_per_second", "seconds_left")
        names = ("loss", *(at_work if state in ("running", "unknown") else ()))
        found |= {name: round(last.figures[name], 6) for name in names if name in last.figures}
    if told is not None and told.global_step is not None:
        found["reached"] = told.global_step
    return found


def tell_without_checkpoints(run: RunFolder, path: Path) -> None:
    """Why no checkpoint of this run is listed.

    Raises:
        typer.Exit: there were some, and none can be taken.
    """
    odd, found = run.odd(), status_of(run)
    if odd:
        console.tell(f"{path}: {none_can_be_taken(len(odd))}")
        raise typer.Exit(1)
    removed = any(attempt.commits for attempt in run.attempts())  # by hand, or after an export
    none = "no checkpoint is left" if removed else "no checkpoint is committed yet"
    console.tell(f"{path}: {none}: {in_words(found)}")
    reason = " ".join((found.reason or "").split())
    if reason:
        console.tell(f"  reason: {reason}")
    if found.attempt:
        console.tell(f"  `keepstep show {quoted(path)}` tells more")


def in_words(found: RunStatus) -> str:
    """How it stands, in a sentence."""
    if found.state == "ended":
        said = f"{found.outcome}" + ("" if found.step is None else f" at step {found.step}")
        return f"{said} (attempt {found.attempt}, exit status {found.exit})"
    return {
        "new": "no attempt has begun",
        "running": f"attempt {found.attempt} is at work",
        "killed": f"attempt {found.attempt} was killed: its process is gone, without a word",
        "unknown": f"attempt {found.attempt} has not told of its end: it is at work elsewhere, or "
        "was killed",
    }[found.state]


def job_of(run: RunFolder) -> str | None:
    """The batch job that slurm/submit.sh has submitted for the run; None: there is none, or it has
    ended, and not to be queued again."""
    if not run.job.is_dir() or (run.job / "ended").exists():
        return None
    try:
        return read_text(run.job / "id").strip() or None
    except (*ABSENT, OddFileError):
        return None


def _state(begun: bool, told: _Told | None, owner_alive: bool | None) -> State:
    if told is not None:
        return "ended"
    if owner_alive:
        return "running"
    if not begun:
        return "new"
    return "unknown" if owner_alive is None else "killed"


def _next(run: RunFolder, state: State, told: _Told | None, job: str | None) -> str:
    if state == "running" and not _gets_on(run):
        return (
            "it has been silent for longer than it may: `keepstep stop` has it save and end; where "
            "that does nothing, kill it and launch the same command again"
        )
    again = "launch the same command again, and it carries on"
    elsewhere = "look whether it is at work: a launch takes the run from other machines"
    own = {
        "new": "launch it",
        "running": "nothing: `keepstep stop` has it save and end",
        "killed": again,
        "unknown": elsewhere if job is None else again,
        "ended": "" if told is None else advice(told.outcome, told.exit),
    }[state]
    is_over = told is not None and (told.outcome in ("finished", "no_progress") or told.exit == 2)
    if job is None or is_over or state in ("new", "running"):
        return own
    return f"nothing while `squeue --job {job}` lists it: it goes on by itself; else {own}"


def _silence(run: RunFolder) -> float | None:
    """Seconds since the heartbeat was written; None without one."""
    try:
        if not is_file(run.heartbeat):
            return None
        return round(max(0.0, time.time() - os.lstat(run.heartbeat).st_mtime), 1)
    except OSError:
        return None


@app.command(
    epilog=examples(
        "keepstep status runs/mine",
        "keepstep status runs/mine --field outcome",
        "keepstep status runs/mine --healthy",
        "keepstep status runs/mine --json",
    )
)
def status(
    run: RunArgument,
    field: Annotated[
        str | None,
        typer.Option(
            "--field",
            metavar="NAME",
            autocompletion=lambda incomplete: [n for n in FIELDS if n.startswith(incomplete)],
            help="Print this value alone, on one line. Exit status 1, and no line, says that "
            f"there is none. Names: {', '.join(FIELDS)}.",
        ),
    ] = None,
    as_json: JsonOption = False,
    healthy: Annotated[
        bool,
        typer.Option(
            "--healthy",
            help="For a container's liveness probe: exit status 1 if the attempt at work on this "
            "machine has not got on for longer than hang_timeout_seconds + save_timeout_seconds, "
            "else 0: also while it begins, saves or evaluates, and where there is no attempt.",
        ),
    ] = False,
) -> None:
    """Say how a run stands: how its newest attempt ended, at which step, and what to do now."""
    with errors_apart():
        one_answer(field=field is not None, json=as_json, healthy=healthy)
    if healthy:
        found_health = health_at(run)
        console.tell(("" if found_health.healthy else "unhealthy: ") + found_health.why)
        raise typer.Exit(0 if found_health.healthy else 1)
    with errors_apart() if field is not None else nullcontext():
        if field is not None and field not in FIELDS:
            fail(f"--field {field} is none of {', '.join(FIELDS)}")
        folder = used_run(run)
        with folder.held():  # one look, for all that is asked
            found = status_of(folder)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    elif field is not None:
        value = getattr(found, field)
        if value is None or value in ("", ()):
            raise typer.Exit(1)
        console.tell(_text(value))
    else:
        _tell(run, found)
    if found.faults and not field:
        raise typer.Exit(1)


def _text(value: Any) -> str:
    """A value on one line, as shells take it."""
    if isinstance(value, (tuple, dict)):
        return printable(" ".join(value))
    return printable(str(value).lower() if isinstance(value, bool) else str(value))


def tell_status(run: Path, folder: RunFolder) -> None:
    """How it stands, in a few lines."""
    _tell(run, status_of(folder))


def _so_far(found: RunStatus) -> str:
    parts = []
    if found.reached is not None:
        of = "" if not found.planned else f" of {found.planned}"
        parts.append(f"step {found.reached}{of}")
    parts += [] if found.loss is None else [f"loss {found.loss:.4f}"]
    if found.tokens_per_second is not None:
        parts.append(f"{found.tokens_per_second:,.0f} tokens/s")
    elif found.samples_per_second is not None:
        parts.append(f"{found.samples_per_second:,.3g} samples/s")
    parts += [] if found.seconds_left is None else [f"{human_duration(found.seconds_left)} left"]
    return ", ".join(parts)


def _tell(run: Path, found: RunStatus) -> None:
    reason = " ".join((found.reason or "").split())
    lines: dict[str, str | None] = {"": f"{run}: {in_words(found)}", "reason": reason}
    checkpoints = [f"{found.checkpoints} committed"]
    checkpoints += [] if found.newest is None else [f"newest checkpoint-{found.newest}"]
    checkpoints += [] if found.best is None else [f"best checkpoint-{found.best}"]
    lines["checkpoints"] = ", ".join(checkpoints)
    if found.silent_seconds is not None:
        lines["sign of life"] = f"{found.silent_seconds:.0f} s ago"
    lines["progress"] = "" if found.state == "ended" else _so_far(found)
    lines["goodput"] = "" if found.goodput is None else f"{found.goodput:.1f} %"
    lines |= {"job": found.job, "asked for": ", ".join(found.requests), "next": found.next}
    for name, text in lines.items():
        if text:
            console.tell_named(name, text)
    for name, fault in (found.faults or {}).items():
        console.tell(f"{name}: {fault}")


def _gets_on(run: RunFolder) -> bool:
    """As `--healthy` has it; where that cannot be known, it does."""
    try:
        return health_of(run).healthy
    except (*ABSENT, OSError, OddFileError):
        return True


def none_can_be_taken(count: int) -> str:
    """Of so many checkpoints that are damaged; a line for each stands above."""
    if count == 1:
        return "its only checkpoint cannot be taken, as it says"
    return f"none of {count:,} checkpoints can be taken; each says why"
