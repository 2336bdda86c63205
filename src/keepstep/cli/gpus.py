"""Which GPUs of this machine still answer, for `launch/train.sh --retries N`."""

from __future__ import annotations

import re
import subprocess

SECONDS = 20  # a GPU that has fallen off the bus may not answer at all


def ask(*arguments: str) -> str:
    """What nvidia-smi says; nothing, if it fails or does not answer in time, or is not there."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def answers(gpu: str) -> bool:
    """Whether a GPU does. (nvidia-smi names a part of one only in its list.)"""
    return gpu.startswith("MIG") or bool(ask("--query-gpu=uuid", "--format=csv", "-i", gpu))


def gpus_in_use(environment: dict[str, str]) -> list[str]:
    """The GPUs that a launch here takes, as CUDA_VISIBLE_DEVICES may name them.

    None: on CPU; one of them is not nvidia-smi's to know; or several machines share the run, which
    would have to agree on the number of processes.
    """
    machines = re.search(r"--num_machines[ =](\d+)", environment.get("KEEPSTEP_LAUNCH_ARGS", ""))
    if machines and machines.group(1) != "1":
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        named = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        gpus = [name for name in named if re.match("[0-9]|GPU|MIG", name)]
        # CUDA may know a name that nvidia-smi does not.
        return gpus if all(map(answers, gpus)) else []
    return re.findall(r"^GPU .*\(UUID: (GPU-[0-9a-f-]+)\)", ask("--list-gpus"), re.MULTILINE)


def narrowed(gpus: list[str], environment: dict[str, str]) -> tuple[list[str], str]:
    """Leave those to the next launch that answer.

    Args:
        gpus: those of the launch before.
        environment: of the next launch, which is changed.

    Returns:
        Those that answer; and what to tell people: nothing, if all do.
    """
    there = [gpu for gpu in gpus if answers(gpu)]
    gone = [gpu for gpu in gpus if gpu not in there]
    if not gone:
        return gpus, ""
    if not there:
        return [], f"no GPU answers (nvidia-smi, {SECONDS} s): not launched again"
    count = "the GPU that does" if len(there) == 1 else f"the {len(there)} GPUs that do"
    told = f"{', '.join(gone)} does not answer (nvidia-smi, {SECONDS} s): on {count}"
    return fewer(gpus, there, environment), told


def fewer(gpus: list[str], there: list[str], environment: dict[str, str]) -> list[str]:
    """Leave `there` of `gpus` to the next launch, with a process each where each had one."""
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(there)
    if environment.get("KEEPSTEP_PROCESSES") == str(len(gpus)):
        environment["KEEPSTEP_PROCESSES"] = str(len(there))
    return there
