"""Disk space that is given back: what goes, what is never gone by accident, killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.cli.space import Freed
from keepstep.policy.manifest import MANIFEST_NAME, WHOLE_NAME
from keepstep.policy.retention import Policy
from keepstep.policy.strict import build
from keepstep.run_folder.by_hand import ByHand, may_be_at_work
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.parts import part_of
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import NotOwnerError, Storage
from keepstep.run_folder.usage import bytes_freed, bytes_under, leftovers_of
from keepstep.run_folder.writer import RunWriter
from tests.helpers.attempts import Launch
from tests.helpers.folders import commit, events, identify, left_behind

runner = CliRunner()
OWNER = "import sys\nfrom keepstep.run_folder.ownership import claim\n"
OWNER += "from keepstep.run_folder.reader import RunFolder\n"
OWNER += "from keepstep.run_folder.storage import Storage\n"
OWNER += "claim(RunFolder(sys.argv[1]), Storage()); print('mine', flush=True); sys.stdin.read()"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """10 to 50, the best of them 20, none beyond the limit."""
    run = identify(tmp_path / "runs/mine", limit=9, ranking="metric", metric="eval_loss")
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5), (40, 1.6), (50, 1.7)):
        commit(run, step, metrics={"eval_loss": loss})
    return run


@pytest.fixture
def at_work(run: Path) -> Iterator[None]:
    """A process of this machine owns the run."""
    command = [sys.executable, "-c", OWNER, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        yield
        owner.kill()


def told(*command: object) -> tuple[int, str]:
    done = runner.invoke(app, [str(word) for word in command])
    return done.exit_code, done.stdout


def freed(*command: object) -> Freed:
    status, text = told(*command, "--json")
    assert status == 0
    found: Freed = build(Freed, json.loads(text))
    return found


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in RunFolder(run).checkpoints()]


def test_rm_removes_what_nobody_needs_and_says_what_it_gave_back(run: Path) -> None:
    dry = freed("rm", run, 10, 40, "--dry_run")
    assert (dry.dry_run, list(dry.removed), steps(run)) == (
        True,
        ["10", "40"],
        [10, 20, 30, 40, 50],
    )
    status, text = told("rm", run, 10, 40)
    assert status == 0
    assert text.startswith("removing checkpoint-10: by hand\nremoving checkpoint-40: by hand\n")
    assert "the run folder took " in text
    assert steps(run) == [20, 30, 50]
    lines = events(RunFolder(run), "prune")
    assert [(line["step"], line["reason"]) for line in lines] == [(10, "by hand"), (40, "by hand")]
    assert lines[0]["by"].startswith("keepstep rm, ")
    assert f"removed checkpoint-10: by hand ({lines[0]['by']})" in told("log", run)[1]
    assert os.readlink(run / "best") == "checkpoint-20"
    assert left_behind(RunFolder(run)) == []
    assert dry.freed <= dry.before - bytes_under([run]) + 3 * 4096  # folders and a log came


def test_what_is_needed_is_not_removed_by_accident(run: Path) -> None:
    folder = RunFolder(run)
    Keeper(folder, folder.policy(), Storage()).pin(10)
    Keeper(folder, folder.policy(), Storage()).record("publish", step=30, repo_id="me/model")
    other = Launch(identify(run.parent / "other", metric=None), request=str(run / "checkpoint-40"))
    assert other.step == 40
    status, text = told("rm", run, 10, 20, 30, 40, 50)
    assert status == 1
    for line in (
        "checkpoint-10: it is pinned",
        "checkpoint-20: it is the best by eval_loss",
        "checkpoint-30: it is what me/model was published from, and its only copy",
        "checkpoint-40: the run other began there",
        "checkpoint-50: it is the newest, which a launch goes on from",
    ):
        assert f"    {line}\n" in text
    assert steps(run) == [10, 20, 30, 40, 50]
    limited = freed("prune", run, "--save_total_limit", 1)
    assert (limited.removed, sorted(limited.held)) == ({}, ["20", "30", "40"])
    assert told("rm", run, 10, 20, 30, 40, 50, "--force")[0] == 0
    assert steps(run) == []
    assert folder.pinned() == set()


def test_a_copy_on_a_mirror_stays_and_counts(run: Path) -> None:
    folder, url = RunFolder(run), "s3://bucket/runs/mine"
    keeper = Keeper(folder, folder.policy(), Storage())
    keeper.record("publish", step=30, repo_id="me/model")
    keeper.record("mirror", step=30, url=url, seconds=1.0)
    status, text = told("rm", run, 30)
    assert status == 0
    assert f"not touched on the mirror {url}: checkpoint-30" in text


@pytest.mark.parametrize("step", ["60", "checkpoint-60", "best", "-1"])
def test_a_step_that_is_not_there(run: Path, step: str) -> None:
    assert told("rm", run, 10, step)[0] == 2
    assert len(steps(run)) == 5


@pytest.mark.parametrize(
    "command",
    [
        "rm {} 10",
        "prune {} --save_total_limit 1",
        "reshard {}/checkpoint-50 --to {}-new --num_processes 1",
    ],
)
def test_a_machines_part(run: Path, command: str) -> None:
    """The others' would stay, and the best be lost that this machine does not know of."""
    for checkpoint in RunFolder(run).checkpoints():
        part, whole = part_of(checkpoint.manifest, ["rng_state_1.pth"])
        (checkpoint.path / WHOLE_NAME).write_bytes(whole)
        (checkpoint.path / MANIFEST_NAME).write_text(part.to_json())
    done = runner.invoke(app, command.replace("{}", str(run)).split())
    assert done.exit_code != 0
    assert "here is one machine's part (node_local)" in done.output
    assert steps(run) == [10, 20, 30, 40, 50]


def test_a_limit_keeps_the_best_whatever_ranks(run: Path) -> None:
    identify(run, limit=9, ranking="recency", metric="eval_loss")
    assert told("prune", run)[1].startswith("nothing to prune\n")
    status, text = told("prune", run, "--save_total_limit", 2)
    assert status == 0
    assert steps(run) == [20, 40, 50]
    assert "checkpoint-20 stays: it is the best by eval_loss\n" in text
    assert told("prune", run, "--save_total_limit", 0)[0] == 2
    assert RunFolder(run).policy().limit == 9  # the run's own is what it was


def test_nothing_goes_while_the_newest_is_damaged(run: Path) -> None:
    (run / "checkpoint-50/model.safetensors").unlink()
    status, text = told("prune", run, "--save_total_limit", 2)
    assert (status, steps(run)) == (2, [10, 20, 30, 40, 50])
    assert "checkpoint-50 is damaged, nothing is pruned" in text


FLAGS = [["--save_total_limit", "1"], ["--quarantine"], ["--leftovers"]]


@pytest.mark.parametrize("command", [["rm", "10"], *(["prune", *flags] for flags in FLAGS)])
@pytest.mark.usefixtures("at_work")
def test_while_it_is_at_work(run: Path, command: list[str]) -> None:
    name, *more = command
    status, text = told(name, run, *more)
    assert status == 1
    assert "is being trained by process " in text
    assert f"`keepstep stop {run}`" in text
    assert len(steps(run)) == 5


@pytest.mark.usefixtures("at_work")
def test_the_runs_own_policy_goes_while_it_is_at_work(run: Path) -> None:
    identify(run, limit=2, ranking="metric", metric="eval_loss")
    assert told("prune", run)[0] == 0
    assert steps(run) == [20, 50]


def test_an_attempt_on_another_machine(run: Path) -> None:
    """Its heart has beaten a moment ago; then it has told of its end; then it was heard of long
    ago, and has not."""
    folder = RunFolder(run)
    folder.owner_file.write_text("abc elsewhere 7 boot.1\n")
    folder.heartbeat.write_text("abc 5\n")
    status, text = told("rm", run, 10)
    assert (status, len(steps(run))) == (1, 5)
    assert "an attempt on elsewhere, heard of " in text
    assert may_be_at_work(folder)
    ended = {"outcome": "finished", "exit": 0, "owner": "abc"}
    folder.status.write_text(json.dumps(ended))
    assert told("rm", run, 10)[0] == 0
    folder.status.unlink()
    os.utime(folder.heartbeat, (time.time() - 3600,) * 2)
    assert told("rm", run, 30)[0] == 0


def test_a_launch_in_the_middle_ends_it(run: Path) -> None:
    """On a file system without locks: the owner is another one before the second rename."""
    renamed: list[Path] = []

    def before(operation: str, path: Path) -> None:
        if operation == "rename" and path.name.startswith("checkpoint-"):
            renamed.append(path)
            RunFolder(run).owner_file.write_text("new elsewhere 7 boot.1\n")

    with pytest.raises(NotOwnerError, match="launched in this moment"):
        ByHand(RunFolder(run), "keepstep rm", Storage(before)).remove({10: "x", 30: "x"})
    assert len(renamed) == 1
    assert steps(run) == [20, 30, 40, 50]


def test_what_has_another_name_gives_nothing_back(run: Path) -> None:
    size = bytes_freed([run / "checkpoint-10"])
    names = ("model.safetensors", "rng_state_0.pth", "rng_state_1.pth")
    for name in names:
        os.link(run / "checkpoint-10" / name, run.parent / name)
        os.link(run / "checkpoint-10" / name, run / "checkpoint-40" / f"again-{name}")
    linked = sum(os.stat(run.parent / name).st_blocks * 512 for name in names)
    assert bytes_freed([run / "checkpoint-10"]) == size - linked
    for name in names:
        (run.parent / name).unlink()
    two = [run / "checkpoint-10", run / "checkpoint-40"]
    assert bytes_freed(two) == bytes_under(two)  # once, though it has two names


def spoil(run: Path) -> None:
    """A checkpoint set aside, one that has lost its manifest, and what a killed save left."""
    folder = RunFolder(run)
    keeper = Keeper(folder, folder.policy(), Storage())
    for step in (30, 40):
        size = sum(p.stat().st_size for p in (run / f"checkpoint-{step}").iterdir())
        keeper.record("commit", step=step, bytes=size)
    keeper.quarantine("checkpoint-30", "damaged")
    (run / "checkpoint-40/manifest.json").unlink()
    staged = folder.staging / "dead/checkpoint-60"
    staged.mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(b"x" * 100_000)
    (folder.private / "odd-owner-abc").write_bytes(b"x" * 5000)
    (folder.private / ".run.json.0123.new").write_bytes(b"x")


def test_quarantine_and_leftovers_are_counted_and_removable(run: Path) -> None:
    spoil(run)
    listed = told("ls", run)[1]
    assert f"(keepstep prune {run} --quarantine)" in listed
    assert f"keepstep prune {run} --leftovers)" in listed
    before = freed("prune", run, "--quarantine", "--leftovers", "--dry_run")
    assert before.freed >= before.quarantine + before.leftovers - 4096
    assert before.leftovers > 100_000
    assert before.quarantine > 8 * 512
    status, text = told("prune", run, "--quarantine", "--leftovers")
    assert status == 0
    assert "removing damaged checkpoints: .keepstep/quarantine/checkpoint-30-attempt-1" in text
    assert "another name" not in text
    folder = RunFolder(run)
    assert not (run / "checkpoint-40").exists()
    assert not list(folder.private.glob("swept-*"))
    after = freed("prune", run)
    assert (after.quarantine, after.leftovers, after.removed) == (0, 0, {})
    assert steps(run) == [10, 20, 50]
    assert [line["what"] for line in events(folder, "discard")] == ["quarantine", "leftovers"]
    assert "removed what killed attempts left (" in told("log", run)[1]
    assert "damaged checkpoints" not in told("ls", run)[1]


def test_of_a_run_with_damaged_ones_alone_nothing_is_removed(run: Path) -> None:
    told("rm", run, 10, 20, 50, "--force")
    spoil(run)
    assert told("prune", run, "--quarantine")[0] == 2
    assert (run / "checkpoint-40").is_dir()


def killed_at(nth: int, act: Callable[[Storage], object]) -> bool:
    """Do it in a process that SIGKILL ends at its nth operation; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def before(operation: str, path: Path) -> None:
            nonlocal count
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            act(Storage(before))
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_at_any_operation(tmp_path: Path) -> None:
    """What is not named stays valid, what is named is whole or gone; the next commands end it."""
    nth, fired = 0, True
    while fired:
        nth += 1
        run = identify(tmp_path / f"{nth}", limit=9, ranking="metric", metric="eval_loss")
        for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5), (40, 1.6), (50, 1.7)):
            commit(run, step, metrics={"eval_loss": loss})
        spoil(run)

        def act(storage: Storage, run: Path = run) -> None:
            hand = ByHand(RunFolder(run), "keepstep rm", storage)
            hand.remove({10: "by hand"})
            hand.discard_quarantine()
            hand.discard_leftovers()

        fired = killed_at(nth, act)
        folder = RunFolder(run)
        there = folder.checkpoints()
        assert [c.step for c in there] in ([10, 20, 50], [20, 50])
        assert all(folder.faults(c, deep=True) == [] for c in there)
        if 10 in steps(run):
            assert told("rm", run, 10)[0] == 0
        assert told("prune", run, "--quarantine", "--leftovers")[0] == 0
        assert steps(run) == [20, 50]
        assert (left_behind(folder), leftovers_of(folder).names) == ([], ())
        assert not folder.quarantine.is_dir() or not list(folder.quarantine.iterdir())
    assert nth > 20


def test_a_folder_that_is_no_run_is_not_told_to_need_no_pruning(tmp_path: Path) -> None:
    done = runner.invoke(app, ["prune", str(tmp_path)])
    assert done.exit_code == 2
    assert "is empty: no run has begun there" in done.output


def test_a_run_whose_checkpoints_were_removed_has_not_none_yet(tmp_path: Path) -> None:
    writer = RunWriter(RunFolder(tmp_path), Policy(), Storage())
    writer.start()
    commit(tmp_path, 10, run_id=writer.run_id)
    writer.record("commit", step=10)
    assert runner.invoke(app, ["rm", str(tmp_path), "10", "--force"]).exit_code == 0
    told = runner.invoke(app, ["ls", str(tmp_path)]).output
    assert f"{tmp_path}: no checkpoint is left: " in told


def test_quarantine_tells_of_what_it_removes(tmp_path: Path) -> None:
    told = runner.invoke(app, ["prune", "--help"], env={"COLUMNS": "200"}).output
    assert "set aside as damaged, and those that have lost their manifest" in " ".join(told.split())
