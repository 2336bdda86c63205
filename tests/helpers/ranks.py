"""The one way tests run several processes: real ranks on gloo, with a port and a watchdog each."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepstep.cli.network import free_port
from tests.helpers.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests/rank_programs"  # what ranks of a test run in place of keepstep.train


def forget_shared_memory(port: int) -> None:
    """DeepSpeed on CPU leaves 64 MB a rank behind when its processes are killed, named by port."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def strategy_file(strategy: str, folder: Path) -> Path:
    """The accelerate config of that name, or at that path. `-offload` at the end: the optimizer
    on the host; `-ungathered`: DeepSpeed is not asked to gather weights for a save; `-sp2`: two
    processes share out each row's tokens;
    `cpu_zero0`: DeepSpeed, and nothing is shared out."""
    if strategy.endswith(".yaml"):
        return Path(strategy)
    if strategy == "cpu_zero0":
        path = folder / "cpu_zero0.yaml"
        text = (ROOT / "accelerate_configs/cpu_zero2.yaml").read_text()
        path.write_text(text.replace("zero_stage: 2", "zero_stage: 0"))
        return path
    plain = strategy.removesuffix("-offload").removesuffix("-ungathered").removesuffix("-sp2")
    path = ROOT / f"accelerate_configs/{plain}.yaml"
    if plain != strategy:
        text = path.read_text()
        if strategy.endswith("-sp2"):
            text += "parallelism_config:\n  parallelism_config_sp_size: 2\n"
        elif strategy.endswith("-offload"):
            text = text.replace("config:\n", "config:\n  offload_optimizer_device: cpu\n")
        else:
            text = text.replace("zero3_save_16bit_model: true", "zero3_save_16bit_model: false")
        path = folder / f"{strategy}.yaml"
        path.write_text(text)
    return path


class Run:
    """The processes of one launch."""

    def __init__(self, ranks: Ranks, pids: list[int], log: Path, port: int) -> None:
        self.pids = pids
        self.port = port
        self.log = log
        self._ranks = ranks
        self._codes: dict[int, int] = {}

    @property
    def output(self) -> str:
        """What they have said (and a mark for a character that is half written just now)."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def poll(self) -> list[int | None]:
        """Each rank's exit status, None while it runs, negative for a signal."""
        waiting = [pid for pid in self.pids if pid not in self._codes]
        if waiting:
            answer = self._ranks.ask({"do": "poll", "pids": waiting})
            self._codes |= {int(p): code for p, code in answer.items() if code is not None}
        return [self._codes.get(pid) for pid in self.pids]

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Every rank's exit status. A hang is ended, with stack traces in the log, and fails."""
        deadline = time.monotonic() + timeout
        while None in (codes := self.poll()):
            if time.monotonic() > deadline:
                self.kill(signal.SIGABRT)  # faulthandler writes where each rank stands
                time.sleep(1)
                self.kill(signal.SIGKILL)
                raise AssertionError(f"no end after {timeout} s; the log:\n{self.output[-6000:]}")
            time.sleep(0.02)
        return [code for code in codes if code is not None]

    def wait_without(self, rank: int) -> list[int]:
        """Exit statuses; this rank is frozen, and killed when the others have ended."""
        deadline = time.monotonic() + PATIENCE
        while any(code is None for other, code in enumerate(self.poll()) if other != rank):
            assert time.monotonic() < deadline, f"no end; the log:\n{self.output[-6000:]}"
            time.sleep(0.05)
        self.kill(signal.SIGKILL, ranks=[rank])
        return self.wait()

    def wait_for(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Wait until the log holds `pattern`."""
        deadline = time.monotonic() + timeout
        while True:
            over = None not in self.poll() or time.monotonic() > deadline
            if (found := re.search(pattern, self.output)) is not None:
                return found
            if over:  # asked before the log was read: what an ending rank says last counts
                self.kill(signal.SIGKILL)
                raise AssertionError(f"never said {pattern!r}; the log:\n{self.output[-6000:]}")
            time.sleep(0.01)

    def kill(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to these ranks (all), by process id."""
        for rank, code in enumerate(self.poll()):
            if code is None and (ranks is None or rank in ranks):
                os.kill(self.pids[rank], number)


class Ranks:
    """Starts runs in forks of one warm process (zygote.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: list[Run] = []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.zygote"],
            cwd=ROOT,
            env={**environment, "HF_DATASETS_CACHE": str(folder / "datasets")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        argv: Sequence[str] = (),
        *,
        strategy: str = "cpu_zero3",
        processes: int = 2,
        script: Path | None = None,
        env: dict[str, str] | None = None,
        nodes: int = 1,
        disks: Path | None = None,
    ) -> Run:
        """Start the main job (or `script`) on `processes` ranks under an accelerate config.

        `nodes`: how many machines they are on, as far as the launcher tells. `disks`: on each of
        them `disks/here` is `disks/NUMBER`, whatever the others see.
        """
        log = self.folder / f"run-{len(self._runs)}.log"
        log.unlink(missing_ok=True)
        port = free_port()
        request = {
            "do": "start",
            "strategy": str(strategy_file(strategy, self.folder)),
            "processes": processes,
            "port": port,
            "log": str(log),
            "argv": list(argv),
            "script": str(script) if script else None,
            "env": env or {},
            "nodes": nodes,
            "disks": str(disks) if disks else None,
        }
        run = Run(self, self.ask(request), log, port)
        self._runs.append(run)
        return run

    def run(self, argv: Sequence[str] = (), *, timeout: float = PATIENCE, **kwargs: Any) -> Run:
        """Start, and wait for an end without error."""
        run = self.start(argv, **kwargs)
        codes = run.wait(timeout)
        assert set(codes) == {0}, f"exit statuses {codes}; the log:\n{run.output[-6000:]}"
        return run

    def killed(self, argv: Sequence[str], step: int, phase: str = "forward", **kwargs: Any) -> Run:
        """Train `step` steps, and SIGKILL all ranks in the midst of the next one: there they wait
        for it. (In a race with a run that goes on, a busy machine's test comes too late.)

        What was saved before is committed; but for the newest, which may be on its way then.
        """
        words = [f"{phase}@{step}", "0", "SIGSTOP", *argv]
        run = self.start(words, script=PROGRAMS / "stopped.py", **kwargs)
        run.wait_for(f"SIGSTOP in {phase} to rank 0")
        run.kill(signal.SIGKILL)
        codes = run.wait()
        assert set(codes) == {-signal.SIGKILL}, f"exit statuses {codes}; the log:\n{run.output}"
        return run

    def close(self) -> None:
        for run in self._runs:
            run.kill(signal.SIGKILL)
            run.wait()
            forget_shared_memory(run.port)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
