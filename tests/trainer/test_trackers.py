"""Trackers of a run without a model: their own callbacks, a real run folder, their own stores."""

from __future__ import annotations

import importlib.util
import logging
import os
import resource
import shutil
import sqlite3
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState
from transformers.integrations import get_reporting_integration_callbacks

from keepstep.ranks.time_sheet import TimeSheet
from keepstep.recipe.problems import ConfigError
from keepstep.run_folder.launched import Launched
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.tracking import show_tracked, tracked_of
from keepstep.trainer.tracker_kinds import KINDS
from keepstep.trainer.trackers import Trackers
from tests.helpers import trackers
from tests.helpers.attempts import Launch
from tests.slurm.helpers.processes import wait_for

LIBRARIES = ("tensorboard", "wandb", "trackio", "mlflow")
lacks = {name: importlib.util.find_spec(name) is None for name in LIBRARIES}
FACTS = {"stall": 0.1, "write": 0.2, "gb_per_s": 1.5}


class Args(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate}

    def to_json_string(self) -> str:
        return "{}"


class Attempt:
    """One launch; `train` makes steps, and commits those of `saves`."""

    def __init__(self, run: Path, report_to: list[str], request: str = "auto", **args: Any):
        self.launch = Launch(run, request=request)
        writer, start = self.launch.writer, self.launch.step
        self.manager = SimpleNamespace(
            **{"run": writer.run, "writer": writer, "storage": writer.storage},
            **{"attempt": writer.attempt, "owned": lambda: True, "time_sheet": TimeSheet()},
        )
        known: dict[str, Any] = {
            "run_name": None,
            "project": "huggingface",
            "output_dir": str(run),
            "bf16": False,
        }
        known |= {"trackio_space_id": None, "trackio_bucket_id": None, "fp16": False}
        known |= {
            "hub_private_repo": None,
            "resume_from_checkpoint": None,
            "learning_rate": 0.1,
            "device": torch.device("cpu"),
        }
        self.args = Args(**known | args)
        self.callback_handler = SimpleNamespace(
            callbacks=[kind() for kind in get_reporting_integration_callbacks(report_to)]
        )
        self.start = self.launch.folder.checkpoint(start) if start else None
        self.state = TrainerState(global_step=start, max_steps=99, epoch=start / 10)
        self.state.log_history = [
            {"loss": 1 / step, "epoch": step / 10, "step": step} for step in range(1, start + 1)
        ]
        self.control, self.model = None, torch.nn.Linear(1, 1)
        self.preempted: str | None = None
        self.last_saved: Any = None
        self.resharded = None
        self.saving = SimpleNamespace(complete=True)
        self.every_step = SimpleNamespace(lost_work_bound=lambda: 12.0)
        self.saves = True
        self.callback_handler.callbacks.insert(0, Trackers(self))  # type: ignore[arg-type]

    def saved_step(self) -> int | None:
        return None if self.last_saved is None else int(self.last_saved.checkpoint.step)

    def saves_on_its_way(self) -> bool:
        return self.saves

    def tell(self, event: str, **facts: Any) -> None:
        for callback in self.callback_handler.callbacks:
            getattr(callback, event)(self.args, self.state, None, model=self.model, **facts)

    def log(self, logs: dict[str, Any]) -> None:
        logs["epoch"] = self.state.epoch
        self.tell("on_log", logs=logs)

    def train(self, to: int, saves: tuple[int, ...] = (), told: bool = True) -> None:
        self.tell("on_train_begin")
        for step in range(self.state.global_step + 1, to + 1):
            self.state.global_step, self.state.epoch = step, step / 10
            self.log({"loss": 1 / step})
            if step in saves:
                self.log({"eval_loss": 2 / step})
                self.launch.save(step, loss=2 / step)
                checkpoint = self.launch.folder.checkpoint(step)
                self.state.log_history = [
                    {"loss": 1 / at, "epoch": at / 10, "step": at} for at in range(1, step + 1)
                ]
                self.state.save_to_json(str(checkpoint.path / "trainer_state.json"))
                facts = {"checkpoint": checkpoint, "facts": FACTS, "free": 10**9}
                self.last_saved = SimpleNamespace(**facts)
                if told:
                    committed = self.callback_handler.callbacks[0].on_checkpoint_committed
                    committed(self.args, self.state, None, checkpoint=checkpoint)

    def make_up(self) -> None:
        """The same command, of a run that is finished."""
        self.callback_handler.callbacks[0].make_up()
        self.killed(("WandbCallback",))

    def end(self) -> None:
        self.log({"train_runtime": 3.0, "train_loss": 0.5})
        self.tell("on_train_end")
        self.killed(("WandbCallback",))  # which ends with its process

    def killed(self, ends: Collection[str] = KINDS) -> None:
        """What a process's end leaves of libraries that live in this one."""
        for callback in self.callback_handler.callbacks[1:]:
            name = type(callback).__name__
            if name not in ends:
                continue
            if name == "MLflowCallback":
                if fed := self.callback_handler.callbacks[0]._fed:
                    fed[0].tracker._courier.finish(300)
                callback._ml_flow.end_run("KILLED")
            elif name == "TrackioCallback":
                callback._trackio.finish()
            elif name == "WandbCallback":
                callback._wandb.finish()
            elif callback.tb_writer is not None:
                callback.tb_writer.close()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W&B asks for its folder once in a process."""
    return tmp_path_factory.mktemp("offline")


@pytest.fixture
def place(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(offline))
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    if not lacks["trackio"]:
        import trackio.sqlite_storage as store
        import trackio.utils

        for module in (trackio.utils, store):  # it has looked at its variable when imported
            if hasattr(module, "TRACKIO_DIR"):
                monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path


def tensorboard_losses(run: Path) -> dict[str, list[int]]:
    return {
        folder.name: [step for step, _ in trackers.tensorboard(folder)["train/loss"]]
        for folder in sorted((run / "runs").iterdir())
    }


def losses(place: Path, report_to: str) -> dict[str, list[int]]:
    """Tracker run → the steps that have a loss there."""
    if report_to == "tensorboard":
        return tensorboard_losses(place / "run")
    if report_to == "mlflow":
        found = trackers.mlflow_points(f"file://{place}/mlflow")
        return {name: [step for step, _ in of["loss"]] for name, of in sorted(found.items())}
    offline = Path(os.environ["WANDB_DIR"])
    own = RunFolder(place / "run").run_id() or ""
    rows = (
        {n: r for n, r in trackers.wandb_rows(offline).items() if n.startswith(own)}
        if report_to == "wandb"
        else {
            n.removeprefix("run-"): r for n, r in trackers.trackio_rows(place / "trackio").items()
        }
    )
    return {name: trackers.steps_of(rows[name], "train/loss") for name in sorted(rows)}


@pytest.mark.parametrize(
    "report_to",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.skipif(lacks[name], reason=f"{name} is not installed"),
                *([pytest.mark.long] if name == "mlflow" else []),  # a second for each attempt
            ],
        )
        for name in LIBRARIES
    ],
)
def test_three_attempts_and_a_branch(place: Path, report_to: str) -> None:
    run = place / "run"
    first = Attempt(run, [report_to])
    first.train(5, saves=(2, 4), told=False)  # killed before a commit is told of
    first.killed()
    second = Attempt(run, [report_to])
    second.train(7, saves=(6,))
    second.killed()
    third = Attempt(run, [report_to], learning_rate=0.2)
    third.train(9, saves=(8, 9))
    third.end()
    own = third.launch.writer.run_id
    assert losses(place, report_to) == {own: list(range(1, 10))}
    assert tracked_of(third.launch.folder).reached == {report_to: 9}

    again = Attempt(run, [report_to])  # the same command once more: there is nothing to train
    again.train(9)
    again.end()
    assert losses(place, report_to) == {own: list(range(1, 10))}

    back = Attempt(run, [report_to], request="6")
    back.train(7)  # killed before it has committed: no branch yet
    back.killed()
    assert tracked_of(back.launch.folder).branch == 0
    back = Attempt(run, [report_to], request="6")
    back.train(10, saves=(8,))
    back.killed()
    on = Attempt(run, [report_to], request="6")
    assert on.launch.step == 8
    on.train(10, saves=(10,))
    on.end()
    assert losses(place, report_to) == {
        own: list(range(1, 10)),
        f"{own}-branch-1": [7, 8, 9, 10],
    }


@pytest.mark.parametrize(
    ("report_to", "knows"),
    [
        ("wandb", True),
        ("tensorboard", True),
        ("tensorboard", False),
        pytest.param(
            *("mlflow", False),
            marks=pytest.mark.skipif(lacks["mlflow"], reason="mlflow is not installed"),
        ),
    ],
)
def test_the_newest_checkpoint_is_lost(place: Path, report_to: str, knows: bool) -> None:
    """With its machine, say, and the run comes from a mirror, which may know less of trackers. What
    is made again has been told, and nobody has gone back."""
    first = Attempt(place / "run", [report_to])
    first.train(3, saves=(3,))
    behind = tracked_of(first.launch.folder)
    first.killed()
    second = Attempt(place / "run", [report_to])
    second.train(6, saves=(6,))
    second.killed()
    shutil.rmtree(place / "run/checkpoint-6")
    if not knows:
        show_tracked(second.launch.folder, second.launch.writer.storage, behind)
    third = Attempt(place / "run", [report_to])
    assert third.launch.step == 3
    third.train(8, saves=(8,))
    third.end()
    assert list(losses(place, report_to).values()) == [list(range(1, 9))]


def launch_told(attempt: Attempt, run: Path) -> None:
    """As an attempt writes down what it was launched as."""
    number, recipe = attempt.manager.attempt, {"output_dir": run.name}
    attempt.launch.writer.keep_launched(
        Launched(number, "", "", str(run.parent), None, {}, recipe, {}, "", {}, {})
    )


@pytest.mark.parametrize("what", ["copied", "moved"])
def test_a_copied_folder_has_a_curve_of_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The original goes on where it was. A folder that was moved is the run."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(place / "all"))
    first = Attempt(place / "run", ["tensorboard"])
    launch_told(first, place / "run")
    first.train(3, saves=(3,))
    first.killed()
    other = place / "other"
    if what == "moved":
        (place / "run").rename(other)
    else:
        shutil.copytree(place / "run", other, symlinks=True)
    for to, saves in ((4, ()), (5, (5,)), (7, (7,))):  # one killed before its commit
        attempt = Attempt(other, ["tensorboard"])
        launch_told(attempt, other)
        attempt.train(to, saves=saves)
        attempt.killed()
    found = {
        folder.name: [step for step, _ in trackers.tensorboard(folder)["train/loss"]]
        for folder in sorted((place / "all").iterdir())
    }
    own = first.launch.writer.run_id
    if what == "moved":
        assert found == {own: [1, 2, 3, 4, 5, 6, 7]}
        return
    mark = tracked_of(attempt.launch.folder).copy
    assert found == {own: [1, 2, 3], f"{own}-copy-{mark}": [4, 5, 6, 7]}
    on = Attempt(place / "run", ["tensorboard"])
    on.train(5, saves=(5,))
    on.killed()
    assert [s for s, _ in trackers.tensorboard(place / "all" / own)["train/loss"]] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_on_another_machine(place: Path) -> None:
    """TensorBoard's folder is not there: the curve is made whole from the checkpoint's history."""
    first = Attempt(place / "run", ["tensorboard"])
    first.train(3, saves=(3,))
    first.killed()
    shutil.rmtree(place / "run/runs")
    second = Attempt(place / "run", ["tensorboard"])
    second.train(5, saves=(5,))
    second.end()
    assert list(losses(place, "tensorboard").values()) == [[1, 2, 3, 4, 5]]


def test_figures(place: Path) -> None:
    attempt = Attempt(place / "run", ["tensorboard"], run_name="of a person")
    attempt.train(3, saves=(2,))
    attempt.end()
    (folder,) = (place / "run/runs").iterdir()
    curves: dict[str, Any] = trackers.tensorboard(folder)
    assert curves["keepstep/lost_work_bound_seconds"] == [(1, 12), (2, 12), (3, 12)]
    assert [step for step, _ in curves["keepstep/restart_seconds"]] == [1]
    assert curves["keepstep/save_stall_seconds"] == [(2, pytest.approx(0.1))]
    assert curves["keepstep/save_lag_seconds"] == [(2, pytest.approx(0.3))]
    assert curves["keepstep/disk_free_bytes"] == [(2, 1e9)]
    assert curves["train/train_loss"] == [(3, 0.5)]


def test_without_saves_a_curve_is_live(place: Path) -> None:
    attempt = Attempt(place / "run", ["wandb"])
    attempt.saves = False
    attempt.train(2)
    assert tracked_of(attempt.launch.folder).reached == {"wandb": 2}
    attempt.killed()
    assert list(losses(place, "wandb").values()) == [[1, 2]]


def test_a_stop_whose_save_failed_tells_nothing_of_it(place: Path) -> None:
    attempt = Attempt(place / "run", ["wandb"])
    attempt.train(5, saves=(3,))
    attempt.preempted = "SIGTERM to rank 0"
    attempt.end()
    assert list(losses(place, "wandb").values()) == [[1, 2, 3]]


def test_one_that_cannot_be_reached(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At first that is an error; later the run goes on, and what was saved is made up for."""
    above = place / "logs"
    above.write_text("a file")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(above))
    with pytest.raises(ConfigError, match="report_to: tensorboard: "):
        Attempt(place / "run", ["tensorboard"]).train(1)
    above.unlink()
    first = Attempt(place / "run", ["tensorboard"])
    first.train(2, saves=(2,))
    first.killed()
    above.rename(place / "aside")
    above.write_text("a file")
    with caplog.at_level(logging.WARNING):
        second = Attempt(place / "run", ["tensorboard"])
        second.train(4, saves=(4,))
        second.end()
    assert "the same command makes up for what is saved" in " ".join(caplog.text.split())
    above.unlink()
    (place / "aside").rename(above)
    third = Attempt(place / "run", ["tensorboard"])
    third.train(5, saves=(5,))
    third.end()
    (folder,) = above.iterdir()
    assert [step for step, _ in trackers.tensorboard(folder)["train/loss"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "report_to",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(lacks[name], reason=f"{name} is not installed"),
        )
        for name in LIBRARIES
    ],
)
def test_a_finished_run_makes_up_for_what_was_not_told(place: Path, report_to: str) -> None:
    """Killed, or with its tracker away, when all was saved: no attempt trains any more. Once it has
    everything and was closed, it is not opened again."""
    first = Attempt(place / "run", [report_to])
    first.train(3, saves=(2,))
    first.train(5, saves=(5,), told=False)
    first.killed()
    files = []
    for _ in range(2):
        again = Attempt(place / "run", [report_to])
        assert again.launch.step == 5
        again.make_up()
        files.append(len(list(place.rglob("events.out.*"))))
        assert list(losses(place, report_to).values()) == [[1, 2, 3, 4, 5]]
        assert tracked_of(again.launch.folder).ended == {report_to: 5}
    assert files[0] == files[1]


def test_a_finished_run_whose_tracker_is_still_away(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays finished, and is told of it; also of a tracker that the run never had before."""
    above = place / "logs"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(above))
    attempt = Attempt(place / "run", [])
    attempt.train(2, saves=(2,))
    above.write_text("a file")
    with caplog.at_level(logging.WARNING):
        Attempt(place / "run", ["tensorboard"]).make_up()
    assert "report_to: tensorboard: " in caplog.text
    assert "the same command makes up for what is saved" in " ".join(caplog.text.split())
    above.unlink()
    Attempt(place / "run", ["tensorboard"]).make_up()
    (folder,) = above.iterdir()
    assert [step for step, _ in trackers.tensorboard(folder)["train/loss"]] == [1, 2]


def test_one_that_fails_while_it_closes(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends nothing: here the disk takes no more when TensorBoard writes what it still holds."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(place / "logs"))
    attempt = Attempt(place / "run", ["tensorboard"])
    attempt.train(2, saves=(2,))
    (file,) = (place / "logs").rglob("events.out.*")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = file.stat().st_size
    attempt.callback_handler.callbacks[1].tb_writer.add_text("held", "x" * 99)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            attempt.tell("on_train_end")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "report_to: tensorboard: [Errno 27] File too large" in caplog.text
    assert tracked_of(attempt.launch.folder).ended == {}


@pytest.mark.long  # MLflow waits for a minute
@pytest.mark.skipif(lacks["mlflow"], reason="mlflow is not installed")
def test_a_store_of_mlflow_that_is_locked_for_a_while(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Longer than MLflow tries: what came meanwhile is not lost, and in order."""
    store = f"sqlite:///{place}/store.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    attempt = Attempt(place / "run", ["mlflow"])
    attempt.train(2, saves=(2,))
    fed = attempt.callback_handler.callbacks[0]._fed[0]
    with caplog.at_level(logging.WARNING), sqlite3.connect(place / "store.db") as database:
        database.execute("BEGIN EXCLUSIVE")
        for step in (3, 4):
            fed.held.add(step, {"loss": 1.0, "epoch": 1.0})
            attempt.callback_handler.callbacks[0]._give(fed, step, attempt.state, None)
        wait_for("a failure", lambda: fed.tracker._courier.failure is not None, 300)
        database.rollback()
    attempt.tell("on_train_end")
    assert "report_to: mlflow: it answers again" in caplog.text
    (points,) = trackers.mlflow_points(store).values()
    assert [step for step, _ in points["loss"]] == [1, 2, 3, 4]


@pytest.mark.long  # as the others of MLflow
@pytest.mark.skipif(lacks["mlflow"], reason="mlflow is not installed")
def test_mlflow_after_the_training(place: Path) -> None:
    """A script's own evaluation goes into the same run; so does a second training."""
    attempt = Attempt(place / "run", ["mlflow"])
    attempt.train(2, saves=(2,))
    attempt.end()
    attempt.log({"of_test_set": 0.5})
    attempt.callback_handler.callbacks[1]._ml_flow.end_run()
    again = Attempt(place / "run", ["mlflow"])
    again.train(4, saves=(4,))
    again.end()
    (points,) = trackers.mlflow_points(f"file://{place}/mlflow").values()
    assert points["of_test_set"] == [(2, 0.5)]
    assert [step for step, _ in points["loss"]] == [1, 2, 3, 4]
