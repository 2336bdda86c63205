"""Commit, prune, quarantine and branches on a real disk; retention against a statement of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from keepstep.policy.retention import Policy
from keepstep.policy.selection import SelectionError
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from tests.helpers.attempts import Launch
from tests.helpers.folders import left_behind


def test_links_follow_the_newest_and_the_best(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    for step, loss in ((10, 2.0), (20, 1.0), (30, 1.5), (40, 1.7), (50, 1.2)):
        launch.save(step, loss)
    assert launch.steps() == [20, 30, 50]
    assert os.readlink(tmp_path / "latest") == "checkpoint-50"
    assert os.readlink(tmp_path / "best") == "checkpoint-20"
    assert left_behind(launch.folder) == []


def test_a_moved_run_knows_its_best_and_holds_no_path(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "a")
    launch.save(10, 1.0)
    launch.save(20, 2.0)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Launch(tmp_path / "b")
    assert (moved.step, moved.writer.best().step) == (20, 10)
    for path in (tmp_path / "b").rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes()


def test_a_mirrors_address_is_one_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keepstep sync` takes it from the log. (Other paths lose where they lie here.)"""
    monkeypatch.chdir(tmp_path)
    launch = Launch(tmp_path / "run")
    url = f"file://{tmp_path}/mirror/run"
    launch.writer.record("mirror", url=url, step=4, error=f"{url}: {tmp_path}/mirror is full")
    assert launch.folder.mirror() == url
    assert f"{url}: mirror is full" in (launch.folder.path / ".keepstep/events.jsonl").read_text()


def test_what_is_not_this_runs_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-mine").mkdir(parents=True)
    (tmp_path / "checkpoint-40").mkdir()
    (tmp_path / "checkpoint-5").symlink_to("checkpoint-mine")
    launch = Launch(tmp_path, Policy(1), request="never")
    for step in (10, 20, 30):
        launch.save(step)
    assert launch.steps() == [30]
    with pytest.raises(FileExistsError, match=r"in the way, and not this run's: .*checkpoint-40"):
        launch.save(40)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"checkpoint-mine", "checkpoint-40", "checkpoint-5", "checkpoint-30"} <= names


def test_auto_does_not_start_over_beside_a_strangers_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-40").mkdir(parents=True)
    with pytest.raises(SelectionError, match=r"checkpoint-40: it has no manifest\.json"):
        Launch(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "swap", "manifest"])
def test_damage_is_found_named_and_set_aside(tmp_path: Path, damage: str) -> None:
    launch = Launch(tmp_path)
    for step in (10, 20, 30):
        launch.save(step, 1.0)
    victim = tmp_path / "checkpoint-30/rank1.pt"
    content = victim.read_bytes()
    if damage == "truncate":
        victim.write_bytes(content[:2])
    elif damage == "flip":
        victim.write_bytes(bytes(byte ^ 255 for byte in content))
    elif damage == "delete":
        victim.unlink()
    elif damage == "swap":  # the same size, the same name, another step's bytes
        victim.write_bytes((tmp_path / "checkpoint-20/rank1.pt").read_bytes())
    else:
        (tmp_path / "checkpoint-30/manifest.json").write_text('{"format_version": 1')
    again = Launch(tmp_path)
    assert again.step == 20
    (aside,) = again.folder.quarantine.glob("*.txt")
    assert aside.name == "checkpoint-30-attempt-2.txt"
    assert ("rank1.pt" if damage != "manifest" else "not a manifest") in aside.read_text()
    assert aside.with_suffix("").is_dir()
    assert again.steps() == [10, 20]
    assert os.readlink(tmp_path / "latest") == "checkpoint-20"
    again.save(30, 1.0)
    assert again.steps() == [10, 20, 30]


def test_a_rewind_starts_a_branch_and_is_done_once(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    for step, loss in ((10, 2.0), (20, 1.0), (30, 0.5)):
        launch.save(step, loss)
    back = Launch(tmp_path, request="20")
    assert back.step == 20
    back.save(25, 0.9)
    records = {r.step: r.abandoned for r in back.folder.records("eval_loss")}
    assert records == {10: False, 20: False, 25: False, 30: True}
    assert back.writer.best().step == 25
    assert os.readlink(tmp_path / "latest") == "checkpoint-25"
    same_command = Launch(tmp_path, request="20")
    assert same_command.step == 25
    same_command.save(30, 0.8)  # takes the place of the abandoned one
    assert same_command.folder.checkpoint(30).manifest.attempt == 3
    same_command.end("finished", 30)
    assert Launch(tmp_path, request="20").step == 20


def test_a_path_to_another_runs_checkpoint(tmp_path: Path) -> None:
    Launch(tmp_path / "a").save(10, 1.0)
    other = Launch(tmp_path / "b", request=str(tmp_path / "a/checkpoint-10"))
    assert other.step == 10
    other.save(20, 1.0)
    assert "../a/checkpoint-10" in (tmp_path / "b/.keepstep/events.jsonl").read_text()
    assert Launch(tmp_path / "b", request=str(tmp_path / "a/checkpoint-10")).step == 20
    assert Launch(tmp_path / "b", request=str(tmp_path / "b/checkpoint-20")).step == 20
    with pytest.raises(SelectionError, match="holds no readable manifest"):
        Launch(tmp_path / "c", request=str(tmp_path / "a"))


def test_a_path_to_what_another_trainer_wrote(tmp_path: Path) -> None:
    """It is no damage: the command that takes it in is named."""
    stock = tmp_path / "outputs/checkpoint-500"
    stock.mkdir(parents=True)
    (stock / "trainer_state.json").write_text("{}")
    with pytest.raises(SelectionError, match=rf"keepstep adopt {stock} --into NEW_RUN"):
        Launch(tmp_path / "run", Policy(), str(stock))
    (stock / "manifest.json").write_text("{}")
    with pytest.raises(SelectionError, match="manifest") as damaged:
        Launch(tmp_path / "run", Policy(), str(stock))
    assert "adopt" not in str(damaged.value)


def test_crash_loop(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.save(10, 1.0)
    launch.save(20, 1.0)
    assert [Launch(tmp_path).step for _ in range(6)] == [20, 20, 20, 10, 10, 10]
    with pytest.raises(SelectionError, match="nothing is left to resume from"):
        Launch(tmp_path)


def test_asking_by_name_tries_once_more(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.save(10, 1.0)
    for _ in range(3):
        Launch(tmp_path)
    with pytest.raises(SelectionError, match="nothing is left"):
        Launch(tmp_path)
    assert Launch(tmp_path, request="latest").step == 10
    assert Launch(tmp_path, request="never").step == 0


def test_a_start_prunes_only_what_a_verified_newest_displaces(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    for step, loss in ((10, 1.0), (20, 2.0), (30, 3.0)):
        launch.save(step, loss)
    assert Launch(tmp_path, Policy(1), request="10").steps() == [10, 20, 30]
    (tmp_path / "checkpoint-30/rank0.pt").unlink()
    assert Launch(tmp_path, Policy(1), request="20").steps() == [10, 20, 30]
    assert Launch(tmp_path, Policy(1)).steps() == [20]  # 30 is in quarantine, 20 is valid


def test_weights_only_is_done_once(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.save(30, 1.0)
    warm = Launch(tmp_path, weights_only=True)
    assert (warm.step, warm.choice.step) == (0, 30)
    warm.save(10, 2.0)
    again = Launch(tmp_path, weights_only=True)
    assert (again.step, again.choice.weights_only) == (10, False)
    assert {r.step: r.abandoned for r in again.folder.records(None)} == {10: False, 30: True}


def test_an_abandoned_best_does_not_come_back(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    for step, loss in ((10, 2.0), (20, 1.9), (30, 0.5)):
        launch.save(step, loss)
    back = Launch(tmp_path, request="10")
    for step, loss in ((15, 1.8), (25, 1.7), (35, 1.6), (45, 1.5), (55, 1.4)):
        back.save(step, loss)
    last = Launch(tmp_path, request="10")
    last.save(65, 1.3)
    assert last.steps() == [20, 30, 45, 55, 65]
    assert os.readlink(tmp_path / "best") == "checkpoint-65"


def test_what_is_written_down_holds_no_path(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.writer.record("save_failed", reason=f"OSError: no space: '{tmp_path}/checkpoint-3/x'")
    launch.writer.end({"outcome": "failed", "reason": f"{Path.cwd()}/data is gone"})
    for path in (launch.folder.events, launch.folder.status):
        assert str(tmp_path) not in path.read_text()
        assert str(Path.cwd()) not in path.read_text()


def test_the_command_that_prunes_is_no_attempt(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    launch.save(10, 1.0)
    launch.save(20, 1.0)
    launch.end("finished", 20)
    command = RunWriter(launch.folder, Policy(1), Storage())
    assert command.prune() == [10]
    assert [a.outcome for a in launch.folder.attempts()] == ["finished"]


def test_pins_and_every_n_steps_and_budget(tmp_path: Path) -> None:
    policy = Policy(1, "recency", every_n_steps=30)
    launch = Launch(tmp_path, policy)
    launch.save(10)
    launch.writer.pin(10)
    for step in (20, 30, 40, 50):
        launch.save(step)
    assert launch.steps() == [10, 30, 50]
    reasons = {d.step: d.reason for d in launch.folder.retention()}
    assert reasons == {10: "pinned", 30: "every 30 steps", 50: "newest"}
    launch.writer.unpin(10)
    launch.save(60)
    assert launch.steps() == [30, 60]
    size = launch.folder.checkpoint(60).manifest.total_bytes
    tight = Launch(tmp_path, Policy(None, total_bytes=2 * size))
    tight.save(70)
    tight.save(80)
    assert tight.steps() == [70, 80]


def test_events_tell_the_story(tmp_path: Path) -> None:
    Launch(tmp_path).save(10, 1.0)
    lines = [json.loads(line) for line in (tmp_path / ".keepstep/events.jsonl").open()]
    assert [line["event"] for line in lines] == ["attempt", "resume", "training", "commit"]
    assert {"time", "attempt", "step", "bytes", "commit", "metrics"} <= set(lines[-1])


def test_a_full_disk_spares_what_a_branch_grew_from(tmp_path: Path) -> None:
    """Also when a person prunes meanwhile, when no line could be written about the resume, and
    when the attempt has died before it had saved."""
    policy = Policy(2, "recency")
    launch = Launch(tmp_path, Policy(None))
    for step in (100, 200, 300, 400):
        launch.save(step)
    back = Launch(tmp_path, policy, request="100")
    assert back.writer.make_room(150) == [200]
    assert back.steps() == [100, 300, 400]
    RunWriter(RunFolder(tmp_path), Policy(1), Storage()).prune(keep_abandoned=False)
    assert back.steps() == [100, 400]
    assert [d.reason for d in back.folder.retention()] == ["recent, resumed", "newest"]
    lines = back.folder.events.read_text().splitlines(keepends=True)
    back.folder.events.write_text("".join(line for line in lines if '"resume"' not in line))
    back.writer.policy = Policy(1)
    assert back.writer.make_room(150) == []
    back.folder.events.write_text("".join(lines))
    again = Launch(tmp_path, Policy(1), request="100")
    assert again.steps() == [100, 400]
    again.save(150)
    assert again.steps() == [150, 400]
    assert again.writer.make_room(160) == [400]
    assert again.steps() == [150]
