"""What a job reads and writes in the run folder. For Python 3.6 and newer: see job.py.

Whatever may lie there: only plain files are read and written. A pipe would be waited for, and a
link leads elsewhere. What is written whole is renamed into its place.
"""

import contextlib
import json
import os
import re
import stat
import time

from next_step import how_it_ended, told_by_nodes

LIMIT = 2**20  # bytes of a file with a few words
LONGEST = 400  # characters of a reason


def plain(path):
    """Whether it is a regular file, and no link to one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def open_plain(path):
    """A regular file, to read; None: there is none, or it cannot be read now."""
    if not plain(path):
        return None
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError:
        return None


def head(path, limit):
    """The first bytes of a regular file; none, where they cannot be read."""
    file = open_plain(path)
    if file is None:
        return b""
    try:
        with file:
            return file.read(limit)
    except OSError:
        return b""


def put(path, text, token):
    """Write a file whole. False: that is not possible now."""
    folder, name = os.path.split(path)
    new = os.path.join(folder, "." + name + "." + token + ".new")
    try:
        if os.path.lexists(new):
            os.unlink(new)
        with open(new, "xb") as file:
            file.write(to_bytes(text))
        os.rename(new, path)
    except OSError:
        return False
    return True


def to_bytes(text):
    """Names of files may have bytes that are no text."""
    return text.encode("utf-8", "surrogateescape")


def one_line(text):
    """A text that anybody may have written, for a log."""
    return "".join(c if c.isprintable() else " " for c in text)[:LONGEST]


def once(pairs):
    """An object whose names are there once."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


class Files:
    """The files of one run.

    Args:
        run: the run folder.
        logs: the folder of logs.
        job: the job's own folder.
        say: tells the job's log a line.
    """

    def __init__(self, run, logs, job, say):
        self.run, self.logs, self.job, self.say = run, logs, job, say
        self.private = os.path.join(run, ".keepstep")
        self.stop = os.path.join(self.private, "stop")
        self.is_stopped = False  # by `keepstep stop`, which the attempt that heeds it removes

    def make_folder(self):
        """Where the run folder is each node's own, it is this one's."""
        try:
            os.makedirs(self.private, exist_ok=True)
        except OSError as error:
            self.say(f"{self.private}: {error.strerror}")

    # --- what the job itself goes by

    def fruitless(self):
        """Attempts in a row without a new checkpoint, over all restarts of the job."""
        text = head(os.path.join(self.job, "fruitless"), 20).strip()
        return int(text) if text.isdigit() and len(text) < 10 else 0

    def note(self, name, number, token):
        """A number in the job's folder."""
        path = os.path.join(self.job, name)
        if not put(path, f"{number}\n", token):
            self.say(f"{path}: nothing can be written there")

    # --- progress

    def newest(self):
        """The step of the newest checkpoint, 0 before the first."""
        try:
            names = os.listdir(self.run)
        except OSError:
            return 0
        found = [re.match(r"checkpoint-([0-9]{1,15})\Z", name) for name in names]
        steps = [int(match.group(1)) for match in found if match and self._is_whole(match.group())]
        return max(steps, default=0)

    def _is_whole(self, name):
        return os.path.exists(os.path.join(self.run, name, "manifest.json"))

    def beats(self):
        """What the attempt's heart has written last."""
        return head(os.path.join(self.private, "heartbeat"), 200)

    def commits(self, known):
        """Lines about commits in events.jsonl; so many as were known, where it cannot be read."""
        file = open_plain(os.path.join(self.private, "events.jsonl"))
        if file is None:
            return known
        try:
            with file:
                return sum(b'"event": "commit"' in line for line in file)
        except OSError:
            return known

    # --- who has the run, and who asks for a stop

    def owner(self):
        """Its name; nothing when there is none, or it cannot be read now."""
        words = head(os.path.join(self.private, "owner"), 4096).split(b"\n")[0].split()
        return os.fsdecode(words[0]) if words else ""

    def take(self, token):
        """Name the run's owner. False: nothing can be written now."""
        return put(os.path.join(self.private, "owner"), token + "\n", token)

    def stop_requested(self):
        """`keepstep stop`: for no attempt in particular."""
        return self.is_stopped or (plain(self.stop) and not head(self.stop, 1))

    def take_up_stop(self, token=""):
        """It is done: what `keepstep stop` has asked for; or what this job has, of one attempt."""
        if plain(self.stop) and head(self.stop, 4096) == to_bytes(token):
            with contextlib.suppress(OSError):
                os.unlink(self.stop)

    def ask_to_stop(self, token):
        """For this attempt, also when it has not begun to listen."""
        self.is_stopped = self.stop_requested()  # which says more, and stays
        if not self.is_stopped and self._writable(self.stop):
            put(self.stop, token, token)

    def _writable(self, path):
        if not os.path.lexists(path) or plain(path):
            return True
        self.say(path + " is no plain file: nothing is written there")
        return False

    # --- how an attempt ended

    def ended(self, token, exit_status, nodes=1, was_alive=False):
        """What the attempt said of itself: srun's exit status is that of whichever process it has
        heard of first."""
        told = told_by_nodes([self._told(token, rank) for rank in range(nodes)])
        ended = how_it_ended(self._status(), token, exit_status, told, was_alive)
        return ended._replace(reason=one_line(ended.reason))

    def _told(self, token, rank):
        """The exit status that a node has named; -1: none."""
        text = head(os.path.join(self.logs, f"{token}.{rank}.exit"), 10).strip()
        return int(text) if text.isdigit() and int(text) <= 255 else -1

    def _status(self):
        """The fields of status.json; none, where it is not what was written there."""
        text = head(os.path.join(self.private, "status.json"), LIMIT + 1)
        try:
            fields = json.loads(text.decode(), object_pairs_hook=once) if len(text) <= LIMIT else {}
        except (ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def tell(self, outcome, reason, status, token):
        """status.json, of an attempt that could not tell of itself."""
        fields = {"outcome": outcome, "reason": reason, "exit": status, "owner": token}
        put(os.path.join(self.private, "status.json"), json.dumps(fields, indent=1) + "\n", token)

    def record(self, **fields):
        """One line in events.jsonl, in one write; not behind one that was torn."""
        path = os.path.join(self.private, "events.jsonl")
        if not self._writable(path):
            return
        now = time.time()
        day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        known = {"time": f"{day}.{int(now * 1000) % 1000:03d}+00:00", "event": "launch"}
        line = to_bytes(json.dumps({**known, **fields}) + "\n")
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                is_torn = size and os.pread(file.fileno(), 1, size - 1) != b"\n"
                file.write(b"\n" + line if is_torn else line)
        except OSError as error:
            self.say(f"{path}: {error.strerror}")
