"""The trackers of transformers that continue one run: how each is told its id, what it has already,
and how it is given keepstep's own figures. All else is their own callbacks'.

The libraries themselves are imported by these callbacks alone: none of them need be there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from keepstep.policy.tracking import OWN, TrackerRun
from keepstep.ranks.console import waiting
from keepstep.trainer.courier import Courier, line_of
from keepstep.trainer.offline_trackers import Comet, SwanLab
from keepstep.trainer.tracker import Opening, Tracker, environment
from keepstep.trainer.wandb_files import newest_step

STEP = "train/global_step"  # the axis that those callbacks give to W&B and trackio
TAG = "keepstep.run"


class TensorBoard(Tracker):
    """One folder. What an attempt has shown after its last commit, the next one takes back
    (`purge_step`), and shows again."""

    name, is_live = "tensorboard", True

    def open(self, opening: Opening) -> int:
        callback, self._args = self.callback, opening.args
        above = callback.logging_dir or os.path.join(opening.args.output_dir, "runs")
        folder = Path(above) / opening.run.id
        is_there = any(folder.glob("events.out.tfevents.*"))  # on another machine: nothing is
        reached = min(opening.reached, opening.start) if is_there else opening.run.origin
        callback.logging_dir = str(folder)
        purge = {"purge_step": reached + 1} if is_there else {}
        callback.tb_writer = callback._SummaryWriter(log_dir=str(folder), **purge)
        return reached

    def give_own(self, step: int, figures: Mapping[str, float]) -> None:
        writer = self.callback.tb_writer
        if writer is not None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)
            writer.flush()


class WeightsAndBiases(Tracker):
    """One id, `resume: allow`. Rows have the steps' own numbers: of what comes twice a server takes
    the first."""

    name = "wandb"

    def open(self, opening: Opening) -> int:
        run, self._args, wandb = opening.run, opening.args, self.callback._wandb
        own = _own_id("WANDB_RUN_ID", run)
        if self._run is not None and self._run.id in _OPENED - {own}:
            wandb.finish()  # of another run of this process
        if self._run is None:  # else a person has opened it
            # Not by its variables, which it reads once in a process.
            wandb.init(
                project=os.getenv("WANDB_PROJECT", "huggingface"),
                **{"id": own, "resume": "allow"},
                name=run.title if opening.args.run_name else os.getenv("WANDB_NAME", run.title),
                group=os.getenv("WANDB_RUN_GROUP", run.group),
            )
            _OPENED.add(own)
        self.callback.setup(opening.args, opening.state, opening.model)
        reached = self._reached(opening)
        self._floor = reached + 1
        return reached

    def _reached(self, opening: Opening) -> int:
        """As W&B itself tells it: a killed process takes along what it had not sent, or written."""
        run = self._run
        if run.offline:
            own = Path(run.settings.sync_file)
            there = newest_step(own.parents[1], run.id, own, STEP)
            return opening.reached if there is None else max(there, opening.run.origin)
        known = run.summary.get(STEP) if run.resumed else None
        return opening.run.origin if known is None else int(known)

    @property
    def _run(self) -> Any:
        return self.callback._wandb.run

    def close(self, args: Any, state: Any, control: Any) -> None:
        """It ends with the process. Its callback would only upload the model (`WANDB_LOG_MODEL`),
        which here has not been loaded."""

    def give(self, step: int, values: Mapping[str, Any], state: Any, control: Any) -> None:
        own = {name: value for name, value in values.items() if name.startswith(OWN)}
        logs = {name: value for name, value in values.items() if name not in own}
        row = max(step, self._floor, self._run.step)
        self._run.log(own | ({} if logs else {STEP: step}), step=row, commit=not logs)
        if logs:
            self._log(step, logs, state, control)  # into the same row


_OPENED: set[str] = set()  # ids of runs of W&B, by this process


class Trackio(Tracker):
    """A run is known by its name."""

    name = "trackio"

    def open(self, opening: Opening) -> int:
        self._args = opening.args
        title = f"{opening.run.name}-{opening.run.id}"
        self.callback.setup(opening.named(title), opening.state, opening.model)
        if self.callback._space_id is not None:
            return opening.reached
        # What a killed process had not written yet (half a second) is made up for.
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(opening.args.project, title)
        return max((int(row[STEP]) for row in rows if STEP in row), default=opening.run.origin)

    def give_own(self, step: int, figures: Mapping[str, float]) -> None:
        self.callback._trackio.log({**figures, STEP: step})


class MLflow(Tracker):
    """The server makes ids, so a run is found by its tag, on whatever machine. It is asked for the
    last step that it has.

    Its own way of not waiting sends several batches at once, and drops one that fails: a server
    that is away for a while, or a kill, would leave a hole in the curve.
    """

    name = "mlflow"

    def __init__(self, callback: Any) -> None:
        super().__init__(callback)
        self._courier = Courier(self.name, self._send)
        self._run_id, self._has_ended = "", False
        callback.on_train_end = self._end

    def open(self, opening: Opening) -> int:
        with waiting("opening MLflow"):
            return self._open(opening)

    def _open(self, opening: Opening) -> int:
        self._args, mlflow, run = opening.args, self.callback._ml_flow, opening.run
        client = mlflow.MlflowClient()
        asked = os.environ.get("MLFLOW_RUN_ID") if run.is_first else None
        found = asked or self._find(client, run.id)
        is_new = found is None
        if found is None:
            parent = None if run.is_first else self._find(client, run.first_id)
            tags = {TAG: run.id} | ({"mlflow.parentRunId": parent} if parent else {})
            made = client.create_run(self._experiment(client), run_name=run.title, tags=tags)
            found = made.info.run_id
        # Parameters are not to change: those of the first attempt stay.
        with environment({"MLFLOW_RUN_ID": found}, {} if is_new else _NO_PARAMETERS):
            self.callback.setup(opening.named(run.title), opening.state, opening.model)
        if self._has_ended:  # a later training of this process
            self._courier = Courier(self.name, self._send)
        self._run_id, self._has_ended = found, False
        points = client.get_metric_history(found, "epoch")  # is in every line of the Trainer's
        return max((point.step for point in points), default=run.origin)

    def _experiment(self, client: Any) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = client.get_experiment_by_name(name)
        return str(client.create_experiment(name) if found is None else found.experiment_id)

    def _find(self, client: Any, own: str) -> str | None:
        asked = f"tags.`{TAG}` = '{own}'"
        found = client.search_runs([self._experiment(client)], filter_string=asked)
        return str(found[0].info.run_id) if found else None

    def give(self, step: int, values: Mapping[str, Any], state: Any, control: Any) -> None:
        self.give_own(step, {name: value for name, value in values.items() if _is_number(value)})

    def give_own(self, step: int, figures: Mapping[str, float]) -> None:
        metric, moment = self.callback._ml_flow.entities.Metric, int(time.time() * 1000)
        points = [
            metric(_NOT_IN_NAMES.sub("_", name), float(value), moment, step)
            for name, value in figures.items()
        ]
        for first in range(0, len(points), _AT_ONCE):
            some = points[first : first + _AT_ONCE]
            if not self._has_ended:
                self._courier.put(some)
                continue
            with environment({}, _HURRIED):  # a script's own evaluation, after the training
                self._send([some])

    def _send(self, oldest: Sequence[Sequence[Any]]) -> int:
        """As many steps as go into one request. What has arrived, though the answer did not, is
        there once: a point that is the same, to the millisecond, takes its own place."""
        points, count = list(oldest[0]), 1
        while count < len(oldest) and len(points) + len(oldest[count]) <= _AT_ONCE:
            points += oldest[count]
            count += 1
        client = self.callback._ml_flow.MlflowClient()
        client.log_batch(self._run_id, metrics=points, synchronous=True)
        return count

    def _end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In the place of the callback's own, which would wait for a server for minutes.

        Raises:
            TimeoutError: not all has arrived.
        """
        left = self._courier.finish(PATIENCE)
        self._has_ended = True
        with environment({}, _HURRIED):
            type(self.callback).on_train_end(self.callback, args, state, control, **kwargs)
        if left:
            why = self._courier.failure
            raise TimeoutError(f"no answer for {PATIENCE} s" if why is None else line_of(why))


PATIENCE = 30  # seconds, at an attempt's end, in which nothing arrives
_AT_ONCE = 1000  # points in a request: MLflow takes no more
_NOT_IN_NAMES = re.compile(r"[^0-9A-Za-z_\-\.\ :/]")  # as the callback of transformers has it
_HURRIED = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (
        isinstance(value, torch.Tensor) and value.numel() == 1
    )


_NO_PARAMETERS = {"MLFLOW_MAX_LOG_PARAMS": "0"}


# By the name of the callback's class.
KINDS: Mapping[str, type[Tracker]] = {
    "TensorBoardCallback": TensorBoard,
    "WandbCallback": WeightsAndBiases,
    "TrackioCallback": Trackio,
    "MLflowCallback": MLflow,
    "SwanLabCallback": SwanLab,
    "CometCallback": Comet,
}


def _own_id(variable: str, run: TrackerRun) -> str:
    """What a person has set is the first tracker run's."""
    asked = os.environ.get(variable)
    return run.id if not asked else asked + run.id.removeprefix(run.run_id)
