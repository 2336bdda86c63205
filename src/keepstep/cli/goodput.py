"""`keepstep goodput`: what a run's wall time went into."""

from __future__ import annotations

import json

import typer

from keepstep.cli.common import JsonOption, RunArgument, app, console, examples, used_run
from keepstep.cli.rows import GoodputReport
from keepstep.output.table import Column, Table
from keepstep.output.units import counted, human_duration
from keepstep.policy.goodput import TITLES, Goodput
from keepstep.run_folder.notes import fault_of_log
from keepstep.run_folder.progress import goodput_of
from keepstep.run_folder.reader import RunFolder


@app.command(epilog=examples("keepstep goodput runs/mine", "keepstep goodput runs/mine --json"))
def goodput(run: RunArgument, as_json: JsonOption = False) -> None:
    """Tell what a run's wall time went into: steps, steps made again, saves, waiting, and so on."""
    folder = used_run(run)
    with folder.held():
        found = goodput_of(folder)
        attempts = sum(1 for attempt in folder.attempts() if attempt.number)  # 0: adopted
    if as_json:
        _, damaged = folder.events_read()
        typer.echo(json.dumps(report(found, attempts, damaged).as_dict(), indent=1))
    elif not found.wall:
        none = (
            "the log does not tell what its time went into" if attempts else "no attempt has begun"
        )
        console.tell(f"{run}: {none}")
    else:
        console.tell(f"{run}: {human_duration(found.wall / 1000)}, {counted(attempts, 'attempt')}")
        console.table(_table(found))
    if not as_json and (fault := fault_of_log(folder)) is not None:
        console.tell(f"{folder.events.name}: {fault}: what they told is missing here")


def tell_short(folder: RunFolder) -> None:
    """The same in a line, where something of it is known."""
    found = goodput_of(folder)
    if found.is_known:
        console.tell_named("goodput", found.told())


def report(found: Goodput, attempts: int, damaged: int) -> GoodputReport:
    seconds = {name: part / 1000 for name, part in found.parts.items()}
    return GoodputReport(attempts, found.wall / 1000, seconds, found.shares(), damaged)


def _table(found: Goodput) -> Table:
    columns = Column("", least=12), Column("", "right"), Column("", "right", worth=1)
    table, shares = Table(*columns, header=False), found.shares()
    for name, title in TITLES.items():
        took = human_duration(found.parts[name] / 1000)
        table.add_row(title, f"{shares[name]:.1f} %", took)
    table.add_row("together", f"{sum(shares.values()):.1f} %", human_duration(found.wall / 1000))
    return table
