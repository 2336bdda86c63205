"""What a line of events.jsonl says, as a sentence for people. Pure.

A fact may be absent: older versions did not write it. What is not known is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keepstep.output.printable import first_few
from keepstep.output.units import be, counted, human_bytes
from keepstep.policy.parallel_layout import ParallelLayout

Event = Mapping[str, Any]
SHOWN = 5  # rows, metrics
WHY = {  # a save is made, if not by its step
    "deadline": "ahead of the time limit",
    "stop": "since a stop was asked for",
    "save-now": "since somebody has asked for it",
    "interval": "by save_interval_seconds",
}


def sentence(event: Event) -> str:
    """One sentence, without its time and attempt."""
    tell = SENTENCES.get(str(event["event"]))
    if tell is not None:
        try:
            return tell(event)
        except (TypeError, ValueError, AttributeError, KeyError):
            pass  # a fact is of another kind than any version wrote: shown as it is
    known = ("time", "attempt", "event")  # of a later version
    facts = ", ".join(f"{name} {value}" for name, value in event.items() if name not in known)
    return f"{event['event']}: {facts}" if facts else str(event["event"])


def _attempt(event: Event) -> str:
    if "job" not in event:
        return "the attempt begins"
    restarts = f", restart {event['restarts']}" if event.get("restarts") else ""
    return f"the attempt begins, in job {event['job']} on {event.get('nodes')}{restarts}"


def _heard(event: Event) -> str:
    at = str(event["at"])[:19].replace("T", " ")
    return (
        f"attempt {event['of']} did not tell of its end: heard last at step {event['step']}, {at}"
    )


def _resume(event: Event) -> str:
    step, request = event.get("step"), event.get("request")
    begins = f"carries on from checkpoint-{step}" if step else "begins at step 0"
    asked = f" (resume_from_checkpoint: {event.get('path') or request})" if request else ""
    passed = event.get("passed_by") or {}
    over = f"; passed by: {first_few([f'checkpoint-{step}' for step in passed])}" if passed else ""
    return f"{begins}{asked}{over}"


def _first_step(event: Event) -> str:
    seconds = event.get("seconds") or {}
    told = f"the first step, {event.get('step')}, is made"
    longest = sorted(seconds, key=lambda name: -seconds[name])[:3]
    parts = ", ".join(f"{name} {seconds[name]:.1f} s" for name in longest)
    return f"{told} after {sum(seconds.values()):.1f} s ({parts})" if seconds else told


def _reshard(event: Event) -> str:
    before = ParallelLayout(event.get("from_processes", 0), event.get("from_stage", 0))
    now = ParallelLayout(event.get("to_processes", 0), event.get("to_stage", 0))
    what = f"checkpoint-{event.get('step')}, written by {before}, is resharded for {now}"
    return what + _in(event)


def _commit(event: Event) -> str:
    told = f"saved checkpoint-{event.get('step')}"
    if "bytes" in event:
        told += f": {human_bytes(event['bytes'])}"
    if "write" in event:
        told += f" in {event['write']:.2f} s"
    if "stall" in event:
        told += f"; training stopped for {event['stall']:.2f} s"
    metrics = event.get("metrics") or {}
    losses = [f"{name} {value:.4f}" for name, value in metrics.items() if name.endswith("loss")]
    told += f"; {first_few(losses, at_most=SHOWN)}" if losses else ""
    why = event.get("why")
    return told + (f" ({WHY.get(why, f'why: {why}')})" if why else "")


def _save_failed(event: Event) -> str:
    return f"checkpoint-{event.get('step')} was not saved: {event.get('reason')}"


def _hang(event: Event) -> str:
    where = f"at step {event.get('step')}"
    return f"a rank was stuck {where} for {event.get('seconds')} s ({event.get('phase')})"


def _nonfinite(event: Event) -> str:
    ranks = event.get("ranks")
    of = f" of rank {first_few([str(rank) for rank in ranks])}" if ranks else ""
    told = f"step {event.get('step')}: {event.get('what')}{of} is not finite"
    return told + _rows(event) + _then(event)


def _spike(event: Event) -> str:
    value = f" {event['value']:.4g}" if isinstance(event.get("value"), float) else ""
    told = f"step {event.get('step')}: {event.get('what')}{value} is a spike"
    return told + _rows(event) + _then(event)


def _rewind(event: Event) -> str:
    to = f"checkpoint-{event['to']}" if event.get("to") else "the beginning"
    count = len(event.get("rows") or ())
    told = f"goes back to {to}, from before step {event.get('step')} ({event.get('what')})"
    return f"{told}; {counted(count, 'row')} {be(count)} left out"


def _prune(event: Event) -> str:
    return f"removed checkpoint-{event.get('step')}: {event.get('reason')}" + _by(event)


def _discard(event: Event) -> str:
    names, size = event.get("names") or (), event.get("bytes")
    took = f", {human_bytes(size)}" if isinstance(size, int) else ""
    what = {"leftovers": "what killed attempts left", "quarantine": "damaged checkpoints"}
    told = what.get(str(event.get("what")), str(event.get("what")))
    return f"removed {told} ({first_few(list(names), at_most=SHOWN)}{took})" + _by(event)


def _export(event: Event) -> str:
    told = f"exported checkpoint-{event.get('step')} to {event.get('folder')}, read back whole"
    return told + _by(event)


def _by(event: Event) -> str:
    return f" ({event['by']})" if event.get("by") else ""


def _quarantine(event: Event) -> str:
    return f"set checkpoint-{event.get('step')} aside: {event.get('reason')}"


def _stop_asked(event: Event) -> str:
    return f"a stop is asked for: {event.get('signal')}"


def _machine_lost(event: Event) -> str:
    names = event.get("machines")
    known = first_few([str(name) for name in names]) if isinstance(names, list) else "a machine"
    return f"{known} has left, or was lost: on without it"


def _publish(event: Event) -> str:
    where = f"step {event.get('step')} to {event.get('repo_id')}"
    if "error" in event:
        return f"did not push {where}: {event['error']}"
    outcome = event.get("outcome", "pushed")
    return f"{outcome}: {where}{_in(event)}" + (
        f" ({event['reason']})" if event.get("reason") else ""
    )


def _mirror(event: Event) -> str:
    where = f"checkpoint-{event.get('step')} to {event.get('url')}"
    if "error" in event:
        return f"did not copy {where}: {event['error']}"
    size = f", {human_bytes(event['bytes'])}" if isinstance(event.get("bytes"), int) else ""
    lost = event.get("lost")
    told = f"; steps of which objects are gone there: {lost}" if lost else ""
    return f"copied {where}{size}{_in(event)}{told}"


def _finished(event: Event) -> str:
    return f"the run is finished, at step {event.get('step')}"


def _end(event: Event) -> str:
    step = "" if event.get("global_step") is None else f" at step {event['global_step']}"
    told = f"the attempt ends{step}: {event.get('outcome')}, exit status {event.get('exit')}"
    reason = " ".join(str(event.get("reason") or "").split())
    return f"{told}: {reason}" if reason else told


def _launch(event: Event) -> str:
    told = f"the job's attempt {event.get('owner')} ended after {event.get('seconds')} s"
    return f"{told}: {event.get('outcome')}, exit status {event.get('exit')}"


def _in(event: Event) -> str:
    seconds = event.get("seconds")
    return f" in {seconds:.1f} s" if isinstance(seconds, (int, float)) else ""


def _rows(event: Event) -> str:
    rows = event.get("rows")
    return (
        f", rows {first_few([str(row) for row in rows])}" if isinstance(rows, list) and rows else ""
    )


def _then(event: Event) -> str:
    return f" ({event['action']})" if event.get("action") else ""


SENTENCES: Mapping[str, Callable[[Event], str]] = {
    "attempt": _attempt,
    "heard": _heard,
    "resume": _resume,
    "training": lambda event: "everything is built: training begins",
    "first_step": _first_step,
    "reshard": _reshard,
    "commit": _commit,
    "save_failed": _save_failed,
    "hang": _hang,
    "nonfinite": _nonfinite,
    "spike": _spike,
    "rewind": _rewind,
    "prune": _prune,
    "discard": _discard,
    "export": _export,
    "quarantine": _quarantine,
    "stop_asked": _stop_asked,
    "machine_lost": _machine_lost,
    "publish": _publish,
    "mirror": _mirror,
    "finished": _finished,
    "end": _end,
    "launch": _launch,
}
