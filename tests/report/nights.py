"""Runs as a report is told of them, made by hand."""

from __future__ import annotations

from typing import Any

from keepstep.policy.goodput import Goodput
from keepstep.policy.lineage import Spent
from keepstep.policy.samples import Sample
from keepstep.report.facts import AttemptFacts, RunFacts

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e'\"&"


def at(second: int) -> str:
    return f"2026-11-28T03:{second // 60:02}:{second % 60:02}.000+00:00"


def event(kind: str, attempt: int, second: int, **facts: Any) -> dict[str, Any]:
    return {"event": kind, "attempt": attempt, "time": at(second), **facts}


def commit(attempt: int, step: int, second: int, parent: int | None, loss: float) -> dict[str, Any]:
    metrics = {"eval_loss": loss, "eval_accuracy": 1 / loss, "eval_runtime": 0.1}
    costs = {"stall": 0.05, "write": 0.2, "gb_per_s": 1.5, "bytes": 2_000_000_000}
    return event("commit", attempt, second, step=step, parent=parent, metrics=metrics, **costs)


def attempt(
    number: int, begin: int, until: int, steps: tuple[int, int], **more: Any
) -> AttemptFacts:
    spent = Spent(steps[1], {"startup": 3.0, "step": float(steps[1] - steps[0])})
    known: dict[str, Any] = {
        "began": at(begin),
        "last": at(until),
        "resumed_from": steps[0],
        "reached": steps[1],
    }
    known |= {"hosts": {"node-1": 2}, "spent": (spent,)}
    return AttemptFacts(number, **{**known, **more})


def night(name: str = "runs/mine", **changes: Any) -> RunFacts:
    """Two kills, a resize, a branch, a push, something set aside."""
    events = [
        commit(1, 10, 20, None, 4.0),
        commit(1, 20, 30, None, 3.0),
        event("reshard", 2, 45, step=20, from_processes=2, from_stage=3, to_processes=1),
        commit(2, 30, 55, 20, 2.5),
        commit(2, 40, 65, 20, 2.4),
        event("quarantine", 3, 75, step=40, reason="a byte differs"),
        event("rewind", 3, 80, step=41, to=30, what="loss", rows=[1, 2], of=9, dataset=None),
        commit(3, 40, 90, 30, 2.0),
        event("publish", 3, 99, step=40, outcome="published", repo_id="me/demo", seconds=2.0),
        commit(3, 50, 100, 30, 2.2),
        event("prune", 3, 101, step=10, reason="beyond save_total_limit"),
    ]
    history: list[dict[str, Any]] = [
        {"step": step, "loss": 60 / (step + 10), "grad_norm": 1.0, "learning_rate": 1e-3}
        | {"num_tokens": 100.0 * step}
        for step in range(1, 51)
    ]
    history += [{"step": s, "eval_loss": v} for s, v in ((10, 4.0), (20, 3.0), (30, 2.5))]
    history += [{"step": 40, "eval_loss": 2.0}, {"step": 50, "eval_loss": 2.2}]
    values: dict[str, Any] = {
        "stands": "finished",
        "reached": 50,
        "planned": 50,
        "metric": "eval_loss",
        "best": (40, 2.0),
        "goodput": Goodput(120_000, 80_000, 10_000, 2_000, 8_000, 9_000, 1_000, 500, 6_000, 3_500),
        "attempts": (
            attempt(1, 5, 35, (0, 25), end="killed", commits=2),
            attempt(2, 40, 70, (20, 45), end="killed", commits=2, hosts={"node-2": 1}),
            attempt(
                *(3, 75, 125, (30, 50)),
                end="finished",
                commits=2,
                exit=0,
                changed={"learning_rate": [2e-3, 1e-3]},
            ),
        ),
        "events": events,
        "history": history,
        "branches": [history[19:40:4]],
        "fates": {(1, 20): "kept", (2, 30): "kept", (3, 40): "best", (3, 50): "kept"},
        "samples": [Sample(50, 1, "What is 2 + 3?", "5\nor so", "5")],
        "about": {"model": "some/model", "hosts": "node-1 (2 processes)"},
        "versions": {"torch": "2.13.0"},
        "total_limit": 9_000_000_000,
        "disk_free": 5e9,
    }
    return RunFacts(name, **{**values, **changes})


def short() -> RunFacts:
    """Twelve steps in a few seconds."""
    history = [{"step": step, "loss": 6 - step / 3, "num_tokens": step} for step in range(1, 13)]
    events = [commit(1, step, 2 * step, None, 2.0) for step in (4, 8, 12)]
    of_it = attempt(1, 0, 6, (0, 12), end="finished")
    changes: dict[str, Any] = {"reached": 12, "planned": 12, "best": None, "branches": []}
    return night("short", attempts=(of_it,), events=events, history=history, **changes)


def hostile() -> RunFacts:
    """Everything that a run can say is an attack."""
    name = HOSTILE
    events = [
        {**commit(1, 10, 20, None, 4.0), "metrics": {f"eval_{name}": 2.0, "eval_loss": 1.0}},
        event("save_failed", 1, 21, step=11, reason=name),
        event("publish", 1, 22, step=10, repo_id=name, outcome=name, reason=name),
        event(name, 1, 23, step=12),
    ]
    return night(
        name,
        stands=name,
        reason=name,
        metric=f"eval_{name}",
        attempts=(
            attempt(
                *(1, 5, 35, (0, 25)),
                end=name,
                reason=name,
                hosts={name: 1},
                exit=70,
                changed={name: [name, name]},
            ),
        ),
        events=events,
        samples=[Sample(10, 1, name, name, name)],
        about={name: name},
        versions={name: name},
        history=[
            *({"step": 1, "loss": 10**400}, {"step": 2, "loss": float("nan")}, {"loss": name}),
            *({"step": 3, "loss": 2.0}, {"step": "x", "loss": 2}, {"step": 3, f"eval_{name}": 2.0}),
        ],
    )
