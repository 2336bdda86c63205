"""Looks at the run folder while training goes on: for requests, for the owner; and shows a sign of
life there.

The folder may lie on a network filesystem that does not answer for a minute, or fails for a moment.
Then this thread waits, or tries again; training goes on with what was seen last.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from keepstep.ranks import signals
from keepstep.run_folder.ownership import NotOwnerError, Owner
from keepstep.run_folder.paths import REQUESTS
from keepstep.run_folder.progress import Reached
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.safe_read import is_file
from keepstep.run_folder.stopped import Stopped
from keepstep.run_folder.storage import Storage

LOOK_SECONDS = 1.0  # between looks at the run folder: it may be a network filesystem
NO_ANSWER_SECONDS = 30.0  # a look that takes longer is told
SHOW_SECONDS = 5.0  # between two writes of metrics.prom
LAST_LOOK_SECONDS = 5.0  # for the last look; a folder that does not answer is not waited for


class Lookout:
    """The main process's thread beside training. It writes no log: a fork in the middle of a line
    would leave the child (a DataLoader's worker) with the log's lock for ever.

    Attributes:
        lost: whether another attempt owned the run at the last look.
        given_up: whether it was lost to another machine, which this folder does not tell.
    """

    def __init__(
        self,
        run: RunFolder,
        storage: Storage,
        owner: Owner,
        beats: Callable[[], int],
        progress: Callable[[], Reached] | None = None,
        show: Callable[[Reached], None] = lambda reached: None,
        stopped: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """
        Args:
            beats: how often the attempt has got on so far.
            progress: how far; None: that is not shown.
            show: where else that is shown, now and then.
            stopped: is told how long the process was stopped.
        """
        self.run, self.lost, self.given_up = run, False, False
        self._storage, self._owner, self._beats = storage, owner, beats
        self._progress, self._show = progress, show
        self._tell_stopped, self._stopped = stopped, Stopped()
        self._next_show = 0.0
        self._shown = 0
        self._seen: dict[str, bool] = {}
        # Added to by training's thread, taken from by this one.
        self._taken_up: set[str] = set()
        self._known: set[tuple[str, type, int | None]] = set()
        self._faults: deque[str] = deque(maxlen=8)
        self._look_began: float | None = None
        self._silence_told = False
        self._over, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="keepstep-lookout")

    def start(self) -> None:
        """Look every second from now on."""
        self._thread.start()

    def stop(self) -> None:
        """After a last look, if the folder answers."""
        self._over.set()
        self._wake.set()
        self._thread.join(LAST_LOOK_SECONDS)

    @property
    def requests(self) -> tuple[str, ...]:
        """What somebody has asked for, as seen last, and nobody has taken up."""
        return tuple(n for n in REQUESTS if self._seen.get(n) and n not in self._taken_up)

    def take_up(self, names: Iterable[str]) -> None:
        """These are under way: their files are removed."""
        self._taken_up.update(names)
        self._wake.set()

    def faults(self) -> list[str]:
        """What could not be done; each kind of it is told once."""
        began = self._look_began
        silence = 0.0 if began is None else time.monotonic() - began
        if silence > NO_ANSWER_SECONDS and not self._silence_told:
            self._faults.append(f"no answer for {silence:.0f} s")
        self._silence_told = silence > NO_ANSWER_SECONDS
        return [self._faults.popleft() for _ in range(len(self._faults))]

    def look(self) -> None:
        """One look. What fails is remembered, told, and tried again; seen is what was seen last."""
        self._look_began = time.monotonic()
        removed = []
        for name in [name for name in REQUESTS if name in self._taken_up]:
            with self._trying(f"removing {name}"):
                self._storage.remove(self.run.request(name))
                removed.append(name)
        seen = dict(self._seen)
        for name in REQUESTS:
            with self._trying(f"looking for {name}"):
                seen[name] = is_file(self.run.request(name))
        self._seen = seen
        self._taken_up.difference_update(removed)  # a file that is there now asks anew
        with self._trying("looking for the owner"):
            self._owner.check()
            self.lost = self.given_up
        with self._trying("writing the heartbeat"):
            self._beat()
        self._look_began = None

    def _run(self) -> None:
        while not self._over.is_set():
            began = signals.steady()
            self._wake.wait(LOOK_SECONDS)
            late = signals.steady() - began - LOOK_SECONDS
            if seconds := self._stopped.seconds(late, signals.was_continued()):
                self._tell_stopped(seconds)
            self._wake.clear()
            self.look()

    def _beat(self) -> None:
        beats = self._beats()
        if beats != self._shown:
            reached = None if self._progress is None else self._progress()
            line = "" if reached is None else f"{reached.as_line()}\n"
            self._storage.show(self.run.heartbeat, f"{self._owner.token} {beats}\n{line}")
            self._shown = beats
            if reached is not None and time.monotonic() >= self._next_show:
                self._next_show = time.monotonic() + SHOW_SECONDS
                self._show(reached)

    @contextlib.contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        try:
            yield
        except NotOwnerError:
            self.lost = True
        except Exception as error:
            number = error.errno if isinstance(error, OSError) else None
            if (what, type(error), number) not in self._known:
                self._known.add((what, type(error), number))
                why = f"{type(error).__name__}: {error}" if number is None else os.strerror(number)
                self._faults.append(f"{what}: {why}")
