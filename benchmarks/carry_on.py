"""How long training stands still after a failure: from the death of a rank to the first new step.

    python benchmarks/carry_on.py --parameters 30 --rounds 5 [--against CHECKOUT]

trains a random Llama on 2 processes (ZeRO-3 on CPU) by `launch/train.sh` until it has saved. Each
round runs the same command again until its first new step, then kills a rank with SIGKILL and waits
until the command has ended. With `--against`, the command of another checkout is measured in turn,
round by round.

Parts, in seconds of the wall clock:
`notice`: from the SIGKILL to the end of the command; `launch`: from the start of the command to the
start of its first rank; `ranks`: from there to the line of the first new step, of which the run's
event `first_step` tells the parts, where the checkout writes one. `cpu`: processor seconds of the
whole command, until that line. A machine that does something else beside changes seconds of the
wall clock more than those of the processor, and both more than their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu.inputs import SHAPES, make_inputs

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds that any one thing may take
SAVED_AT = 2  # the first step that there is to carry on from


def main() -> None:
    arguments = parse()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    trees = {"here": ROOT} | ({"there": arguments.against} if arguments.against else {})
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in trees}
    try:
        make_inputs(arguments.folder, SHAPES[arguments.parameters])
        commands = {
            name: Command(arguments, tree.resolve(), arguments.folder / name)
            for name, tree in trees.items()
        }
        for command in commands.values():
            command.make_checkpoint()
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                for part, seconds in command.carry_on_and_fail():
                    times[name][part].append(seconds)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    tell(arguments, times)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, choices=SHAPES, default=30, help="millions")
    parser.add_argument("--processes", type=int, default=2, help="of the command")
    parser.add_argument("--rounds", type=int, default=5, help="failures of each checkout")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--folder", type=Path, default=Path("carry_on.tmp"), help="is deleted")
    parser.add_argument("--json", type=Path, help="file that the result is added to")
    return parser.parse_args()


class Command:
    """`launch/train.sh RECIPE` of one checkout, and the run that it carries on."""

    def __init__(self, arguments: argparse.Namespace, tree: Path, run: Path) -> None:
        self.run, inputs = run, arguments.folder.resolve()
        fields = {
            **{"model_name_or_path": inputs / "model", "dataset_name": inputs / "rows.jsonl"},
            **{"output_dir": run, "dtype": "float32", "bf16": False, "max_length": 32},
            **{"per_device_train_batch_size": 1, "gradient_checkpointing": False},
            **{"max_steps": 10_000, "logging_steps": 1, "eval_strategy": "no"},
            **{"save_steps": SAVED_AT, "save_total_limit": 1, "keep_ranking": "recency"},
            **{"max_attempts_without_progress": 10_000, "report_to": "none"},
        }
        run.mkdir(parents=True)
        recipe = run.with_suffix(".yaml")
        recipe.write_text(
            "".join(f"{n}: {json.dumps(v, default=str)}\n" for n, v in fields.items())
        )
        self.line = [str(tree / "launch/train.sh"), str(recipe)]
        self.environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1"}
        self.environment |= {
            "KEEPSTEP_CONFIG": "cpu_zero3",
            "KEEPSTEP_PROCESSES": str(arguments.processes),
        }
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")

    def make_checkpoint(self) -> None:
        launched = Launched(self)
        launched.wait_for(f"saved checkpoint-{SAVED_AT}")
        launched.end()

    def carry_on_and_fail(self) -> Iterator[tuple[str, float]]:
        """The first new step, and a failure after it: (part, seconds)."""
        self._leave_page_cache()
        launched = Launched(self)
        try:
            stepped = launched.wait_for("  loss ")
            cpu = launched.processor_seconds()
            ranks = launched.ranks()
            first = min(rank.create_time() for rank in ranks)
            failed = time.time()
            ranks[-1].kill()
            launched.process.wait(TIMEOUT)
            ended = time.time()
        finally:
            launched.end()
        parts = self._parts()
        yield "notice", ended - failed
        yield "launch", first - launched.began
        yield "ranks", stepped - first
        yield "whole", stepped - launched.began + ended - failed
        yield "cpu", cpu
        yield from parts.items()

    def _leave_page_cache(self) -> None:
        """As after a first failure: earlier rounds have read what this one is to load."""
        for path in self.run.glob("checkpoint-*/**/*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _parts(self) -> dict[str, float]:
        """What the newest attempt has told of its start; nothing in an older checkout."""
        text = (self.run / ".keepstep/events.jsonl").read_text()
        events = [json.loads(line) for line in text.splitlines()]
        told = {e["attempt"]: e["seconds"] for e in events if e["event"] == "first_step"}
        found: dict[str, float] = told.get(max(e.get("attempt", 0) for e in events), {})
        return {f"- {part}": seconds for part, seconds in found.items()}


class Launched:
    """A command under way; its lines are read as they come."""

    def __init__(self, command: Command) -> None:
        self.began = time.time()
        self.process = subprocess.Popen(
            command.line,
            env=command.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        self._output = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put((time.time(), line))

    def wait_for(self, text: str) -> float:
        """When the line with this text came."""
        line, deadline = "", time.time() + TIMEOUT
        while text not in line:
            try:
                moment, line = self._lines.get(timeout=max(0.0, deadline - time.time()))
            except queue.Empty:
                self.end()
                raise SystemExit(f"never said {text!r}:\n{self._output}") from None
            self._output += line
        return moment

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, in the order of their numbers."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            number = process.environ().get("RANK")
            if number is not None:
                found[int(number)] = process
        return [found[number] for number in sorted(found)]

    def processor_seconds(self) -> float:
        """Of all its processes, with those that have ended and been waited for."""
        whole = psutil.Process(self.process.pid)
        times = [p.cpu_times() for p in [whole, *whole.children(recursive=True)]]
        return sum(t.user + t.system + t.children_user + t.children_system for t in times)

    def end(self) -> None:
        """At once, with all its processes: what is left to be seen has been."""
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        for process in sorted(children, key=lambda child: child.pid):
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(children, TIMEOUT)
        self.process.wait(TIMEOUT)


def tell(arguments: argparse.Namespace, times: dict[str, dict[str, list[float]]]) -> None:
    """Print medians and ranges; the same as one JSON line."""
    summary: dict[str, object] = {
        name: getattr(arguments, name) for name in ("parameters", "rounds")
    }
    for name, parts in times.items():
        for part, values in parts.items():
            middle = statistics.median(values)
            summary[f"{name} {part}"] = [round(v, 3) for v in (middle, min(values), max(values))]
            other = times.get("there", {}).get(part)
            ratio = ""
            if name == "here" and other:
                ratio = f"  {middle / statistics.median(other):.2f} x there"
            print(
                f"{name:6} {part:14} {middle:8.2f}  ({min(values):.2f} to {max(values):.2f}){ratio}"
            )
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
