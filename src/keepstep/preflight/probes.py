"""What only a look at the machines tells: disk, memory, a run folder that all nodes see."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from keepstep.output.units import counted, human_bytes
from keepstep.policy.mirror import VARIABLE
from keepstep.policy.mounts import HERE
from keepstep.preflight.estimate import (
    Shapes,
    Strategy,
    alternatives,
    checkpoint_bytes,
    device_bytes,
    host_bytes,
)
from keepstep.preflight.mounts import PROGRAMS, bucket_mount
from keepstep.preflight.shapes import shapes_of, step_of, strategy_of
from keepstep.preflight.validate import nearest
from keepstep.ranks import collectives
from keepstep.ranks.nodes import look
from keepstep.recipe.config import KeepstepConfig, Problem, Recipe
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.save.snapshot_memory import free_host_memory

SEE_SECONDS = 15.0  # until a node sees a new file: network filesystems look again after a while
SAMPLE_BYTES = 256 << 20
SPARE = 8


def probe(recipe: Recipe) -> list[Problem]:
    """Every problem of these machines with this recipe. Ranks: all (collective)."""
    apart = one_mirror(recipe.training)
    if apart:  # each machine would wait for others in other places
        return apart
    folder = Path(str(recipe.training.output_dir))
    problems = see_apart(folder) if recipe.training.node_local else see_together(folder)
    sizes = collectives.on_main("estimating", lambda: list(check_sizes(recipe)))
    return problems + sizes


def one_mirror(training: KeepstepConfig) -> list[Problem]:
    """Whether all machines mirror the run to one place, and say alike whose disk it lies on: a
    variable may be set on one of them alone. Ranks: all (collective).
    """
    place = f"{training.mirror_url or 'not set'}, node_local {training.node_local}"
    told = collectives.gather((socket.gethostname(), place))
    (first, main), *_ = told
    others = [(rank, *one) for rank, one in enumerate(told) if one[1] != main]
    if not others:
        return []
    rank, host, other = others[0]
    return [
        Problem(
            f"mirror: it differs between machines: {main} on {first} (rank 0), {other} on {host} "
            f"(rank {rank})",
            f"one mirror in the recipe, or one {VARIABLE} in the environment of all machines, and "
            "an output_dir of one name",
            "mirror",
        )
    ]


def see_together(folder: Path, patience: float = SEE_SECONDS) -> list[Problem]:
    """Whether the main process can write there, and every node sees it. Ranks: all (collective)."""
    place = nearest(folder) / f".keepstep-probe-{secrets.token_hex(4)}"
    path, found = collectives.on_main("probing output_dir", lambda: _look(folder, place))
    try:
        if any(problem.severity == "error" for problem in found):
            return found
        deadline = time.monotonic() + patience
        # An error here (EACCES, ESTALE) is one rank's alone: to it, too, the path is not there.
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.2)
        seen = collectives.gather((socket.gethostname(), os.path.exists(path)))
    finally:
        if collectives.is_main():
            shutil.rmtree(path.parent, ignore_errors=True)
    blind = sorted({host for host, sees in seen if not sees})
    if not blind:
        return found
    return [
        *found,
        Problem(
            f"output_dir: {folder} is not shared: what the main process writes on {seen[0][0]} is "
            f"not seen on {', '.join(blind)}",
            "name a folder on a filesystem that all nodes share; or node_local: true, and a mirror",
            "not-shared",
        ),
    ]


def _look(folder: Path, place: Path) -> tuple[Path, list[Problem]]:
    """Main process: what `_write` finds, and whether it is a bucket's mount."""
    path, problem = _write(place)
    found = [] if problem is None else [problem]
    try:
        mounts = Path(HERE).read_text(errors="surrogateescape")
    except OSError:  # not Linux, or hidden: then nothing is known
        return path, found
    bucket = on_bucket(mounts, folder)
    if bucket is None:
        return path, found
    return path, [bucket] if problem is None else [replace(problem, hint=bucket.hint)]


def on_bucket(mounts: str, folder: Path) -> Problem | None:
    """That a run folder lies on a bucket's mount. Pure, but for links.

    A warning: what a rename leaves half done there is found by its manifest, and passed by. But a
    commit is not one act, and what waits in the mount's cache goes with the machine.
    """
    program = bucket_mount(mounts, os.path.realpath(folder))
    if program is None:
        return None
    return Problem(
        f"output_dir: {folder} is a bucket that {program} shows as a folder: a rename there is a "
        "copy of each file, not one act, and what was written may be lost with the machine",
        f"a disk of the machine as output_dir, and `mirror: {PROGRAMS[program]}bucket/prefix` for "
        "what has to outlive it",
        "bucket-mount",
        "warning",
    )


def see_apart(folder: Path) -> list[Problem]:
    """Whether every node can write there, and none sees what another has written (`node_local`).

    Ranks: all (collective).
    """
    nodes = look()
    place = nearest(folder) / f".keepstep-probe-{secrets.token_hex(4)}"
    path, problem = _write(place) if nodes.acts else (place, None)
    try:
        made = collectives.gather((nodes.host, str(path), problem))
        others = [made[first] for first in nodes.firsts if first != nodes.firsts[nodes.here]]
        seen = [host for host, other, _ in others if os.path.exists(other)]
        shared = collectives.gather_some((nodes.host, seen[0]) if seen else None)
    finally:
        if nodes.acts:
            shutil.rmtree(path.parent, ignore_errors=True)
    problems = [problem for _, _, problem in made if problem is not None]
    if shared and not problems:
        here, there = shared[min(shared)]
        problems = [
            Problem(
                f"node_local: {folder} is not each machine's own: what is written on {there} is "
                f"seen on {here}",
                "leave node_local out: one folder that all see needs no more",
                "shared",
            )
        ]
    return problems


def _write(place: Path) -> tuple[Path, Problem | None]:
    """Main process: make a folder with a file, and rename it, as a commit does."""
    renamed = place.with_name(f"{place.name}-renamed")
    try:
        place.mkdir()
        (place / "nonce").write_text("keepstep")
        os.rename(place, renamed)
        if not (renamed / "nonce").exists() or place.exists():
            raise OSError(errno.ENOTSUP, "a renamed folder is not where it should be")
    except OSError as error:
        for left in (place, renamed):
            shutil.rmtree(left, ignore_errors=True)
        what = f"output_dir: no folder can be made and renamed in {place.parent}: {error.strerror}"
        return place / "nonce", Problem(what, "name another folder", "not-writable")
    return renamed / "nonce", None


def check_sizes(recipe: Recipe) -> Iterator[Problem]:
    """Whether checkpoints, snapshots and model fit here. Ranks: any; one process looks."""
    shapes = shapes_of(recipe)
    if shapes is not None:
        yield from check_model(recipe, shapes, strategy_of(recipe))


def check_model(recipe: Recipe, shapes: Shapes, strategy: Strategy) -> Iterator[Problem]:
    """The same of a model and a strategy that are known."""
    training = recipe.training
    size = checkpoint_bytes(shapes, strategy, training.save_weights != "never")
    yield from check_space(training, size)
    yield from _host_memory(training, shapes, strategy)
    yield from _device_memory(recipe, shapes, strategy)


def check_space(training: KeepstepConfig, size: int) -> Iterator[Problem]:
    """Whether the disk holds what the run will keep.

    Quotas are not looked at, but for those that the file system tells as its free space: whoever
    asks by taking the space takes it from others, and from a save that is being written.

    Args:
        size: of one checkpoint, in bytes.
    """
    run, policy = RunFolder(str(training.output_dir)), training.policy()
    place = nearest(run.path)
    count = 1 + (policy.limit or 1)  # and the one that is being written
    if training.save_strategy == "no" and training.save_interval_seconds is None:
        count = 1  # when it is stopped
    needed = count * size
    if policy.total_bytes is not None:
        needed = min(needed, policy.total_bytes + size)
    there = sum(checkpoint.manifest.total_bytes for checkpoint in run.checkpoints())
    needed = max(needed - there, size) + training.min_free
    free = shutil.disk_usage(place).free
    if needed <= free:
        return
    yield Problem(
        f"output_dir: {counted(count, 'checkpoint')} of {human_bytes(size)} take"
        f"{'s' if count == 1 else ''} {human_bytes(needed)} more on the disk of {place}, and "
        f"{human_bytes(free)} are free",
        "free space, save_weights: never (no weights file), or a lower save_total_limit",
        "space",
        # A run that is under way goes on as long as it can: it prunes, and skips saves loudly.
        "warning" if run.is_used() else "error",
    )


def _host_memory(training: KeepstepConfig, shapes: Shapes, strategy: Strategy) -> Iterator[Problem]:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    saves = training.save_strategy != "no" or bool(training.save_interval_seconds)
    needed, free = local * host_bytes(shapes, strategy), free_host_memory()
    if saves and training.save_mode != "off" and needed > free:
        yield Problem(
            f"{human_bytes(needed)} of host memory are wanted for snapshots and what is offloaded "
            f"({counted(local, 'process')} here), and {human_bytes(free)} are free: saves may stop "
            "training",
            "more memory for the job, or async_save: off",
            "host-memory",
            "warning",
        )


def _device_memory(recipe: Recipe, shapes: Shapes, strategy: Strategy) -> Iterator[Problem]:
    quantized = recipe.model.load_in_4bit or recipe.model.load_in_8bit  # not estimated
    if torch.cuda.is_available() and not quantized and not recipe.training.use_cpu:
        total = torch.cuda.get_device_properties(0).total_memory
        yield from check_device(recipe, shapes, strategy, total)


def check_device(
    recipe: Recipe, shapes: Shapes, strategy: Strategy, total: int
) -> Iterator[Problem]:
    """Whether the model can be trained in `total` bytes of device memory. Pure."""
    step = step_of(recipe)
    needed = device_bytes(shapes, strategy, step)
    if needed <= total:
        return
    fitting = [s for s in alternatives(strategy) if device_bytes(shapes, s, step) <= total]
    hint = "more processes, a smaller per_device_train_batch_size, or LoRA"
    if fitting:
        size = human_bytes(device_bytes(shapes, fitting[0], step))
        hint = f"the config {fitting[0].name} would take about {size}"
    yield Problem(
        f"{strategy.name} on {counted(strategy.processes, 'process')} takes about "
        f"{human_bytes(needed)} of each device's memory, which is {human_bytes(total)}",
        hint,
        "device-memory",
        "warning",
    )


def disk_speed(folder: Path) -> float:
    """Bytes per second of a durable write to the disk of `folder`, measured now; 0: no room.

    It is not measured where others could miss the space meanwhile.
    """
    if shutil.disk_usage(nearest(folder)).free < SPARE * SAMPLE_BYTES:
        return 0.0
    path = nearest(folder) / f".keepstep-probe-{secrets.token_hex(4)}"
    content = memoryview(bytearray(SAMPLE_BYTES))
    started = time.perf_counter()
    try:
        Storage().write(path, content)  # type: ignore[arg-type]
        return SAMPLE_BYTES / (time.perf_counter() - started)
    except OSError:
        return 0.0
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
