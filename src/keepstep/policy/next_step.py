"""What a batch job does next: launch again, be queued again, or stop, and with which exit status.

Pure. slurm/submit.sh copies this file into the job's folder, where whichever Python a node has runs
it (slurm/job.py): so it imports nothing of keepstep, and is written for Python 3.6 and newer.
"""

import re
from typing import Any, Mapping, NamedTuple, Sequence  # noqa: UP035  # Python 3.6

FINISHED, PREEMPTED, FAILED, NO_PROGRESS = "finished", "preempted", "failed", "no_progress"
REWOUND = "rewound"
OUTCOMES = (FINISHED, PREEMPTED, REWOUND, FAILED, NO_PROGRESS)
RECIPE = "recipe"  # failed, as the same command would again: no further attempt can mend it
WRONG_RECIPE, NOT_PUBLISHED, STOPPED, GIVEN_UP = 2, 70, 75, 76
ENDED_BY_SLURM = 143
# scontrol's words for a requeue that it will never accept; of any other the controller is away.
NEVER = re.compile("disabled|denied|ermission|nvalid")


class Ended(NamedTuple):
    """How an attempt ended.

    Attributes:
        outcome: one of OUTCOMES, or RECIPE.
        reason: why, in words.
        exit: the exit status that it names.
        has_begun: whether it has told so itself.
    """

    outcome: str
    reason: str
    exit: int
    has_begun: bool


class Situation(NamedTuple):
    """What else is known when an attempt has ended.

    Attributes:
        stop: `time`: the time limit is near; `term`: Slurm ends the job; else empty.
        stop_requested: whether `keepstep stop` was asked for, and no attempt has heeded it alone.
        fruitless: attempts in a row without a new checkpoint, this one included.
        max_attempts: how many of them are allowed.
        processes: ranks of the attempt.
        retry_seconds: the unit of the pause before the next attempt.
        requeued: whether Slurm has queued the job again, so lately that a signal may be meant for
            a step of the round before.
        preempted: whether Slurm has preempted the job: `yes`, `no`; empty: it was not asked.
        nodes_answer: whether the attempt's nodes answer: `yes`, `no`; empty: they were not asked.
    """

    stop: str = ""
    stop_requested: bool = False
    fruitless: int = 0
    max_attempts: int = 10
    processes: int = 1
    retry_seconds: int = 10
    requeued: bool = False
    preempted: str = ""
    nodes_answer: str = ""


class Next(NamedTuple):
    """What to do.

    Attributes:
        action: `launch` an attempt, `wait` and look again, `requeue` the job, `stop` with `exit`,
            `give-up` (the same, and status.json says `no_progress`); or what has to be known first:
            `ask-slurm` (preempted?), `ask-nodes` (do they answer?).
        words: why, for people.
        exit: the exit status of the job.
        pause: seconds to wait before.
    """

    action: str
    words: str = ""
    exit: int = 0
    pause: int = 0


def how_it_ended(
    said: Mapping[str, Any],
    token: str,
    exit_status: int,
    told_exit: int = -1,
    was_alive: bool = False,
) -> Ended:
    """How the attempt called `token` ended.

    Args:
        said: the fields of status.json; empty where it cannot be read.
        exit_status: srun's, which is that of whichever process it has heard of first.
        told_exit: what launch/train.sh has told; -1: nothing.
        was_alive: whether the attempt has given a sign of life.
    """
    if said.get("owner") == token:
        outcome, reason, status = (said.get(name) for name in ("outcome", "reason", "exit"))
        if type(status) is not int or not 0 <= status <= 255:
            outcome, status = FAILED, exit_status or 1
        if outcome not in OUTCOMES:
            outcome = FAILED
        if not isinstance(reason, str) or not reason:
            reason = f"exit status {status}"
        return Ended(RECIPE if status == WRONG_RECIPE else outcome, reason, status, True)
    # It had not begun, or was killed, and the file tells of an earlier attempt.
    status = exit_status if told_exit < 0 else told_exit
    if status == WRONG_RECIPE:
        return Ended(RECIPE, f"the recipe is wrong: see logs/{token}.log", status, False)
    if status == STOPPED:
        return Ended(PREEMPTED, "stopped before the run began", status, False)
    when = "without a word of its end" if was_alive else "before the run began"
    return Ended(FAILED, f"exit status {status}, {when}", status, False)


def told_by_nodes(told: Sequence[int]) -> int:
    """The exit status of an attempt, by what launch/train.sh has told on each node; -1: nothing.

    Where one node fails, srun ends the others, and they say that they were stopped: that somebody
    has stopped them all takes the word of each.
    """
    known = [status for status in told if status >= 0]
    if not known:
        return -1
    failed = [status for status in known if status != STOPPED]
    if WRONG_RECIPE in failed:
        return WRONG_RECIPE
    if failed:
        return failed[0]
    return STOPPED if len(known) == len(told) else 1


def fruitless_after(fruitless: int, commits_before: int, commits_now: int) -> int:
    """Attempts in a row without a new checkpoint, after one more."""
    return 0 if commits_now > commits_before else fruitless + 1


def after_attempt(ended: Ended, seen: Situation) -> Next:
    """What to do after an attempt.

    What must be asked of others, and may take a while, is asked only where it decides: the answer
    then is `ask-…`, and the same call with what was learned tells more.
    """
    if ended.outcome == FINISHED:
        return Next("stop", "finished", ended.exit)
    if ended.outcome == RECIPE:
        return Next("stop", "the same command would fail again: see above", WRONG_RECIPE)
    if ended.outcome == NO_PROGRESS:
        return Next("stop", "no progress: see above", GIVEN_UP)
    asked = when_asked(seen)
    if asked.action:
        return asked
    if ended.outcome == REWOUND and seen.fruitless < seen.max_attempts:
        return Next("launch", "going back: " + ended.reason)
    stopped = ended.outcome == PREEMPTED
    if stopped and "deadline" in ended.reason:
        return queue_again("the time is over", seen)
    if stopped and "keepstep stop" in ended.reason:
        return Next("stop", "stopped on request", STOPPED)
    if not seen.preempted:
        return Next("ask-slurm")
    if seen.preempted == "yes":
        return queue_again("preempted by another job", seen)
    if stopped and seen.requeued and seen.fruitless < seen.max_attempts:
        # Slurm repeats a signal after a minute where one node of the step was dead; and counts the
        # steps of a requeued job from 0 again: it meets another step of the same number.
        return Next("launch", "a signal for a step of an earlier round: once more")
    if stopped and all_ranks_were_told(ended.reason, seen.processes):
        if not seen.nodes_answer:
            return Next("ask-nodes")  # TERM also comes of a node that is lost
        if seen.nodes_answer == "yes":  # what the same signal to the job's shell would do
            if "SIGUSR" in ended.reason:
                return queue_again(ended.reason, seen)
            return Next("stop", f"stopped on request: {ended.reason}", STOPPED)
    if seen.fruitless >= seen.max_attempts:
        return give_up(seen)
    return Next("launch", pause=seen.retry_seconds * seen.fruitless // 2)


def for_nodes(
    answering: Sequence[str],
    there: int,
    needed: int,
    waited: float,
    patience: float,
    seen: Situation,
) -> Next:
    """What to do before an attempt, with so many nodes that answer.

    Args:
        answering: the nodes that are ready for it, of `there` in all.
        needed: with fewer nothing is launched.
        waited: seconds so far; after `patience` of them the job is queued again.
        seen: with `fruitless` as it is if nothing is launched.
    """
    asked = when_asked(seen)
    if asked.action:
        return asked
    if len(answering) >= needed:
        return Next("launch")
    if waited >= patience:
        return queue_again("nodes are missing", seen)
    names = " ".join(answering)
    words = f"{len(answering)} of {there} nodes answer ({names}), {needed} are needed: waiting"
    return Next("wait", words)


def when_unwritable(place: str, waited: float, patience: float, seen: Situation) -> Next:
    """What to do before an attempt, while the run folder takes no file."""
    asked = when_asked(seen)
    if asked.action:
        return asked
    words = f"nothing can be written in {place}"
    if waited >= patience:
        return queue_again(words, seen)
    return Next("wait", f"{words}: waiting", pause=seen.retry_seconds)


def when_asked(seen: Situation) -> Next:
    """What somebody has asked this job for; no action: nothing."""
    if seen.stop == "term":
        return Next("stop", "Slurm has ended the job", ENDED_BY_SLURM)
    if seen.stop_requested:
        return Next("stop", "stopped on request", STOPPED)
    if seen.stop == "time":
        return queue_again("the time is over", seen)
    return Next("")


def queue_again(why: str, seen: Situation) -> Next:
    """Within the same budget of attempts: else it would be queued again for ever."""
    return Next("requeue", why) if seen.fruitless < seen.max_attempts else give_up(seen)


def give_up(seen: Situation) -> Next:
    """Stop: nothing has come of the last attempts."""
    count = "1 attempt" if seen.fruitless == 1 else f"{seen.fruitless} attempts in a row"
    words = f"{count} without a new checkpoint"
    return Next("give-up", words, GIVEN_UP)


def when_requeue_failed(answer: str) -> Next:
    """What to do after scontrol has not queued the job again, with its answer."""
    if NEVER.search(answer):
        return Next("stop", "this job cannot be queued again", STOPPED)
    return Next("wait")


def all_ranks_were_told(reason: str, processes: int) -> bool:
    """Whether somebody has sent a signal to all ranks of an attempt, and Slurm has not."""
    if "its launcher is gone" in reason:
        return False
    return reason.startswith("stopped before") or reason.count(" to rank ") >= processes


def may_claim(theirs: str, mine: str) -> bool:
    """Whether the attempt called `mine` may take the run from `theirs` (empty: from nobody).

    Attempts of jobs are called `JOB.RESTARTS.TRY`. A job that begins takes the run from anybody; a
    shell that was left behind by an earlier round of the same job takes it from nobody.
    """
    ours, others = re.fullmatch(NAME, mine), re.fullmatch(NAME, theirs)
    if ours is None:
        raise ValueError(f"{mine!r} is no name of a job's attempt")
    job, round_, attempt = ours.groups()
    if others is not None and others.group(1) == job:
        return (int(others.group(2)), int(others.group(3))) <= (int(round_), int(attempt))
    return not theirs or (int(round_), int(attempt)) == (0, 1)


NAME = r"([0-9]{1,18})\.([0-9]{1,18})\.([0-9]{1,18})"


def advice(outcome: str, exit_status: int) -> str:
    """What a person may do after an attempt that ended so."""
    if exit_status == WRONG_RECIPE:
        return "mend the recipe, then launch the run again"
    if outcome == FINISHED and exit_status == NOT_PUBLISHED:
        return (
            "the model is trained; what the reason names is not done: `keepstep push` publishes "
            "it, `keepstep sync` copies it to the mirror"
        )
    return {
        FINISHED: "nothing: the run is finished",
        PREEMPTED: "launch the same command again, and it carries on",
        REWOUND: "launch the same command again: it goes on from before the step that spoilt it",
        NO_PROGRESS: "nothing is left to carry on from: see the reason before you launch it again",
    }.get(outcome, "see to the reason, then launch the same command again: it carries on")
