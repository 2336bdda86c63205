"""The machines that share a run, as one of them sees them: it shows itself and looks at the others
each second, whatever else its command waits for.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from keepstep.cli.network import AT_ONCE, Answerer, own_addresses, reached
from keepstep.policy.machines import Machine
from keepstep.run_folder.machines import MachinesFolder, Sign
from keepstep.run_folder.ownership import process_lives, this_process_words

SECONDS = 1.0  # between two looks
KEPT_SECONDS = 4.0  # for which an answer counts: a busy machine misses one


class Neighbors:
    """Looks, in a thread of its own.

    Attributes:
        me: this machine's id.
        processes: that it can have.
        trouble: what the last look met: the disk does not answer, say; None: nothing.
    """

    def __init__(self, folder: MachinesFolder, processes: int, patience: float) -> None:
        """
        Args:
            processes: that this machine can have.
            patience: seconds without a sign after which a machine is gone.
        """
        host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip(".")[:60] or "machine"
        self.me = f"{host}-{secrets.token_hex(4)}"
        self.processes = processes
        self.trouble: str | None = None
        self._folder, self._patience = folder, patience
        self._answerer = Answerer(self.me)
        self._own = Machine(self.me, host, processes, own_addresses(), self._answerer.port)
        self._process, self._beat = this_process_words() or "", 0
        self._has_left, self._waits = False, True
        self._seen: dict[str, tuple[int, float | None]] = {}  # its beat; when that was new
        self._signs: dict[str, Sign] = {}
        self._answers: dict[str, tuple[tuple[str, ...], float]] = {}  # where, and when
        self._looked = time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(AT_ONCE, "keepstep-asks")
        self._thread = threading.Thread(target=self._run, daemon=True, name="keepstep-neighbors")

    def start(self) -> None:
        """From now on the others see this machine.

        Raises:
            OSError: nothing can be written in the run folder.
        """
        self._show()
        self._thread.start()

    def stop(self) -> None:
        """It has left: the others need not wait to see that it gives no sign."""
        self._over.set()
        self._thread.join(2 * self._patience)
        self._has_left = True
        with contextlib.suppress(OSError):  # they will see
            self._show()
        self._answerer.close()
        self._pool.shutdown(wait=False)

    def tell(self, **facts: Any) -> None:
        """Change what this machine tells of itself, at once: fields of `Machine`; `waits`."""
        with self._lock:
            self._waits = facts.pop("waits", self._waits)
            self._own = replace(self._own, **facts)
        self._try(self._show)

    def known(self) -> dict[str, Machine]:
        """All that there were lately, and this one."""
        with self._lock:
            return {**{i: s.machine for i, s in self._signs.items()}, self.me: self._own}

    def alive(self) -> dict[str, Machine]:
        """Those whose command is there, and this one."""
        with self._lock:
            now = time.monotonic()
            there = {
                name: sign.machine
                for name, sign in self._signs.items()
                if not sign.has_left and self._is_alive(name, now)
            }
            return {**there, self.me: self._own}

    def twin(self) -> int | None:
        """The process of another command on this machine that is in the same run; None: none is."""
        for sign in self._folder.signs().values():
            words = ["", *sign.process.split()]
            if not sign.has_left and process_lives(words) and sign.machine.id != self.me:
                return int(words[2])
        return None

    def _is_alive(self, name: str, now: float) -> bool:
        _, since = self._seen.get(name, (0, None))
        return since is not None and now - since < self._patience

    def _run(self) -> None:
        while not self._over.wait(SECONDS):
            self._try(self._look)

    def _try(self, what: Callable[[], None]) -> None:
        """The others count on a sign each second: what fails is told, and tried again."""
        try:
            what()
            self.trouble = None
        except Exception as error:
            self.trouble = str(error) if isinstance(error, OSError) else repr(error)

    def _look(self) -> None:
        self._show()
        signs = self._folder.signs()
        now = time.monotonic()
        with self._lock:
            # This one was frozen, or the disk did not answer: nobody is gone for that.
            lost = max(0.0, now - self._looked - 3 * SECONDS)
            self._looked = now
            for name, sign in signs.items():
                beat, since = self._seen.get(name, (sign.beat, None))
                since = None if since is None else since + lost
                self._seen[name] = sign.beat, now if sign.beat != beat else since
            self._signs = {name: sign for name, sign in signs.items() if name != self.me}
            others = [s.machine for n, s in self._signs.items() if self._is_alive(n, now)]
        answers = reached(others, self._pool)
        now = time.monotonic()
        self._answers |= {name: (where, now) for name, where in answers.items()}
        heard = {n: where for n, (where, at) in self._answers.items() if now - at < KEPT_SECONDS}
        with self._lock:
            self._own = replace(self._own, reaches=heard, addresses=own_addresses())

    def _show(self) -> None:
        with self._lock:
            self._beat += 1
            sign = Sign(self._own, self._beat, self._process, self._has_left, self._waits)
            self._folder.show(sign)
