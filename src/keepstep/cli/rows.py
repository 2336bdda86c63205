"""What `--json` prints: a frozen dataclass for each object. Their fields are the schema, which
docs/json.md shows. No torch: the commands import this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from keepstep.output.units import counted
from keepstep.policy.batch import BatchError, Dealt, agree
from keepstep.policy.completeness import not_reshardable
from keepstep.policy.manifest import Manifest
from keepstep.policy.metric import value_of
from keepstep.policy.retention import Record, best_step, plan_retention
from keepstep.policy.selection import PATIENCE, Choice, SelectionError, UnreadableError, choose
from keepstep.recipe.problems import Problem
from keepstep.run_folder.progress import reached_of
from keepstep.run_folder.reader import Checkpoint, RunFolder

SAVE_FACTS = (
    *("stall", "wait", "copy", "write", "digest", "read_back", "commit"),
    *("gb_per_s", "slowest_rank"),
)


@dataclass(frozen=True)
class JsonObject:
    """An object that `--json` prints, its fields in their order."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)


@dataclass(frozen=True)
class CheckpointRow(JsonObject):
    """A committed checkpoint, as `keepstep ls` shows it.

    Attributes:
        step: optimizer steps completed.
        metric: the full name of the metric that ranks; null: nothing is ranked.
        value: the metric at this step; null: it was not evaluated here.
        bytes: the size of its files.
        world_size: the processes that wrote it.
        zero_stage: DeepSpeed's ZeRO stage; 0: nothing was sharded.
        deepspeed: whether DeepSpeed wrote it.
        saved_at: UTC, ISO 8601.
        attempt: which launch of the run wrote it, counted from 1.
        parent: the step that this attempt began at; null: the beginning.
        job: of a batch job: its id (`job`), `nodes`, `restarts`; else empty.
        resharded_from: processes and ZeRO stage of what this attempt resumed, if it had others.
        origin: where it came from, if not from a run of keepstep; else empty.
        abandoned: on a branch that a later attempt went back from.
        finite: whether its state is, as far as it is known.
        faults: what differs from the manifest by names and sizes; empty: nothing.
        part: whether other machines have parts of it (`node_local`), and this folder one.
        mirror: where a copy of it is, as far as the log tells; null: nowhere. On a mirror its own
            address.
        keep: whether retention keeps it.
        reason: why it does, or does not.
        why: what asked for the save: `steps`, `epoch`, `best` (the strategy), `interval`,
            `save-now`, `stop`, `deadline`, `again` (one before it had failed), `callback`; null:
            that is not known.
        save: what the save has cost: seconds of `stall`, `wait`, `copy`, `write`, `digest`,
            `read_back`, `commit`; `gb_per_s`; `slowest_rank`. What is not known is left out.
    """

    step: int
    metric: str | None
    value: float | None
    bytes: int
    world_size: int
    zero_stage: int
    deepspeed: bool
    saved_at: str
    attempt: int
    parent: int | None
    job: dict[str, Any]
    resharded_from: tuple[int, int] | None
    origin: str
    abandoned: bool
    finite: bool
    faults: tuple[str, ...]
    part: bool
    mirror: str | None
    keep: bool
    reason: str
    why: str | None
    save: dict[str, Any]


@dataclass(frozen=True)
class MirroredRunRow(JsonObject):
    """A run on a mirror, as `keepstep ls` shows those below an address that is no run's own.

    Attributes:
        run: its address.
        checkpoints: the steps of those that are there, the oldest first.
        bytes: the size of all its objects.
        saved_at: when the newest of them was saved: UTC, ISO 8601; null: it cannot be read.
    """

    run: str
    checkpoints: tuple[int, ...]
    bytes: int
    saved_at: str | None


@dataclass(frozen=True)
class ResumeAnswer(JsonObject):
    """What `resume_from_checkpoint: REQUEST` takes, as `keepstep which` tells it.

    Attributes:
        request: auto, latest, best, never, or a step.
        step: of the checkpoint that is taken; null: the beginning, or nothing (see `error`).
        world_size: the processes that wrote it.
        error: why nothing can be taken; null: something can.
        metric: the full name of the metric that ranks; null: nothing is ranked.
        value: the metric of what is taken.
        loses_steps: steps to be trained again, against the newest checkpoint, or what the newest
            attempt has reached by its last sign of life.
        loses_metric: how much worse than the best one it is, in the metric's own unit.
        num_processes: as it was asked with `--num_processes`.
        batch: how so many processes share out the rows of a step, in words.
        refused: why they cannot.
        under_way: an earlier attempt has carried the request out already. Left out with an `error`.
        others: step → why this one is not taken.
    """

    request: str
    step: int | None = None
    world_size: int | None = None
    error: str | None = None
    metric: str | None = None
    value: float | None = None
    loses_steps: int | None = None
    loses_metric: float | None = None
    num_processes: int | None = None
    batch: str | None = None
    refused: str | None = None
    under_way: bool | None = None
    others: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.under_way is None:
            del values["under_way"]
        return values


@dataclass(frozen=True)
class CheckReport(JsonObject):
    """What `keepstep check` has found.

    Attributes:
        recipe: the file, as it was named.
        output_dir: the run folder, an absolute path; null: the recipe cannot be read so far.
        hang_timeout: `hang_timeout_seconds`, in whole seconds; null: likewise.
        mirror: where the run is mirrored; null: nowhere, or likewise.
        node_local: whether `output_dir` is each machine's own disk.
        problems: every one found; those whose `severity` is `error` would end a launch.
        looked_at: what has been looked at.
        not_looked_at: what has not: mistakes may be there.
        report: the same in words.
    """

    recipe: str
    output_dir: str | None
    hang_timeout: int | None
    mirror: str | None
    node_local: bool
    problems: tuple[Problem, ...]
    looked_at: tuple[str, ...]
    not_looked_at: tuple[str, ...]
    report: str


@dataclass(frozen=True)
class EstimateRow(JsonObject):
    """What a run takes under one strategy.

    Attributes:
        strategy: ddp, zero1, zero2, zero3, or one of these with `_offload`.
        device_bytes: memory of each device.
        host_bytes: host memory of each process, beside what Python and the libraries take.
        checkpoint_bytes: the size of a checkpoint.
        disk_bytes: room for `save_total_limit` + 1 of them; null: no limit is set.
        save_seconds: how long writing one takes at `disk_speed`; null: that is not known.
    """

    strategy: str
    device_bytes: int
    host_bytes: int
    checkpoint_bytes: int
    disk_bytes: int | None
    save_seconds: float | None


@dataclass(frozen=True)
class Estimate(JsonObject):
    """What `keepstep estimate` tells.

    Attributes:
        parameters: elements of the model, the adapter's included.
        trained: how many of them are trained.
        disk_speed: bytes a second that the run folder's disk writes now; null: not known.
        num_processes: as it was asked with `--num_processes`.
        rows: one for each strategy.
    """

    parameters: int
    trained: int
    disk_speed: float | None
    num_processes: int
    rows: tuple[EstimateRow, ...]


@dataclass(frozen=True)
class VerifyReport(JsonObject):
    """What `keepstep verify` has found. It is printed as `faults` itself.

    Attributes:
        faults: a folder's name → what is wrong with it; an empty list: nothing.
    """

    faults: dict[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        return dict(self.faults)


@dataclass(frozen=True)
class GoodputReport(JsonObject):
    """What a run's wall time went into, as `keepstep goodput` tells it.

    Attributes:
        attempts: how many there were.
        wall_seconds: from the first attempt's process to the newest word or sign of life.
        seconds: of each part: `productive`, `repeated`, `save`, `evaluation`, `startup`, `restore`,
            `reshard`, `waiting`, `ending`, `unknown`; together `wall_seconds`.
        percent: the same; together 100, or 0 of a run that has not begun.
        damaged_lines: of the log: what they told is missing here.
    """

    attempts: int
    wall_seconds: float
    seconds: dict[str, float]
    percent: dict[str, float]
    damaged_lines: int


def checkpoint_rows(run: RunFolder) -> list[CheckpointRow]:
    """One row per committed checkpoint, oldest step first; sizes in bytes."""
    policy, saves = run.policy(), run.saves()
    metric = policy.metric
    records = run.records(metric)
    decisions = {decision.step: decision for decision in plan_retention(records, policy)}
    abandoned = {record.step for record in records if record.abandoned}
    attempts = {attempt.number: attempt for attempt in run.attempts()}
    mirrored = run.mirrored()

    def row(c: Checkpoint) -> CheckpointRow:
        attempt, manifest = attempts[c.manifest.attempt], c.manifest
        before = attempt.resharded
        copied_in, mirror = mirrored.get(c.step, (0, ""))
        return CheckpointRow(
            step=c.step,
            metric=metric,
            value=value_of(c.metrics, metric),
            bytes=manifest.total_bytes,
            world_size=manifest.world_size,
            zero_stage=manifest.zero_stage,
            deepspeed=manifest.deepspeed,
            saved_at=manifest.saved_at,
            attempt=manifest.attempt,
            parent=manifest.parent,
            job=dict(attempt.job),
            resharded_from=(before.world_size, before.zero_stage) if before else None,
            origin=manifest.origin,
            abandoned=c.step in abandoned,
            finite=manifest.is_finite,
            faults=tuple(run.state_of(c)),
            part=manifest.is_part,
            mirror=mirror if copied_in >= manifest.attempt else None,
            keep=decisions[c.step].keep,
            reason=decisions[c.step].reason,
            why=saves.get(c.step, {}).get("why"),
            save={n: v for n, v in saves.get(c.step, {}).items() if n in SAVE_FACTS},
        )

    return [row(c) for c in run.checkpoints()]


def resume_answer(run: RunFolder, request: str, num_processes: int | None = None) -> ResumeAnswer:
    """What `resume_from_checkpoint: request` would take, compared with the newest and the best."""
    policy = run.policy()
    records = {record.step: record for record in run.records(policy.metric)}
    answer = ResumeAnswer(request, metric=policy.metric, num_processes=num_processes)
    situation = run.situation(
        request, policy, lambda step: run.faults(run.checkpoint(step), deep=None), PATIENCE
    )
    try:
        choice = choose(request, situation)
    except (SelectionError, UnreadableError) as error:
        return replace(answer, error=str(error))
    if choice.step is not None:
        manifest = run.checkpoint(choice.step).manifest
        answer = replace(answer, world_size=manifest.world_size, value=records[choice.step].value)
        if num_processes is not None:
            answer = replace(answer, **_shared_out(manifest, num_processes))
    alive = [record for record in records.values() if not record.abandoned]
    best = best_step(alive, policy)
    if best is not None and answer.value is not None:
        worse = round(abs(answer.value - (records[best].value or 0.0)), 6)
        answer = replace(answer, loses_metric=worse)
    steps = [c.step for c in situation.candidates if c.step != choice.step]
    newest, last = max((record.step for record in alive), default=0), reached_of(run)
    if last is not None and last.attempt == max((a.number for a in run.attempts()), default=0):
        newest = max(newest, last.step)
    return replace(
        answer,
        step=choice.step,
        loses_steps=max(0, newest - (choice.step or 0)),
        under_way=choice.under_way,
        others={str(step): _why_not(step, choice, records) for step in sorted(steps)},
    )


def _shared_out(manifest: Manifest, num_processes: int) -> dict[str, Any]:
    """What becomes of the rows of a step on so many processes, if the recipe stays as it is."""
    reason = not_reshardable(manifest.files)
    if reason and num_processes != manifest.world_size:
        return {
            "refused": f"it was written by {counted(manifest.world_size, 'process')}, and {reason}"
        }
    before = Dealt.from_json(manifest.dealt)
    if before is None:
        return {"batch": "the recipe's batch (what it was is not known)"}
    try:
        return {"batch": str(agree(before, replace(before.asked, world_size=num_processes)))}
    except BatchError as error:
        return {"refused": str(error)}


def _why_not(step: int, choice: Choice, records: Mapping[int, Record]) -> str:
    if step in choice.passed_by:
        return choice.passed_by[step]
    if step in records and records[step].abandoned:
        return "on an abandoned branch"
    return "older" if step < (choice.step or 0) else "newer, but not what was asked for"
