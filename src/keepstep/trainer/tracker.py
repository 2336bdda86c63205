"""What keepstep asks of every tracker that continues one run."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keepstep.policy.tracking import OWN, TrackerRun


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with.

    Attributes:
        run: its names.
        start: the step that the attempt goes on from.
        reached: the step up to which it has been given everything, as the run folder knows it.
        args, state, model: the Trainer's.
    """

    run: TrackerRun
    start: int
    reached: int
    args: Any
    state: Any
    model: Any

    def named(self, title: str) -> Any:
        """The Trainer's arguments, with this for the run's name."""
        args = copy.copy(self.args)
        args.run_name = title
        return args


class Tracker:
    """A callback of transformers, and what keepstep adds. Ranks: the main process.

    Attributes:
        callback: it.
        name: as `report_to` has it.
        is_live: what comes twice takes the place of what was there, so nothing need be held back.
    """

    name = ""
    is_live = False

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def open(self, opening: Opening) -> int:
        """Continue the tracker run, or begin it; returns the step up to which it has everything.

        Raises:
            Exception: whatever the tracker raises: it cannot be reached, nobody is logged in.
        """
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether it has this value of the step that `open` has returned."""
        return True

    def give(self, step: int, values: Mapping[str, Any], state: Any, control: Any) -> None:
        """The values of one step."""
        own = {name: value for name, value in values.items() if name.startswith(OWN)}
        logs = {name: value for name, value in values.items() if name not in own}
        if own:
            self.give_own(step, own)
        if logs:
            self._log(step, logs, state, control)

    def give_own(self, step: int, figures: Mapping[str, float]) -> None:
        """keepstep's own figures, under their own names."""
        raise NotImplementedError

    def close(self, args: Any, state: Any, control: Any) -> None:
        """Where nothing was trained: a run that is finished was told what it lacked."""
        self.callback.on_train_end(args, state, control)

    def _log(self, step: int, logs: dict[str, Any], state: Any, control: Any) -> None:
        """As the Trainer would have told it at that step."""
        at_step = copy.copy(state)
        at_step.global_step, at_step.epoch = step, logs.get("epoch", state.epoch)
        # Not the callback's own attribute, which holds back.
        type(self.callback).on_log(self.callback, self._args, at_step, control, logs=logs)

    _args: Any = None


@contextlib.contextmanager
def environment(
    values: Mapping[str, str], unless_set: Mapping[str, str] | None = None
) -> Iterator[None]:
    """These variables, while a tracker is opened: it reads them, and so would another program that
    this one starts later."""
    wanted = {**{k: v for k, v in (unless_set or {}).items() if k not in os.environ}, **values}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
