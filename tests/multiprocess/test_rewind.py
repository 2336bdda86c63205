"""A run that goes back from a step that spoils it: its rows are left out, all others stay."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers import unreadable
from tests.helpers.campaigns import cases
from tests.helpers.ranks import PROGRAMS, Ranks
from tests.helpers.recipes import argv

SCRIPT = PROGRAMS / "poisoned.py"
ROWS, PER_STEP, STEPS = 64, 12, 16  # an epoch has 6 steps, the last one of 4 rows
FIELDS = {
    **{"max_steps": STEPS, "save_steps": 2, "save_total_limit": 9, "eval_strategy": "no"},
    **{"keep_ranking": "recency", "logging_steps": 1, "per_device_train_batch_size": 3},
    **{"gradient_accumulation_steps": 2, "on_nonfinite": "rewind"},
}


@dataclass(frozen=True)
class Over:
    """A launch that has ended: exit statuses by rank, and what was said."""

    codes: list[int]
    output: str


class Poisoned:
    """A run with a row that spoils it, launched again and again."""

    def __init__(self, ranks: Ranks, demo: Path, folder: Path, **fields: object) -> None:
        self.ranks, self.watch, self.out = ranks, folder / "watch", folder / "run"
        self.fields = argv(demo, self.out, **FIELDS | fields)

    def launch(
        self, kind: str, step: int, strategy: str = "ddp", processes: int = 2, rank: int = 1
    ) -> Over:
        command = [str(self.watch), kind, str(step), str(rank), *self.fields]
        run = self.ranks.start(command, strategy=strategy, processes=processes, script=SCRIPT)
        return Over(run.wait(), run.output)

    def steps(self) -> dict[int, list[str]]:
        """What each step of the living branch was trained on."""
        steps: dict[int, list[str]] = {}
        attempts = RunFolder(self.out).attempts()
        for attempt in attempts:
            made: dict[int, list[str]] = {}
            for file in self.watch.glob(f"rows-{attempt.number}-*.jsonl"):
                for line in file.read_text().splitlines():
                    entry = json.loads(line)
                    made.setdefault(entry["step"], []).extend(entry["rows"])
            steps = {n: rows for n, rows in steps.items() if n <= attempt.resumed_from} | made
        return steps

    def goes_on(
        self, kind: str, strategy: str, processes: int, before: dict[int, list[str]]
    ) -> list[int]:
        """From step 8, to the end; all rows but those of the first attempt's `before[9]` that are
        left out are dealt once in each epoch. Returns these."""
        (decided,) = self.events("rewind")
        assert (decided["step"], decided["to"]) == (9, 8)
        run = self.launch(kind, 9, strategy, processes)
        assert run.codes == [0] * processes, run.output[-3000:]
        assert "carrying on from checkpoint-8" in run.output
        assert "of the training set: left out from here on" in run.output
        assert len(self.events("rewind")) == 1
        listed = {step: rows for step, rows in self.skipped().items() if rows}
        assert listed == dict.fromkeys((10, 12, 14, 16), decided["rows"])
        after = self.steps()
        gone = Counter(before[9]) - Counter(after[9])
        assert sum(gone.values()) == len(decided["rows"])
        first, second, third = epochs(after)
        assert sum(first.values()) == ROWS
        assert (first - second, second - first) == (gone, Counter())
        assert not third.keys() & gone.keys()
        assert sum(third.values()) > 0
        if not after[9]:  # a step without rows
            state = RunFolder(self.out).checkpoints()[-1].path / "trainer_state.json"
            history = json.loads(state.read_text())["log_history"]
            (logged,) = (entry for entry in history if entry["step"] == 9)
            assert (logged["loss"], logged.get("grad_norm") or 0) == (0, 0)
        return list(decided["rows"])

    def events(self, name: str) -> list[dict]:
        lines = (self.out / ".keepstep/events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def skipped(self) -> dict[int, list[int]]:
        """Checkpoint → the rows that its manifest lists as left out."""
        checkpoints = RunFolder(self.out).checkpoints()
        return {c.step: list(c.manifest.dealt.get("skipped", ())) for c in checkpoints}


def epochs(steps: dict[int, list[str]]) -> list[Counter[str]]:
    """How often each row was dealt, epoch by epoch."""
    assert sorted(steps) == list(range(1, STEPS + 1))
    counts = []
    for first in range(1, STEPS + 1, 6):
        rows = [row for step in range(first, first + 6) for row in steps.get(step, [])]
        counts.append(Counter(rows))
    return counts


CASES = [
    *[("cpu_zero3", "spike", 12, 2), ("ddp", "spike", 12, 2), ("cpu_zero3", "loss", 3, 2)],
    *[("cpu_zero0", "norm", 12, 2), ("ddp", "norm", 12, 1), ("cpu_zero2", "norm", 12, 3)],
    *[("ddp", "loss", 3, 3), ("cpu_zero3", "loss", 3, 1), ("cpu_zero3", "norm", 12, 4)],
]


@pytest.mark.parametrize(("strategy", "kind", "left_out", "then"), cases(CASES, long=CASES[1:]))
def test_goes_back(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str, kind: str, left_out: int, then: int
) -> None:
    """From the second epoch's step 9, which then has fewer rows, or none; on `then` processes."""
    fields = (
        {"on_spike": "rewind", "spike_sigma": 100, "spike_window": 5} if kind == "spike" else {}
    )
    poisoned = Poisoned(ranks, demo, tmp_path, **fields)
    run = poisoned.launch(kind, 9, strategy)
    assert run.codes == [75, 75], run.output[-3000:]
    assert "Traceback" not in run.output
    assert "Run the same command again to go on." in run.output
    assert [c.step for c in RunFolder(poisoned.out).checkpoints()] == [2, 4, 6, 8]
    before = poisoned.steps()
    assert len(poisoned.goes_on(kind, strategy, then, before)) == left_out


def test_killed_in_the_moment_of_going_back(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    poisoned = Poisoned(ranks, demo, tmp_path)
    run = poisoned.launch("killed", 9)
    assert -9 in run.codes
    assert not poisoned.events("end")
    assert len(poisoned.goes_on("loss", "ddp", 2, poisoned.steps())) == 3


def test_a_run_goes_back_so_often_and_no_more(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """To its beginning, where nothing was saved."""
    poisoned = Poisoned(ranks, demo, tmp_path, max_rewinds=2)
    for step in (1, 5):
        (poisoned.watch / "poison").unlink(missing_ok=True)
        assert poisoned.launch("loss", step).codes == [75, 75]
    assert [e["to"] for e in poisoned.events("rewind")] == [0, 4]
    (poisoned.watch / "poison").unlink()
    run = poisoned.launch("loss", 9)
    assert run.codes == [2, 2]
    status = json.loads((poisoned.out / ".keepstep/status.json").read_text())
    assert status["outcome"] == "failed"
    for told in ("max_rewinds: 2", "from step 1 to the beginning", "from step 5 to checkpoint-4"):
        assert told in status["reason"]
    assert [len(rows) for rows in poisoned.skipped().values()] == [3, 3, 6, 6]
    assert poisoned.events("nonfinite")[-1]["action"] == "stop"


@pytest.mark.long
def test_a_run_that_is_to_stop_is_not_launched_again_by_itself(
    ranks: Ranks, demo: Path, tmp_path: Path
) -> None:
    """It goes back when somebody launches it again."""
    poisoned = Poisoned(ranks, demo, tmp_path)
    run = poisoned.launch("asked", 9)
    assert run.codes == [75, 75], run.output[-3000:]
    status = json.loads((poisoned.out / ".keepstep/status.json").read_text())
    assert status["outcome"] == "preempted"
    assert status["reason"].startswith("SIGTERM to rank 1; the loss of rank 1 is not finite")
    assert "Run the same command again to go on." in run.output
    assert len(poisoned.goes_on("loss", "ddp", 2, poisoned.steps())) == 3


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "cpu_zero3"])
def test_a_run_that_carries_on_knows_what_a_spike_is(
    ranks: Ranks, demo: Path, tmp_path: Path, strategy: str
) -> None:
    """At once, on another number of processes; and nothing of it is saved, whatever is due."""
    spikes = {"on_spike": "rewind", "spike_sigma": 100, "spike_window": 5, "save_steps": 1}
    poisoned = Poisoned(ranks, demo, tmp_path, **spikes | {"max_steps": 8})
    assert poisoned.launch("spike", 9, strategy).codes == [0, 0]
    poisoned.fields += ["--max_steps", "16"]
    assert poisoned.launch("spike", 9, strategy, processes=1, rank=0).codes == [75]
    assert [c.step for c in RunFolder(poisoned.out).checkpoints()][-1] == 8
    assert poisoned.launch("spike", 9, strategy).codes == [0, 0]
    assert len(poisoned.skipped()[9]) == PER_STEP
    window = RunFolder(poisoned.out).checkpoints()[-1].manifest.health["window"]
    assert len(window) == 5
    assert max(loss for loss, _ in window) < 10


def test_what_cannot_be_written_down_is_not_done(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """The next attempt would not know of it, and go back once more, for ever."""
    poisoned = Poisoned(ranks, demo, tmp_path)
    run = poisoned.launch("full", 9)
    assert run.codes == [2, 2], run.output[-3000:]
    status = json.loads((poisoned.out / ".keepstep/status.json").read_text())
    assert (
        "It does not go back (on_nonfinite: rewind): that could not be written down"
        in (status["reason"])
    )
    assert poisoned.events("rewind") == []


@pytest.mark.long
def test_whatever_happens_then_the_rows_stay_out(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    """The next attempt is killed before it has saved; the newest checkpoint is lost; the run is
    told to start again; a row is mended."""
    poisoned = Poisoned(ranks, demo, tmp_path)
    assert poisoned.launch("loss", 9).codes == [75, 75]
    (decided,) = poisoned.events("rewind")
    again = [str(poisoned.watch), "loss", "9", "1", *poisoned.fields]
    run = ranks.start(again, strategy="ddp", script=SCRIPT)
    run.wait_for("carrying on from checkpoint-8")
    run.kill(signal.SIGKILL)
    run.wait()
    shutil.rmtree(poisoned.out / "checkpoint-8")
    assert poisoned.launch("loss", 9, processes=1).codes == [0]
    assert poisoned.skipped()[16] == decided["rows"]
    assert poisoned.skipped()[4] == []
    poisoned.fields += ["--resume_from_checkpoint", "never"]
    assert poisoned.launch("loss", 9).codes == [0, 0]
    assert set(map(tuple, poisoned.skipped().values())) == {tuple(decided["rows"])}
    assert len(poisoned.events("rewind")) == 1


@pytest.mark.long
def test_a_row_that_is_mended_is_dealt_again(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    made = unreadable.make(demo, tmp_path)
    fields = FIELDS | {"save_steps": 1} | made
    command = argv(demo, tmp_path / "run", **fields)
    run = ranks.start(command, strategy="cpu_zero2")
    assert run.wait() == [75, 75]
    data = Path(str(made["dataset_name"]))
    data.write_text(data.read_text().replace(unreadable.SIGN, ""))
    run = ranks.run([*command, "--allow_drift", "dataset"], strategy="cpu_zero2")
    assert "rows that an earlier attempt has left out are dealt again" in run.output
    assert "skipped" not in RunFolder(tmp_path / "run").checkpoints()[-1].manifest.dealt


@pytest.mark.long
def test_processes_that_share_sequences(ranks: Ranks, demo: Path, tmp_path: Path) -> None:
    made, run = unreadable.make(demo, tmp_path), tmp_path / "run"
    command = argv(demo, run, on_nonfinite="rewind", gradient_accumulation_steps=2, **made)
    first = ranks.start(command, strategy="cpu_zero3-sp2")
    assert first.wait() == [75, 75], first.output[-3000:]
    ranks.run(command, strategy="cpu_zero3-sp2", processes=4)
    rows = RunFolder(run).checkpoints()[-1].manifest.dealt["skipped"]
    assert unreadable.ROW in rows
    assert len(rows) == 4
