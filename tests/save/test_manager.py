"""What an attempt leaves for the next one to know: who is to blame, and whether the run is over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from keepstep.policy.batch import Batch
from keepstep.policy.manifest import Manifest
from keepstep.policy.parallel_layout import ParallelLayout
from keepstep.policy.retention import Policy
from keepstep.policy.selection import NoProgressError
from keepstep.ranks.outcome import Outcome, ended
from keepstep.recipe.config import ConfigError, refused_by_libraries
from keepstep.run_folder.notes import notes_on
from keepstep.run_folder.place import Place, read_place
from keepstep.run_folder.reader import RunFolder
from keepstep.save import manager as manager_module
from keepstep.save.manager import CheckpointManager
from keepstep.save.resume_checks import Resume
from tests.helpers.folders import STATE, commit, identify, manifest

PLAN = {"steps": 30}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = identify(tmp_path / "run")
    for step in (10, 20):
        commit(folder, step, STATE)
    return folder


def attempt(run: Path, recipe: str = "this", request: str = "auto") -> CheckpointManager:
    """One that has chosen what to resume from."""
    manager = CheckpointManager(run, Policy())
    manager.start()
    manager.choose(
        Resume(request, recipe=recipe, batch=Batch(1, 1, 2), parallel_layout=ParallelLayout(2, 3))
    )
    return manager


def chosen(run: Path, recipe: str = "this", request: str = "auto") -> int | None:
    """What the next attempt resumes from."""
    found = attempt(run, recipe, request).chosen
    return found.step if found else None


def is_finished(
    run: Path,
    plan: dict = PLAN,
    recipe: str = "this",
    request: str = "auto",
    saves_it: bool = False,
) -> bool:
    finish = attempt(run, recipe, request).finish
    return finish is not None and finish.holds(plan, saves_it)


def killed_before_it_loads(manager: CheckpointManager) -> None:
    pass


def failed_before_it_loads(manager: CheckpointManager) -> None:
    manager.end(ended("failed", reason="OSError: no such model"))


def refused(manager: CheckpointManager) -> None:
    manager.begin_training()
    manager.end(Outcome("failed", "configuration", exit=2))


def interrupted_twice(manager: CheckpointManager) -> None:
    manager.begin_training()
    manager.stop_asked("SIGINT")


def rank_lost(manager: CheckpointManager) -> None:
    """The launcher ends the ranks that are left, by TERM and then by force."""
    manager.begin_training()
    manager.stop_asked("SIGTERM")


def could_not_save(manager: CheckpointManager) -> None:
    manager.begin_training()
    manager.writer.record("save_failed", step=30, reason="rank 0: OSError: no space left")
    manager.end(ended("failed", reason="checkpoint-30 was not saved", global_step=30))


def stopped(manager: CheckpointManager) -> None:
    manager.end(ended("preempted", reason="SIGTERM to rank 0, before training began"))


@pytest.mark.parametrize(
    "end",
    [
        *(killed_before_it_loads, failed_before_it_loads, refused, interrupted_twice, stopped),
        could_not_save,
    ],
)
def test_no_checkpoint_is_to_blame(run: Path, end: object) -> None:
    for _ in range(4):
        end(attempt(run))  # type: ignore[operator]
    assert chosen(run) == 20


def killed(manager: CheckpointManager) -> None:
    """While it loads, or in a step."""
    manager.begin_training()


def failed(manager: CheckpointManager) -> None:
    manager.begin_training()
    manager.end(ended("failed", reason="RuntimeError: a shard cannot be loaded"))


def test_a_stop_through_the_script_is_somebodys(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPSTEP_STATUS_FILE", str(tmp_path / "status.json"))
    (tmp_path / "asked").touch()
    for _ in range(4):
        rank_lost(attempt(run))
    assert chosen(run) == 20


@pytest.mark.parametrize("end", [killed, failed, rank_lost])
def test_crash_loops_end(run: Path, end: object) -> None:
    for step in (20, 20, 20, 10, 10, 10):
        manager = attempt(run)
        assert manager.chosen is not None
        assert manager.chosen.step == step
        end(manager)  # type: ignore[operator]
    with pytest.raises(NoProgressError, match="checkpoint-20: resumed 3 times without progress"):
        chosen(run)
    assert chosen(run, recipe="repaired") == 20


def test_a_run_that_has_finished_is_known(run: Path) -> None:
    """Its last steps have no checkpoint; it was killed while it published; one dies since."""
    assert not is_finished(run)
    attempt(run).record_finish(30, PLAN)
    killed(attempt(run))
    assert is_finished(run)
    finish = attempt(run).finish
    assert finish is not None
    assert (finish.step, finish.newest) == (30, 20)
    assert not is_finished(run, {"steps": 40})
    for request in ("10", "never", "20"):  # a person who goes back wants it to be trained again
        assert not is_finished(run, request=request)


def test_a_run_without_checkpoints_that_has_finished_is_known(tmp_path: Path) -> None:
    run = identify(tmp_path / "run")
    attempt(run).record_finish(30, PLAN)
    assert is_finished(run)
    assert not is_finished(run, request="never")


@pytest.mark.parametrize("saved", [[], [10, 20]])
def test_without_a_checkpoint_of_its_last_step_another_recipe_is_not_finished(
    tmp_path: Path, saved: list[int]
) -> None:
    """Once `save_strategy: no` or `best`; now another, that may save, or learn otherwise."""
    run = identify(tmp_path / "run")
    for step in saved:
        commit(run, step, STATE)
    attempt(run, "first").record_finish(30, PLAN)
    assert is_finished(run, recipe="first")
    assert not is_finished(run, recipe="first", saves_it=True)
    assert not is_finished(run, recipe="another")
    assert not is_finished(run, {"steps": 12}, recipe="another")


def test_a_finished_run_with_a_checkpoint_of_its_last_step_is_finished_by_that(run: Path) -> None:
    """Whatever else has changed, that checkpoint's settings are compared."""
    attempt(run).record_finish(20, {"steps": 20})
    assert is_finished(run, {"steps": 20}, recipe="another", saves_it=True)


FORGED = {"time": "2026-01-01T00:00:00", "attempt": 1, "event": "finished", "step": 30}
FORGED |= {"newest": 20, "plan": PLAN}


def test_a_forged_line_finishes_no_run(run: Path) -> None:
    killed(attempt(run))
    with (run / ".keepstep/events.jsonl").open("a") as file:
        file.write(json.dumps(FORGED) + "\n")
    assert not is_finished(run)


@pytest.mark.parametrize("number", [500, 10**9, 10**15, 10**24])
def test_a_forged_number_is_not_counted_on_from(run: Path, number: int) -> None:
    with (run / ".keepstep/events.jsonl").open("a") as file:
        file.write(json.dumps(FORGED | {"event": "attempt", "attempt": number}) + "\n")
    assert attempt(run).attempt == 2
    assert attempt(run).attempt == 3
    assert [a.number for a in RunFolder(run).attempts()] == [1, 2, 3]
    assert "1 of 5 lines is damaged" in notes_on(RunFolder(run))[".keepstep/events.jsonl"]


def test_the_next_number_is_one_that_a_manifest_holds(run: Path) -> None:
    commit(run, 30, STATE, attempt=10**9)
    manager = attempt(run)
    Manifest.from_json(manifest(40, attempt=manager.attempt).to_json())


def test_a_run_whose_newest_checkpoint_is_gone_is_not_finished(run: Path) -> None:
    attempt(run).record_finish(20, PLAN | {"patience": 1})
    (run / "checkpoint-20/manifest.json").unlink()
    (run / "checkpoint-20").rename(run / "gone")
    assert not is_finished(run, PLAN | {"patience": 1})


def test_what_a_library_refuses_is_the_recipes() -> None:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    adapter = LoraConfig(target_modules=["nowhere"])
    with (
        pytest.raises(ConfigError, match=r"(?s)Error: .*nowhere.*refused by .*\.py:\d+"),
        refused_by_libraries(),
    ):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), adapter)


def test_a_library_is_one_wherever_the_project_was_cloned_to(tmp_path: Path) -> None:
    """As into a folder of the project's name, with its environment inside."""
    library = tmp_path / "keepstep/.venv/library.py"
    code = compile("raise ValueError('not so')", str(library), "exec")
    with pytest.raises(ConfigError, match="not so"), refused_by_libraries():
        exec(code)


def test_what_is_not_the_recipes_is_not_refused() -> None:
    from keepstep.output.units import parse_bytes

    with pytest.raises(OSError, match="no-such-file"), refused_by_libraries():
        Path("/no-such-file").read_text()
    with pytest.raises(ValueError, match="much") as caught, refused_by_libraries():
        parse_bytes("much")
    assert not isinstance(caught.value, ConfigError)  # our own code's


def test_a_machine_that_goes_on_alone(run: Path) -> None:
    """It has the log from here on: the folder does not send people to the one that had it."""
    place = RunFolder(run).place
    attempt(run)
    assert not place.exists(), "no machine's own folder"
    place.write_bytes(Place("n2", "n1", "s3://bucket/run").as_text())
    attempt(run)
    now = read_place(RunFolder(run))
    assert now is not None
    assert now.main == now.host


def test_how_far_the_digests_are_compared_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes, of a large checkpoint, ahead of the first step."""
    told: list[tuple[str, int, int | None]] = []

    @contextmanager
    def progress(text: str) -> Iterator[Callable[[int, int | None], None]]:
        yield lambda done, total: told.append((text, done, total))

    monkeypatch.setattr(manager_module, "progress", progress)
    total = attempt(run).run.checkpoint(20).manifest.total_bytes
    assert {text for text, _, _ in told} == {"verifying checkpoint-20"}
    assert told[-1] == ("verifying checkpoint-20", total, total)
