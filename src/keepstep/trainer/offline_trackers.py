"""SwanLab and Comet, which without a network write into files that are asked what they have."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import rewrite_logs

from keepstep.trainer.offline_files import Newest, newest_of_comet, newest_of_swanlab
from keepstep.trainer.tracker import Opening, Tracker, environment

_OPENED: set[str] = set()  # ids of runs of SwanLab, by this process


class Offline(Tracker):
    """One whose files are asked what they have, where it is not online."""

    def __init__(self, callback: Any) -> None:
        super().__init__(callback)
        self._newest: Newest | None = None

    def _by(self, newest: Newest | None, opening: Opening) -> int:
        """The step up to which these files have everything, but for what is torn of it."""
        self._newest = newest
        return opening.reached if newest is None else max(newest.step, opening.run.origin)

    def has(self, name: str) -> bool:
        if self._newest is None:
            return True
        return not self._newest.names.isdisjoint(rewrite_logs({name: 0.0}))


class SwanLab(Offline):
    """One id of 21 characters, `resume: allow`."""

    name = "swanlab"

    def open(self, opening: Opening) -> int:
        self._args, title, swanlab = opening.args, opening.run.title, self.callback._swanlab
        own = hashlib.sha256(opening.run.id.encode()).hexdigest()[:21]
        run = self._run()
        if run is not None and run.id in _OPENED - {own}:
            swanlab.finish()  # of another run of this process
            run = None
        if run is None:
            # transformers (5.23) asks for the run that is not there yet, an error since 0.8.
            named = {"project": os.getenv("SWANLAB_PROJECT"), "experiment_name": title}
            swanlab.init(**named, id=own, resume="allow")
            _OPENED.add(own)
        self.callback.setup(opening.named(title), opening.state, opening.model)
        run = self._run()
        if run is None or run.mode == "online":  # nobody can be asked
            return opening.reached
        return self._by(newest_of_swanlab(Path(run.dir).parent, own, Path(run.dir)), opening)

    def _run(self) -> Any:
        try:
            return self.callback._swanlab.get_run()
        except RuntimeError:  # there is none
            return None

    def give_own(self, step: int, figures: Mapping[str, float]) -> None:
        self.callback._swanlab.log(dict(figures), step=step)


class Comet(Offline):
    """One experiment key of 32 characters."""

    name = "comet_ml"

    def open(self, opening: Opening) -> int:
        self._args = opening.args
        own = hashlib.sha256(opening.run.id.encode()).hexdigest()[:32]
        # An archive's name is drawn: after the same seed a second attempt's would be the first's.
        with environment({"COMET_EXPERIMENT_KEY": own}), _unseeded():
            args = opening.named(opening.run.title)
            self.callback.setup(args, opening.state, opening.model)
        return self._reached(opening, own)

    def _reached(self, opening: Opening, own: str) -> int:
        """Of an experiment that goes into archives, by these: one that was killed has left none."""
        experiment = self.callback._experiment
        folder = getattr(experiment, "offline_directory", None)
        if folder is None:
            return opening.reached
        return self._by(newest_of_comet(Path(folder), own), opening)

    def give_own(self, step: int, figures: Mapping[str, float]) -> None:
        if self.callback._experiment is not None:
            self.callback._experiment.log_metrics(dict(figures), step=step)


@contextlib.contextmanager
def _unseeded() -> Iterator[None]:
    """What is drawn within is of no seed, and costs the training's random numbers none."""
    before = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(before)
