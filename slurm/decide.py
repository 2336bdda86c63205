"""Asks next_step.py, which lies beside it in the job's folder: decide.py WHAT NAME=VALUE...

Reads what the run has written, and prints an answer of one value a line, with a dot in the last
line: an answer without it is none. For Python 3.6 and newer, whichever a node has; nothing of
keepstep is imported, for the environment of the ranks may be in a container.
"""

import json
import os
import stat
import sys

from next_step import (
    Ended,
    Situation,
    after_attempt,
    for_nodes,
    fruitless_after,
    how_it_ended,
    may_claim,
    when_requeue_failed,
)

LIMIT = 2**20  # bytes of a file with a few words
LONGEST = 400  # characters of a reason


def open_plain(path):
    """A regular file: a link is not followed, a pipe not waited for. None: there is none."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError:
        return None


def read_status(private):
    """The fields of status.json; none, where it is not what was written there."""
    file = open_plain(os.path.join(private, "status.json"))
    if file is None:
        return {}
    try:
        with file:
            text = file.read(LIMIT + 1)
        fields = json.loads(text.decode(), object_pairs_hook=once) if len(text) <= LIMIT else {}
        return fields if isinstance(fields, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def once(pairs):
    """An object whose names are there once."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def read_exit(logs, token):
    """What launch/train.sh has told of its end; -1: nothing."""
    file = open_plain(os.path.join(logs, token + ".exit"))
    if file is None:
        return -1
    try:
        with file:
            text = file.read(10).strip()
    except OSError:
        return -1
    return int(text) if text.isdigit() and int(text) <= 255 else -1


def count_commits(private, known):
    """Lines about commits in events.jsonl; so many as were known, where it cannot be read."""
    file = open_plain(os.path.join(private, "events.jsonl"))
    if file is None:
        return known
    try:
        with file:
            return sum(b'"event": "commit"' in line for line in file)
    except OSError:
        return known


def one_line(text):
    """A text that anybody may have written, for a log."""
    return "".join(c if c.isprintable() else " " for c in text)[:LONGEST]


def situation(given):
    """What the job's shell knows."""
    kinds = {name: type(value) for name, value in Situation()._asdict().items()}
    read = {str: str, int: int, bool: lambda text: text == "1"}
    return Situation(**{n: read[kinds[n]](text) for n, text in given.items() if n in kinds})


def answer(what, given):
    """The lines of an answer."""
    if what == "commits":
        return [count_commits(given["private"], 0)]
    if what == "claim":
        return ["yes" if may_claim(given["theirs"], given["token"]) else "no"]
    if what == "ended":
        private, token = given["private"], given["token"]
        told = read_exit(given["logs"], token)
        ended = how_it_ended(read_status(private), token, int(given["exit"]), told)
        known = int(given["commits"])
        commits = count_commits(private, known)
        fruitless = fruitless_after(int(given["fruitless"]), known, commits)
        begun = int(ended.has_begun)
        return [ended.outcome, ended.reason, ended.exit, begun, commits, fruitless]
    if what == "after":
        begun = given["begun"] == "1"
        ended = Ended(given["outcome"], given["reason"], int(given["exit"]), begun)
        return list(after_attempt(ended, situation(given)))
    if what == "nodes":
        counts = [int(given[name]) for name in ("there", "needed", "waited", "patience")]
        return list(for_nodes(given["answering"].split(), *counts, situation(given)))
    if what == "refused":
        return list(when_requeue_failed(given["answer"]))
    raise SystemExit("decide.py: " + what + " is nothing that it decides")


def main():
    what, given = sys.argv[1], dict(argument.split("=", 1) for argument in sys.argv[2:])
    lines = [one_line(str(value)) for value in answer(what, given)]
    sys.stdout.buffer.write("\n".join([*lines, ".\n"]).encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    main()
