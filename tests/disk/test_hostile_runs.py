"""Whatever lies in a run folder costs that one thing: never the relaunch, nor a file outside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.manifest import FileEntry, Manifest
from keepstep.policy.retention import Policy
from keepstep.policy.selection import NewerError, SelectionError
from keepstep.ranks.outcome import ended
from keepstep.run_folder.contents import digest_of
from keepstep.run_folder.notes import notes_on
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter
from keepstep.save.manager import CheckpointManager
from keepstep.save.resume_checks import Resume
from tests.helpers.attempts import Launch
from tests.helpers.folders import events, manifest
from tests.policy.test_manifest import resealed

RESUMABLE = ("trainer_state.json", "scheduler.pt", "rng_state.pth", "optimizer.pt")


def relaunch(run: Path, request: str = "auto") -> int:
    """One attempt as a launch makes it, which commits nothing; the step that it goes on from."""
    manager = CheckpointManager(run, Policy(None))
    manager.start()
    chosen, _ = manager.choose(Resume(request))
    manager.end(ended("failed", reason="that was all"))
    return chosen.step if chosen else 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 10 and 20, made as any other."""
    run = tmp_path_factory.mktemp("made") / "run"
    save(run, 10, 20)
    return run


def save(run: Path, *steps: int) -> None:
    manager = CheckpointManager(run, Policy(None))
    manager.start()
    chosen, _ = manager.choose(Resume())
    for step in steps:
        save_step(manager.writer, step, chosen.step if chosen else None)
    manager.end(ended("preempted", global_step=steps[-1]))


def save_step(writer: RunWriter, step: int, parent: int | None) -> None:
    staged = writer.stage(step)
    files = {}
    for name in RESUMABLE:
        file = writer.storage.write(staged / name, b"{}")
        files[name] = FileEntry(0, file.bytes, file.xxh3_128)
    identity = {"run_id": writer.run_id, "attempt": writer.attempt, "parent": parent}
    writer.commit(manifest(step, files=files, world_size=1, zero_stage=0, **identity))
    writer.point()


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def outside(run: Path) -> Path:
    theirs = run.parent / "theirs"
    if not theirs.exists():
        theirs.mkdir()
        (theirs / "file").write_text("theirs")
        (theirs / "folder").mkdir()
        (theirs / "folder/100").write_text("theirs")
    return theirs


def fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


ODD: dict[str, Callable[[Path, Path], None]] = {
    "not UTF-8": lambda path, theirs: fill(path, b"\xff\xfe\x00"),
    "empty": lambda path, theirs: fill(path, b""),
    "deep": lambda path, theirs: fill(path, b"[" * 200_000),
    "digits": lambda path, theirs: fill(path, b'{"attempt": ' + b"9" * 10_000 + b"}"),
    "large": lambda path, theirs: os.truncate(path, 2**33) if path.is_file() else None,
    "another type": lambda path, theirs: fill(path, b'{"run_id": 7, "policy": {"limit": "1"}}'),
    "a folder": lambda path, theirs: (path / "below").mkdir(parents=True),
    "a pipe": lambda path, theirs: os.mkfifo(path),
    "a link to a file": lambda path, theirs: path.symlink_to(theirs / "file"),
    "a link to a folder": lambda path, theirs: path.symlink_to(theirs / "folder"),
    "a link to nothing": lambda path, theirs: path.symlink_to(theirs / "new"),
}
FILES = (
    *("owner", "owner.lock", "run.json", "events.jsonl", "status.json", "heartbeat", "stop"),
    *("save-now", "pins", "staging", "trash", "quarantine", "publish", "pinned"),
)


def take_the_place(path: Path, odd: str) -> None:
    theirs = outside(path.parents[1])
    if odd != "large":
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    ODD[odd](path, theirs)


def goes_on(run: Path) -> None:
    """It is launched again and again, saves, and nothing outside has changed."""
    theirs = outside(run)
    assert relaunch(run) == 20
    save(run, 30)
    assert relaunch(run) == 30
    assert [c.step for c in RunFolder(run).checkpoints()] == [10, 20, 30]
    assert sorted(p.name for p in theirs.rglob("*")) == ["100", "file", "folder"]
    assert (theirs / "file").read_text() == (theirs / "folder/100").read_text() == "theirs"
    assert RunFolder(run).requests() == ()


@pytest.mark.parametrize("odd", ODD)
def test_files_that_are_not_ours_cost_those_files(run: Path, odd: str) -> None:
    for name in FILES:
        take_the_place(run / ".keepstep" / name, odd)
    goes_on(run)


@pytest.mark.parametrize("odd", ["not UTF-8", "a folder", "a link to a folder"])
@pytest.mark.parametrize("name", ["owner", "run.json", "events.jsonl", "quarantine"])
def test_a_file_that_is_not_ours_costs_that_file(run: Path, name: str, odd: str) -> None:
    take_the_place(run / ".keepstep" / name, odd)
    goes_on(run)


def test_what_is_passed_by_is_told(run: Path) -> None:
    private = run / ".keepstep"
    assert notes_on(RunFolder(run)) == {}
    with open(private / "events.jsonl", "ab") as log:
        log.write(b"torn\n")
    (private / "run.json").write_bytes(b"\xff")
    (private / "pins").symlink_to("/")
    notes = notes_on(RunFolder(run))
    assert "1 of 6 lines is damaged" in notes[".keepstep/events.jsonl"]
    assert "no text" in notes[".keepstep/run.json"]
    assert "nothing is pinned" in notes[".keepstep/pins"]


def test_a_private_folder_that_leads_out_of_the_run_is_refused(run: Path) -> None:
    moved = run.parent / "moved"
    (run / ".keepstep").rename(moved)
    (run / ".keepstep").symlink_to(moved)
    before = sorted(moved.rglob("*"))
    with pytest.raises(SelectionError, match=r"a link\n.*Hint: move it away"):
        relaunch(run)
    assert sorted(moved.rglob("*")) == before


@pytest.mark.parametrize("odd", [name for name in ODD if name != "empty"])
def test_a_manifest_that_is_none_costs_that_checkpoint(run: Path, odd: str) -> None:
    path = run / "checkpoint-20/manifest.json"
    if odd != "large":
        path.unlink()
    ODD[odd](path, outside(run))
    assert relaunch(run) == 10
    assert not (run / "checkpoint-20").exists()  # in quarantine


def hostile(run: Path, change: Callable[[dict], None]) -> None:
    """Change a manifest as somebody does who knows how its digest is made."""
    path = run / "checkpoint-20/manifest.json"
    path.write_text(resealed(Manifest.from_json(path.read_text()), change))


@pytest.mark.parametrize("odd", [name for name in ODD if name.startswith("a ")])
@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_file_of_a_checkpoint_that_is_no_file_is_damage(run: Path, name: str, odd: str) -> None:
    path = run / "checkpoint-20" / name
    (outside(run) / "file").write_bytes(path.read_bytes())  # the same content, but elsewhere
    path.unlink()
    ODD[odd](path, outside(run))
    assert relaunch(run) == 10
    (aside,) = (run / ".keepstep/quarantine").glob("*.txt")
    assert aside.read_text() == f"{name} is no regular file\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latest", "../../x"),
        ("latest", "/etc"),
        ("latest", "global_step9"),
        ("latest", "\xff"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
        ("model.safetensors.index.json", "[" * 100_000),
        ("model.safetensors.index.json", "[]"),
    ],
)
def test_a_file_that_names_others_names_the_manifests(run: Path, name: str, content: str) -> None:
    file = Storage().write(run / "checkpoint-20" / name, content.encode("latin-1"))
    entry = {"rank": 0, "bytes": file.bytes, "xxh3_128": file.xxh3_128}
    hostile(run, lambda values: values["files"].update({name: entry}))
    assert relaunch(run) == 10


def test_what_a_newer_version_wrote_is_neither_set_aside_nor_gone_behind(run: Path) -> None:
    hostile(run, lambda values: values.update(format_version=9))
    for _ in range(2):
        with pytest.raises(NewerError, match=r"checkpoint-20 was written by a newer keepstep"):
            relaunch(run)
    assert (run / "checkpoint-20").is_dir()
    assert not list((run / ".keepstep/quarantine").glob("*"))
    assert relaunch(run, "10") == 10


def test_a_lost_line_makes_no_good_checkpoint_abandoned(run: Path) -> None:
    """Attempt 2's checkpoints have been pruned, and the line about its beginning is damaged."""
    save(run, 30)
    save(run, 40)
    shutil.rmtree(run / "checkpoint-30")
    log = run / ".keepstep/events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        text = [*lines[:number], line.replace("e", "f", 1), *lines[number + 1 :]]
        log.write_text("".join(text))
        records = RunFolder(run).records(None)
        assert [(r.step, r.abandoned) for r in records] == [(10, False), (20, False), (40, False)]


def test_a_path_is_remembered_as_what_it_meant(tmp_path: Path) -> None:
    """The run does not go back to 10 because its folder was moved, or is linked to."""
    run, link, other = tmp_path / "run", tmp_path / "link", tmp_path / "other"
    link.symlink_to("run")
    Launch(run).save(10, 1.0)
    places = [
        (run, run),
        (run, run),
        (link, run),
        (run, link),
        (link, link),
        (run, link / "../run"),
    ]
    for number, (folder, named) in enumerate(places):
        launch = Launch(folder, Policy(None), request=str(named / "checkpoint-10"))
        assert launch.step == 10 + number
        launch.save(11 + number)
    moved = tmp_path / "deep/er/moved"
    moved.parent.mkdir(parents=True)
    run.rename(moved)
    assert Launch(moved, request=str(moved / "checkpoint-10")).step == 16
    assert Launch(moved, request="10").step == 16

    Launch(other, request=str(moved / "checkpoint-10")).save(40, 1.0)
    again = tmp_path / "again"
    moved.rename(again)
    assert Launch(other, request=str(again / "checkpoint-10")).step == 40
    other.rename(moved)
    assert Launch(moved, request=str(again / "checkpoint-10")).step == 40
    for line in events(RunFolder(moved), "resume"):
        assert str(tmp_path) not in json.dumps(line)


def test_another_path_is_another_request(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "run")
    for step in (10, 20, 30):
        launch.save(step, 1.0)
    Launch(tmp_path / "run", request=str(tmp_path / "run/checkpoint-10")).save(15, 1.0)
    assert Launch(tmp_path / "run", request=str(tmp_path / "run/checkpoint-15")).step == 15


def test_all_living_checkpoints_are_gone(tmp_path: Path) -> None:
    launch = Launch(tmp_path)
    for step in (10, 20, 30):
        launch.save(step, 1.0)
    back = Launch(tmp_path, request="20")
    back.save(25, 1.0)
    for step in (10, 20, 25):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with pytest.raises(SelectionError, match="abandoned branch"):
        Launch(tmp_path)
    assert Launch(tmp_path, request="30").step == 30


def test_a_run_knows_itself_without_its_file(tmp_path: Path) -> None:
    """Beside a newer checkpoint of another run, which is never taken for its own."""
    launch = Launch(tmp_path / "run")
    launch.save(10, 1.0)
    name = launch.writer.run_id
    Launch(tmp_path / "other").save(50, 1.0)
    shutil.copytree(tmp_path / "other/checkpoint-50", tmp_path / "run/checkpoint-50")
    identity, log = (tmp_path / "run/.keepstep" / name for name in ("run.json", "events.jsonl"))
    identity.unlink()
    assert Launch(tmp_path / "run").step == 10
    identity.unlink()
    log.write_text(log.read_text().replace('"run_id"', '"was_id"'))  # as older versions write
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        del line["check"]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    again = Launch(tmp_path / "run")
    assert (again.step, again.writer.run_id) == (10, name)


def test_a_folder_of_two_runs_that_nobody_can_tell_apart_is_refused(tmp_path: Path) -> None:
    Launch(tmp_path / "run").save(10, 1.0)
    Launch(tmp_path / "other").save(50, 1.0)
    shutil.copytree(tmp_path / "other/checkpoint-50", tmp_path / "run/checkpoint-50")
    shutil.rmtree(tmp_path / "run/.keepstep")
    with pytest.raises(SelectionError, match=r"are of 2: .*checkpoint-10.*\n.*Hint: move"):
        Launch(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-50")
    assert Launch(tmp_path / "run").step == 10


def test_no_flipped_bit_of_run_json_is_believed(run: Path) -> None:
    folder = RunFolder(run)
    name, policy = folder.run_id(), folder.policy()
    path = run / ".keepstep/run.json"
    written = path.read_bytes().rstrip()
    for bit in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert folder.run_id() == name
        assert folder.policy() in (policy, Policy())


def test_verify_says_what_an_older_version_has_not_written(run: Path) -> None:
    path = run / "checkpoint-20/manifest.json"
    values = json.loads(path.read_text()) | {"format_version": 1}
    del values["digest"]
    path.write_text(json.dumps(values))
    with open(run / ".keepstep/events.jsonl", "ab") as log:
        log.write(b"torn\n")
    result = CliRunner().invoke(app, ["verify", str(run)])
    assert result.exit_code == 0
    assert "checkpoint-20: valid (4 files, 8 B, sizes compared); its manifest has no digest" in (
        result.output
    )
    assert "checkpoint-10: valid (4 files, 8 B, sizes compared)\n" in result.output
    assert ".keepstep/events.jsonl: 1 of 6 lines is damaged" in result.output
    assert relaunch(run) == 20


@pytest.mark.parametrize("name", ["theirs", "additional_chat_templates/../../../x.jinja"])
def test_a_hostile_manifest_leads_no_command_out_of_its_folder(run: Path, name: str) -> None:
    """An absolute name made push and reshard empty that file; `..` made them write elsewhere."""
    theirs, made = outside(run) / "file", run.parent / "made"
    name = str(theirs) if name == "theirs" else name
    entry = {"rank": 0, "bytes": 6, "xxh3_128": digest_of(theirs)}
    hostile(run, lambda values: values["files"].update({name: entry}))
    checkpoint = str(run / "checkpoint-20")
    for words in (
        ["verify", "--deep", str(run)],
        ["export", checkpoint, "--to", str(made / "export")],
        ["reshard", checkpoint, "--to", str(made / "run"), "--num_processes", "1"],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code in (1, 2), result.output
        assert isinstance(result.exception, SystemExit)
    assert theirs.read_text() == "theirs"
    assert not made.exists()
    assert not list(run.parent.rglob("x.jinja"))
