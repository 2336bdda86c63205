"""`keepstep report`: a run as one HTML file that a person looks at."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from keepstep import __version__
from keepstep.cli.common import app, console, errors_apart, examples, fail, used_run
from keepstep.cli.history import RunShown, launch_in_words, shown
from keepstep.output.terminal import hand_out
from keepstep.report.facts import AttemptFacts, Fate, RunFacts, headline
from keepstep.report.page import GENERATOR, page
from keepstep.run_folder.kinds import OF_TRAINER
from keepstep.run_folder.progress import goodput_of, reached_of
from keepstep.run_folder.reader import Checkpoint, RunFolder, run_that_would_prune
from keepstep.run_folder.safe_read import ABSENT, OddFileError, read_text
from keepstep.run_folder.storage import Storage

STDOUT = Path("-")
LONGEST_STATE = 64 * 1024**2
STANDS = {"ended": "ended", "running": "at work", "killed": "killed", "new": "new"}


@app.command(
    epilog=examples(
        "keepstep report runs/mine",
        "keepstep report runs/mine runs/other --out compared.html",
        "keepstep report runs/mine --out - | ssh desk 'cat > report.html'",
    )
)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="A run folder (output_dir); several are compared."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="Where the report is written; -: to stdout, for a pipe."
        ),
    ] = Path("report.html"),
) -> None:
    """Make a report of a run, or of several compared: one HTML file, with charts, no network."""
    if out == STDOUT:
        with errors_apart():
            if sys.stdout.isatty():
                fail("the report is HTML, and stdout a terminal", "    Hint: > report.html")
            hand_out(_page_of(runs))
        return
    _look_at(out)
    text = _page_of(runs).encode()
    try:
        Storage().replace(out, text)
    except OSError as error:  # of a file beside it, that nobody has named
        raise OSError(error.errno, error.strerror, str(out)) from error
    console.tell(f"written: {out}")


def _page_of(runs: Iterable[Path]) -> str:
    """The report; the headline of each run is told."""
    facts = []
    for path in dict.fromkeys(runs):
        folder = used_run(path)
        with folder.held():
            named = path if path.name not in ("", "..") else path.resolve()  # "." is no title
            facts.append(facts_of(folder, str(named)))
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = page(facts, made, __version__)
    for run in facts:
        console.tell(f"{run.name}: {headline(run)}")
        for file, fault in run.faults.items():
            console.tell(f"  {file}: {fault}")
    return text


def _look_at(out: Path) -> None:
    """Nothing but an earlier report is replaced.

    Raises:
        typer.Exit: something else is there, or it is no place for a file.
    """
    run = run_that_would_prune(out)
    if run is not None:
        fail(
            f"{out}: what {run} has there is its own", "    Hint: write it beside the checkpoints."
        )
    if not out.parent.is_dir():
        fail(f"there is no folder {out.parent}")
    if not os.path.lexists(out):
        return
    hint = "    Hint: name another file with --out, or move this one away."
    if out.is_symlink() or not out.is_file():
        fail(f"{out} is no file that could be replaced", hint)
    with open(out, encoding="utf-8", errors="replace") as file:
        if f'<meta name="generator" content="{GENERATOR}">' not in file.read(4096):
            fail(f"{out} is there, and is no report of keepstep", hint)


def facts_of(folder: RunFolder, name: str) -> RunFacts:
    """All that a report tells of a run, as far as its folder has it."""
    found, attempts = shown(folder), folder.attempts()
    status, policy, best = found.status, folder.policy(), folder.best()
    checkpoints, last = folder.checkpoints(), reached_of(folder)
    abandoned = {record.step for record in folder.records(None) if record.abandoned}
    alive = folder.latest()
    newest = next((a.launched for a in reversed(found.attempts) if a.launched), None)
    try:
        samples = folder.samples()
    except (OSError, OddFileError) as error:
        console.tell(f"{name}: its samples are left out: {error}")
        samples = []
    return RunFacts(
        name=name,
        stands=status.outcome or STANDS.get(status.state, "its end is not known"),
        reason=status.reason,
        faults=status.faults or {},
        reached=status.reached if status.reached is not None else status.newest,
        planned=status.planned or (alive.manifest.planned_steps if alive else None),
        metric=policy.metric,
        best=None if best is None else (best.step, best.metrics.get(policy.metric or "")),
        goodput=goodput_of(folder),
        attempts=_attempts(found, {a.number: a.spent for a in attempts}, folder),
        events=tuple(folder.log()),
        history=_history(alive, name),
        branches=_branches(checkpoints, abandoned, name),
        fates=_fates(checkpoints, abandoned, None if best is None else best.step),
        measured={(c.manifest.attempt, c.step): c.metrics for c in checkpoints},
        samples=samples,
        about=_about(newest) if newest else {},
        versions=newest["versions"] if newest else {},
        total_limit=policy.total_bytes,
        disk_free=None if last is None else last.figures.get("disk_free_bytes"),
    )


def _about(newest: Mapping[str, Any]) -> dict[str, str]:
    words = launch_in_words(newest)
    return {name: text for name, text in words.items() if name != "versions"}


def _attempts(
    found: RunShown, spent: Mapping[int, Sequence[Any]], folder: RunFolder
) -> tuple[AttemptFacts, ...]:
    at_work = {"running": "at work", "unknown": "unknown"}.get(found.status.state, "killed")
    newest = found.status.attempt
    return tuple(
        AttemptFacts(
            number=of.number,
            began=of.began,
            last=of.last,
            resumed_from=of.resumed_from,
            reached=of.reached,
            commits=of.commits,
            end=of.outcome or (at_work if of.number == newest else "killed"),
            exit=of.exit,
            reason=of.reason,
            hosts=of.launched["hosts"] if of.launched else {},
            spent=spent.get(of.number, ()),
            changed=of.changed,
        )
        for of in found.attempts
    )


def _history(checkpoint: Checkpoint | None, name: str) -> list[dict[str, Any]]:
    """What the Trainer had logged when it was saved; a row has a step, or is left out."""
    if checkpoint is None:
        return []
    try:
        state = read_json(checkpoint.path / OF_TRAINER)
        rows = state.get("log_history") if isinstance(state, dict) else None
        known = [row for row in rows or [] if isinstance(row, dict)]
    except ABSENT:
        return []
    except (OSError, OddFileError, ValueError, TypeError, RecursionError) as error:
        console.tell(f"{name}: the curves of {checkpoint.path.name} are left out: {error}")
        return []
    return [row for row in known if type(row.get("step")) is int and 0 <= row["step"] < 10**15]


def read_json(path: Path) -> Any:
    """Raises: OddFileError, OSError, ValueError."""
    return json.loads(read_text(path, LONGEST_STATE))


def _branches(
    checkpoints: Iterable[Checkpoint], abandoned: Collection[int], name: str
) -> list[list[dict[str, Any]]]:
    """Of each attempt whose newest checkpoint lies on an abandoned branch: from its begin on."""
    ends = {c.manifest.attempt: c for c in checkpoints if c.step in abandoned}
    found = []
    for end in ends.values():
        rows = _history(end, name)
        found.append([row for row in rows if row["step"] >= (end.manifest.parent or 0)])
    return found


def _fates(
    checkpoints: Iterable[Checkpoint], abandoned: Collection[int], best: int | None
) -> dict[tuple[int, int], Fate]:
    def fate(step: int) -> Fate:
        return "best" if step == best else "abandoned" if step in abandoned else "kept"

    return {(c.manifest.attempt, c.step): fate(c.step) for c in checkpoints}
