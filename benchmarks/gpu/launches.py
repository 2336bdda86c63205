"""Starts what is measured, in processes of their own, and sees to it that each comes to an end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = {
    "zero2": "cpu_zero2",
    "zero3": "cpu_zero3",
    "zero3_offload": "cpu_zero3",
    "ddp": "ddp",
}


_MAKING: dict[str, threading.Lock] = defaultdict(threading.Lock)


class LaunchError(Exception):
    """A launch ended otherwise than it should, or not at all."""


@dataclass
class Budget:
    """The seconds that a part may take, all its launches together."""

    seconds: float
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)


def launch_command(strategy: str, cpu: bool, *argv: str, processes: int = 1) -> list[str]:
    """`accelerate launch` under that accelerate config, or its kind for CPU."""
    name = ON_CPU[strategy] if cpu else strategy
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / f"accelerate_configs/{name}.yaml")),
        *("--num_processes", str(processes)),
        *("--num_machines", "1", "--main_process_port", "0"),
        *argv,
    ]


def flags(inputs: Path, output: Path, fields: Mapping[str, object]) -> list[str]:
    """The command line of a run in bf16 on inputs that were made; `fields` win."""
    values: dict[str, object] = {
        "model_name_or_path": inputs / "model",
        "dataset_name": inputs / "rows.jsonl",
        "output_dir": output,
        "dtype": "bfloat16",
        "bf16": True,
        "eval_strategy": "no",
        "keep_ranking": "recency",
        "gradient_checkpointing": False,
        "report_to": "none",
        **fields,
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def environment(cpu: bool) -> dict[str, str]:
    """What all launches have: this checkout's code, no network, and one way to multiply."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *_inherited("PYTHONPATH")])
    fixed = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    fixed["PYTHONHASHSEED"] = "0"  # peft writes a set into adapter_config.json, in any order
    if cpu:
        fixed |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        fixed["TORCH_EXTENSIONS_DIR"] = os.environ.get(
            "TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions"
        )
    return {**os.environ, **fixed}


def run(
    command: Sequence[str],
    log: Path,
    cpu: bool,
    timeout: float,
    *,
    expected: str = "0",
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run to the end; its output.

    Args:
        expected: its exit status: `0`; `any`, for what ends itself.

    Raises:
        LaunchError: another status; or it took too long, and was killed with all its children.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(cpu) | dict(variables or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(max(1.0, timeout))
    except subprocess.TimeoutExpired:
        raise LaunchError(f"no end after {timeout:.0f} s; {_end_of(log)}") from None
    finally:
        kill_all(process)
    if expected == "0" and code != 0:
        raise LaunchError(f"exit status {code}; {_end_of(log)}")
    return log.read_text(errors="replace")


def made(folder: Path, name: str, cpu: bool, timeout: float, *argv: str) -> Path:
    """A model and rows (see inputs.py), made once under that name, also for several threads.

    Raises:
        LaunchError: they cannot be made.
    """
    place = folder / name
    with _MAKING[name]:
        if not place.exists():
            part = folder / f"{name}.part"
            module = ("-m", "benchmarks.gpu.inputs", argv[0], str(part), *argv[1:])
            device = ("--device", "cpu" if cpu else "cuda")
            run([sys.executable, *module, *device], folder / f"{name}.log", cpu, timeout)
            part.rename(place)
    return place


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, by process id."""
    if process.poll() is not None:
        return  # its number may be another's by now
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def _inherited(name: str) -> list[str]:
    return [os.environ[name]] if os.environ.get(name) else []


def _end_of(log: Path) -> str:
    """The last lines that say something, for a cell of the table; the whole log stays."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{' / '.join(lines[-3:])[-300:]} ({log.name})"
