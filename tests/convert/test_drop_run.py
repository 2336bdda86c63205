"""`keepstep export --drop_run`: the best verified in its place, then the run's checkpoints gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.cli.space import Freed
from keepstep.convert.export import ExportError
from keepstep.convert.verify import verify_export, verify_merged
from keepstep.policy.manifest import MANIFEST_NAME, FileEntry
from keepstep.policy.strict import build
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from tests.helpers.attempts import Launch
from tests.helpers.folders import events, identify, manifest

runner = CliRunner()
LOSSES = {4: 2.0, 8: 1.0, 12: 1.5}


def checkpoint(run: Path, step: int) -> None:
    """A committed one with the weights of a real model, other ones at each step."""
    torch.manual_seed(step)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes)
    folder = run / f"checkpoint-{step}"
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"state" * 1000)
    files = {p.name: FileEntry(0, p.stat().st_size, digest_of(p)) for p in folder.iterdir()}
    made = manifest(step, files=files, metrics={"eval_loss": LOSSES[step]}, world_size=1)
    (folder / MANIFEST_NAME).write_text(made.to_json())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = identify(tmp_path_factory.mktemp("runs") / "mine", metric="eval_loss")
    for step in LOSSES:
        checkpoint(run, step)
    end(run, "finished", 0)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs/mine", symlinks=True))


def end(run: Path, outcome: str, status: int) -> None:
    folder = RunFolder(run)
    folder.status.write_text(json.dumps({"outcome": outcome, "exit": status, "owner": "x"}))
    keeper = Keeper(folder, folder.policy(), Storage())
    keeper.record("attempt", run_id=keeper.run_id)
    keeper.point()


def told(*command: object) -> tuple[int, str]:
    done = runner.invoke(app, ["export", *(str(word) for word in command), "--drop_run"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def is_best(folder: Path, finished: Path) -> bool:
    """Whether it loads, and has the weights of step 8, bit by bit."""
    ours = LlamaForCausalLM.from_pretrained(folder).state_dict()
    best = LlamaForCausalLM.from_pretrained(finished / "checkpoint-8").state_dict()
    return all(torch.equal(ours[name], tensor) for name, tensor in best.items())


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in RunFolder(run).checkpoints()]


@pytest.mark.parametrize("name", ["", "best", "checkpoint-8"])
def test_the_best_stays_and_the_rest_goes(
    run: Path, finished: Path, tmp_path: Path, name: str
) -> None:
    to = tmp_path / "out/model"
    to.parent.mkdir()
    status, text = told(run / name, "--to", to)
    assert status == 0, text
    assert is_best(to, finished)
    assert steps(run) == []
    assert "read back and compared" in text
    assert f"no checkpoint is left: launched again, {run} begins at step 0" in text
    assert not os.path.lexists(run / "best")
    assert [line["step"] for line in events(RunFolder(run), "prune")] == [4, 12, 8]
    log = runner.invoke(app, ["log", str(run)]).stdout
    assert "exported checkpoint-8 to model, read back whole (keepstep export --drop_run, " in log
    assert sorted(os.listdir(to.parent)) == ["model"]
    again = told(run / name, "--to", to)  # and has nothing to do
    assert again[0] == 0
    assert Launch(run).step == 0


def test_json(run: Path, tmp_path: Path) -> None:
    status, text = told(run, "--to", tmp_path / "m", "--json")
    found: Freed = build(Freed, json.loads(text))
    assert status == 0
    assert list(found.removed) == ["4", "8", "12"]
    assert found.freed > 3 * 5000
    plain = runner.invoke(app, ["export", str(run), "--to", str(tmp_path / "n"), "--json"])
    assert plain.exit_code == 2


def test_what_is_pinned_stays(run: Path, tmp_path: Path) -> None:
    runner.invoke(app, ["pin", str(run), "12"])
    assert told(run, "--to", tmp_path / "m")[0] == 0
    assert steps(run) == [12]


def not_finished(run: Path, to: Path) -> None:
    end(run, "preempted", 75)


def needed(run: Path, to: Path) -> None:
    Launch(identify(run.parent / "other", metric=None), request=str(run / "checkpoint-4"))


def damaged(run: Path, to: Path) -> None:
    path = run / "checkpoint-8/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def something_else(run: Path, to: Path) -> None:
    to.mkdir()
    (to / "model.safetensors").write_bytes(b"theirs")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (not_finished, "has not finished: its checkpoints are what it goes on from"),
        (needed, "checkpoint-4: the run other began there"),
        (something_else, "exists, and is not what was exported of this run"),
    ],
)
def test_where_nothing_is_removed(
    run: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], why: str
) -> None:
    to = tmp_path / "m"
    spoil(run, to)
    status, text = told(run, "--to", to)
    assert status != 0
    assert why in text
    assert steps(run) == [4, 8, 12]


def test_a_damaged_one_is_not_exported(run: Path, tmp_path: Path) -> None:
    damaged(run, tmp_path)
    status, text = told(run, "--to", tmp_path / "m")
    assert (status, steps(run)) == (2, [4, 8, 12])
    assert "content has changed" in text
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_one_flipped_bit_of_the_export_is_seen(
    run: Path, tmp_path: Path, dtype: str | None
) -> None:
    to, best = tmp_path / "m", RunFolder(run).checkpoint(8)
    flags = [] if dtype is None else ["--dtype", dtype]
    runner.invoke(app, ["export", str(run / "best"), "--to", str(to), *flags])
    verify_export(best, to, dtype, lambda done, total: None)
    verify_merged(to, lambda done, total: None)
    path = to / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ExportError, match="is not what was exported"):
        verify_export(best, to, dtype, lambda done, total: None)
    path.write_bytes(whole[:-4])
    for look in (
        lambda: verify_export(best, to, dtype, lambda done, total: None),
        lambda: verify_merged(to, lambda done, total: None),
    ):
        with pytest.raises(ExportError, match="cannot be loaded"):
            look()
    path.write_bytes(whole)
    (to / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"config\.json is not what was exported"):
        verify_export(best, to, dtype, lambda done, total: None)


def test_a_changed_export_is_not_taken_for_it(run: Path, tmp_path: Path) -> None:
    """Killed after the rename, and somebody has written there since."""
    to = tmp_path / "m"
    killed_before(run, to, lambda operation, path: path.name.startswith("checkpoint-"))
    assert to.is_dir()
    assert steps(run) == [4, 8, 12]
    (to / "config.json").write_text("{}")
    assert told(run, "--to", to)[0] == 2
    assert steps(run) == [4, 8, 12]


def killed_before(run: Path, to: Path, when: Callable[[str, Path], bool]) -> bool:
    """The command, in a process that SIGKILL ends ahead of such an operation; whether it came."""
    child = os.fork()
    if child == 0:
        make = Storage.__init__

        def made(self: Storage, *arguments: object) -> None:
            make(self, *arguments)  # type: ignore[arg-type]
            inner = self.before

            def before(operation: str, path: Path) -> None:
                if when(operation, path):
                    os.kill(os.getpid(), signal.SIGKILL)
                inner(operation, path)

            self.before = self._unguarded = before

        Storage.__init__ = made  # type: ignore[method-assign, assignment]
        try:
            told(run / "best", "--to", to)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.long), 6])
def test_killed_at_any_operation(finished: Path, tmp_path: Path, stride: int) -> None:
    """The best is in the run, or verified in its place; the same command goes on to the end."""
    torch.set_num_threads(1)  # a fork has none of the others
    nth, fired = 1, True
    while fired:
        run = Path(shutil.copytree(finished, tmp_path / f"{nth}/mine", symlinks=True))
        to, count = tmp_path / f"{nth}/model", iter(range(1, 10**6))
        fired = killed_before(run, to, lambda *_, count=count, nth=nth: next(count) == nth)
        there = RunFolder(run).checkpoints()
        assert all(RunFolder(run).faults(c, deep=True) == [] for c in there)
        assert 8 in steps(run) or is_best(to, finished)
        assert told(run / "best", "--to", to)[0] == 0
        assert is_best(to, finished)
        assert steps(run) == []
        assert sorted(os.listdir(tmp_path / f"{nth}")) == ["mine", "model"]
        left = list((run / ".keepstep").rglob("*.safetensors"))
        assert left == []
        nth += stride
    assert nth > 30
