"""What could not be done and is to stop nothing else: told once, and tried again another time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from keepstep.run_folder.storage import NotOwnerError

logger = logging.getLogger(__name__)


class Setbacks:
    """Errors of the disk that an attempt lives with.

    One folder that cannot be removed, renamed or linked (an open file on NFS, `chattr +i`, a
    mount, no symbolic links) is no reason to leave the others, or to fail a start or a save.
    """

    def __init__(self) -> None:
        self._told: set[tuple[str, int | None]] = set()

    @contextlib.contextmanager
    def allowed(self, what: str) -> Iterator[None]:
        """An error of the disk in here ends this block, and no more: `what` is told with it.

        Raises:
            NotOwnerError: always passed on: whoever has lost the run must end.
        """
        try:
            yield
        except NotOwnerError:
            raise
        except OSError as error:
            if (what, error.errno) not in self._told:  # and not at every save
                self._told.add((what, error.errno))
                logger.warning("%s: %s\n    It is tried again, and not told again.", what, error)
