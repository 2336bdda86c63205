"""`keepstep log`: what has happened to a run, a sentence a line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from keepstep.cli.common import (
    JsonOption,
    RunArgument,
    app,
    console,
    examples,
    fail,
    tell_part,
    used_run,
)
from keepstep.cli.rows import JsonObject
from keepstep.output.units import be, counted
from keepstep.policy.sentences import sentence
from keepstep.run_folder.events import read_lines
from keepstep.run_folder.paths import RunPaths
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import ABSENT, LONGEST_LOG, read_bytes
from keepstep.run_folder.said import lines_said, said_by

LOOK_SECONDS = 0.5
UNTOLD = ("time", "attempt", "event")


@dataclass(frozen=True)
class LogLine(JsonObject):
    """Something that happened.

    Attributes:
        time: when it was written down (UTC, ISO 8601).
        attempt: whose line it is; null: a Slurm job's.
        event: what kind (docs/format.md has them all).
        sentence: the same for people.
        facts: the other fields of the line.
    """

    time: str
    attempt: int | None
    event: str
    sentence: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class SaidLine(JsonObject):
    """A line of what an attempt said, as `--said` tells it.

    Attributes:
        attempt: whose it is.
        file: that holds it, in the run folder; of several parts the older comes first.
        text: the line, without secrets.
    """

    attempt: int
    file: str
    text: str


@app.command(
    epilog=examples(
        "keepstep log runs/mine",
        "keepstep log runs/mine --follow",
        "keepstep log runs/mine --said --attempt 2",
    )
)
def log(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens from now on.")
    ] = False,
    said: Annotated[
        bool,
        typer.Option("--said", help="Print what an attempt itself said, in the place of events."),
    ] = False,
    attempt: Annotated[
        int | None,
        typer.Option(
            "--attempt",
            min=1,
            metavar="N",
            help="This attempt's alone; with --said without it the newest attempt's.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what has happened to a run, a sentence a line: starts, saves, errors, ends."""
    folder = used_run(run)
    if said and follow:
        fail("--follow goes with events, not with --said")
    if said:
        _tell_said(folder, attempt, as_json)
        return
    if attempt is not None and not follow:  # one that is followed may be to come
        _known(folder, attempt)
    damaged = 0
    if not follow and not as_json and not folder.events.exists():
        console.tell(f"{run}: nothing is written down: there is no {folder.events.name}")
        tell_part(folder, folder.checkpoints())
    try:
        for lines, lost in _new_lines(folder, follow):
            damaged += lost
            for line in lines:
                if attempt in (None, line.attempt):
                    _tell(line, as_json)
    except KeyboardInterrupt:
        if not follow:
            raise
    if damaged and not as_json:
        console.tell(f"{counted(damaged, 'line')} {be(damaged)} damaged, and passed by")


def _tell_said(run: RunFolder, attempt: int | None, as_json: bool) -> None:
    number = attempt or max((one.number for one in run.attempts() if one.number), default=0)
    paths = _known(run, number)
    for path in paths:
        name = path.relative_to(run.path).as_posix()
        if path != paths[0] and not as_json:
            console.tell(f"[{name}]")
        for text in lines_said(path):
            if as_json:
                typer.echo(json.dumps(SaidLine(number, name, text).as_dict()))
            else:
                console.tell(text)
    if not paths and not as_json:
        console.tell(f"attempt {number}: nothing is kept of what it said")


def _known(run: RunFolder, number: int) -> list[Path]:
    """What an attempt has said, which there must have been."""
    known = [one.number for one in run.attempts() if one.number]
    paths = said_by(run, number)
    if number not in known and not paths:
        fail(f"{run.path} has no attempt {number}; there: {', '.join(map(str, known)) or 'none'}")
    return paths


def _new_lines(run: RunPaths, follow: bool) -> Iterator[tuple[list[LogLine], int]]:
    """The lines that are there, then those that come; each time with how many are damaged."""
    end = 0
    while True:
        try:
            text = read_bytes(run.events, LONGEST_LOG, end)
        except ABSENT:
            text = b""
        # The last line is being written, or was torn: another follows it on a line of its own.
        whole = text if not follow else text[: text.rfind(b"\n") + 1]
        end += len(whole)
        events, damaged = read_lines(whole.decode(errors="replace"), of_jobs=True)
        yield [_line(event) for event in events], damaged
        if not follow:
            return
        time.sleep(LOOK_SECONDS)


def _line(event: dict[str, Any]) -> LogLine:
    facts = {name: value for name, value in event.items() if name not in UNTOLD}
    told = sentence(event)
    return LogLine(event["time"], event.get("attempt"), event["event"], told, facts)


def _tell(line: LogLine, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(line.as_dict()))
        return
    who = "job" if line.attempt is None else str(line.attempt)
    begin = f"{line.time[:19].replace('T', ' ')}Z  {who:>3}  "
    console.tell(begin + line.sentence, hang=len(begin))
