"""A run that slurm/submit.sh has submitted, as its user sees it, and what befalls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from keepstep.run_folder.reader import RunFolder
from tests.helpers.folders import events
from tests.helpers.ranks import ROOT
from tests.helpers.recipes import argv
from tests.helpers.waiting import PATIENCE
from tests.helpers.warm import Warm
from tests.slurm.helpers.cluster import Cluster
from tests.slurm.helpers.processes import run, send, wait_for

HOOKS = Path(__file__).with_name("hooks")
SITE = """
SITE_SBATCH=({cores} --mem=1000 {sbatch})
SITE_SRUN=({srun})
PROCESSES_PER_NODE={processes}
POLL_SECONDS=1
PROBE_SECONDS=10
{more}
site_setup() {{
  export PYTHONPATH={hooks} KEEPSTEP_FAULTS={faults}
  export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 HF_DATASETS_CACHE={cache}
}}
"""
NAME = "a 'run' #1 of 100%j \nwith two lines"  # as folders may be called
RANK = r"^\S*python\S* (-u )?-m keepstep\.train "
LAUNCHER = r"accelerate-launch "


class Job:
    """One run, submitted once or several times.

    Attributes:
        run: its folder.
        number: the job's.
        timeline: (seconds since the last event that the test has brought about, what was seen).
    """

    def __init__(self, cluster: Cluster, warm: Warm, folder: Path, demo: Path) -> None:
        self.cluster, self.warm, self.folder, self.demo = cluster, warm, folder, demo
        self.run = RunFolder(folder / NAME)
        self.number = 0
        self.timeline: list[tuple[float, str]] = []
        self._zero, self._read = time.monotonic(), 0
        self.logs = self.run.private / "logs"
        self._faults = folder / "faults"
        self.faults(step_seconds=0.15)

    def on_own_disks(self) -> None:
        """The run folder is each node's own."""
        self.run = RunFolder(self.cluster.own / NAME)
        self.logs = self.folder / "jobs"

    def faults(self, **values: object) -> None:
        """What is to go wrong, from the next attempt on; see hooks/sitecustomize.py."""
        self._faults.write_text(json.dumps(values))
        Path(f"{self._faults}.fired").unlink(missing_ok=True)

    def holds(self, step: int, rank: int = 1, **values: object) -> None:
        """The next attempt stands still in this step's save, its second one (the first is committed
        by then, and told of), until it hears a signal: what befalls it finds it there."""
        self.faults(
            **{"step_seconds": 0.15} | values, place="save", step=step, rank=rank, seconds=600
        )

    def fired(self, text: str, timeout: float = PATIENCE) -> None:
        """Wait for a fault."""
        file = Path(f"{self._faults}.fired")
        wait_for(f"fault {text}", lambda: file.exists() and text in file.read_text(), timeout, 0.02)
        self.note(f"fault: {text}")

    def site(
        self,
        sbatch: str = "",
        srun: str = "",
        processes: int = 1,
        more: str = "",
        cores: str = "--cpus-per-task=1",
    ) -> Path:
        """Write what is this cluster's own."""
        file = self.folder / "site.env"
        places = {"hooks": HOOKS, "faults": self._faults, "cache": self.folder / "cache"}
        made = {"sbatch": sbatch, "srun": srun, "processes": processes, "more": more}
        made["cores"] = cores
        file.write_text(SITE.format(**places, **made))
        return file

    def submit(self, *flags: str, fields: dict[str, object] | None = None, **site: object) -> None:
        """Run submit.sh with the demo's recipe: 40 steps, a checkpoint every 10."""
        done = self.try_to_submit(*flags, fields=fields, **site)
        told = re.match(r"Job (\d+) trains", done.stdout)
        assert told, done.stderr
        self.number, self._read = int(told.group(1)), 0
        self.happens(f"submitted: {' '.join(flags)}")

    def try_to_submit(
        self, *flags: str, fields: dict[str, object] | None = None, **site: object
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["slurm/submit.sh", str(self._recipe(fields)), *flags],
            cwd=ROOT,
            env=self._environment(**site),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def by_hand(self, *flags: str, fields: dict[str, object] | None = None, **site: object) -> None:
        """sbatch slurm/train.sbatch, with the same recipe."""
        self.logs = self.folder / "logs"
        self.logs.mkdir()
        environment = self._environment(**site)  # a warm command would be no process of the job
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        words = ["--parsable", "--mem=1000", f"--output={self.logs}/%j.log", *flags]
        done = subprocess.run(
            ["sbatch", *words, "slurm/train.sbatch", str(self._recipe(fields))],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.number, self._read = int(done.stdout), 0
        self.happens(f"sbatch {' '.join(flags)} slurm/train.sbatch")

    def _recipe(self, fields: dict[str, object] | None) -> Path:
        steps = {"max_steps": 40, "eval_steps": 10, "save_steps": 10, "peer_timeout_seconds": 8}
        words = argv(self.demo, self.run.path, **(steps | (fields or {})))
        recipe = self.folder / "recipe.yaml"
        pairs = zip(words[::2], words[1::2], strict=True)
        recipe.write_text("".join(f"{name[2:]}: {json.dumps(value)}\n" for name, value in pairs))
        return recipe

    def _environment(self, **site: object) -> dict[str, str]:
        environment = {**self.cluster.env, "KEEPSTEP_SITE": str(self.site(**site))}  # type: ignore[arg-type]
        environment["PATH"] = self.warm.path()
        return environment

    def command(self, *argv: str) -> str:
        """What `keepstep` answers."""
        return run(self.warm.bin / "keepstep", *argv).stdout

    # --- what befalls it

    def happens(self, text: str) -> None:
        """The test does something: times count from here."""
        self._zero = time.monotonic()
        self.timeline.append((0.0, text))

    def note(self, text: str) -> None:
        self.timeline.append((time.monotonic() - self._zero, text))

    def signal(self, node: str, pattern: str, number: int) -> None:
        """To the processes of a node, and at least one of them."""
        found = self.cluster.find(node, pattern)
        assert found, f"{node} has no process {pattern!r}"
        send(found, number)

    def usr1(self) -> None:
        """What Slurm sends ahead of the time limit: to the batch shell alone."""
        self.cluster.slurm("scancel", "--batch", "--signal=USR1", self.number)

    # --- what is seen of it

    @property
    def log(self) -> str:
        file = next(self.logs.rglob(f"{self.number}.log"), None)
        return file.read_text() if file else ""

    def attempt_logs(self) -> list[Path]:
        """Of each attempt of the job, in order."""
        files = self.logs.rglob(f"{self.number}.*.*.log")
        return sorted(files, key=lambda file: [int(part) for part in file.stem.split(".")])

    def says(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait for a line of the log, behind the one that was waited for before."""

        def look() -> re.Match[str] | None:
            return re.compile(pattern).search(self.log, self._read)

        try:
            found = wait_for(f"{pattern!r} in the log", look, timeout)
        except TimeoutError as error:
            raise AssertionError(f"{error}; the log:\n{self.log[-6000:]}") from None
        assert found is not None
        self._read = found.end()
        line = self.log[self.log.rfind("\n", 0, found.start()) + 1 :].split("\n", 1)[0]
        self.note(line[:120])
        return found

    def seconds(self) -> float:
        """Since the test did something."""
        return time.monotonic() - self._zero

    def ends(self, state: str, timeout: float = PATIENCE) -> dict[str, str]:
        """Wait for the end of the job, in that state; what Slurm says of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def ended() -> bool:
            return self.cluster.job(self.number).get("JobState") in over

        try:
            wait_for(f"the end of job {self.number}", ended, timeout, 0.3)
        except TimeoutError as error:
            raise AssertionError(f"{error}; the log:\n{self.log[-6000:]}") from None
        told = self.cluster.job(self.number)
        self.note(f"job {told['JobState']}, exit {told['ExitCode']}, restarts {told['Restarts']}")
        assert told["JobState"] == state, self.log[-6000:]
        return told

    def steps(self) -> list[int]:
        return [c.step for c in self.run.checkpoints()]

    def commits(self) -> list[tuple[int, int]]:
        """(attempt, step) of every commit, in order."""
        return [(e["attempt"], e["step"]) for e in self.events("commit")]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.run, kind)

    def intact(self) -> None:
        """Every checkpoint, byte for byte; nothing torn beside them."""
        for checkpoint in self.run.checkpoints():
            assert self.run.faults(checkpoint, deep=True) == []
        assert not self.run.unreadable()
        assert not self.run.strangers()

    def end(self) -> None:
        """Nothing of it stays."""
        if self.number:
            self.cluster.slurm("scancel", "--signal=KILL", "--full", self.number, check=False)
            self.cluster.slurm("scancel", self.number, check=False)
            for node in self.cluster.nodes:
                send(self.cluster.find(node, f"{RANK}|{LAUNCHER}|train\\.(sh|sbatch)"))

    def tell(self) -> str:
        return "\n".join(f"  T+{seconds:5.1f}  {text}" for seconds, text in self.timeline)
