"""How long training stands still for a save: plain Trainer, keepstep, and torch's own async save.

    python benchmarks/save_stall.py --parameters 134 --zero 3 --dtype fp32 --rounds 5

trains a random Llama on 2 processes (`--device cuda --processes 1`: on one GPU); the arms
alternate, save by save, in one run. Every rank reports; a stall is the slower rank's. A step and a
save begin when the device is done with what came before. Medians and their range are printed, and
with `--json FILE` added to a file as one line. Run it on an otherwise idle machine with free disk
space of 40 bytes per parameter.

Arms: `plain`: the stock Trainer with rotation; `off`, `snapshot`, `lazy`: keepstep; `dcp`:
torch.distributed.checkpoint.async_save with a cached stager, of the optimizer's shards alone.
Probes: `raw`: the snapshot's bytes by O_DIRECT and fsync, both ranks at once; `memcpy`: one big
copy into warm memory, pinned where it comes from a device; `idle`: a snapshot save with nothing
else going on, for its write rate; `none`: nothing, for the step after it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu.inputs import SHAPES, make_inputs

ROOT = Path(__file__).resolve().parents[1]
STEPS_BETWEEN = 2
MEMCPY_ELEMENTS = 1 << 28  # a GB of fp32: more tells no other rate
ARMS = ("none", "plain", "off", "snapshot", "lazy", "dcp", "idle", "raw", "memcpy")


def main() -> None:
    arguments = parse()
    if "RANK" in os.environ:
        measure(arguments)
    else:
        launch(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, choices=SHAPES, default=134, help="millions")
    parser.add_argument("--zero", type=int, choices=(0, 2, 3), default=3, help="stage; 0: DDP")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each arm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="of each process in a step")
    parser.add_argument("--processes", type=int, default=2, help="one GPU takes one")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--folder", type=Path, default=Path("save_stall.tmp"), help="is deleted")
    parser.add_argument("--json", type=Path, help="file that the result is added to")
    return parser.parse_args()


def launch(arguments: argparse.Namespace) -> None:
    """Make model and data, and start two ranks of this script."""
    shutil.rmtree(arguments.folder, ignore_errors=True)
    cpu = arguments.device == "cpu"
    words = max(40, arguments.length)
    make_inputs(
        arguments.folder, SHAPES[arguments.parameters], device=arguments.device, words=words
    )
    strategy = f"{'cpu_' if cpu else ''}zero{arguments.zero}" if arguments.zero else "ddp"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / f"accelerate_configs/{strategy}.yaml")),
        *("--num_processes", str(arguments.processes)),
        *("--num_machines", "1", "--main_process_port", "0"),
        *(sys.argv[0], *sys.argv[1:]),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if cpu:
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
    try:
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def measure(arguments: argparse.Namespace) -> None:
    """One rank: train, and let each save be another arm's."""
    import torch
    from tests.helpers.plain import save_plain

    from keepstep import train
    from keepstep.output import log_filters
    from keepstep.ranks import collectives
    from keepstep.recipe.config import ConfigError
    from keepstep.recipe.parse import parse_recipe
    from keepstep.trainer.attempt import CurrentAttempt
    from keepstep.trainer.sft import KeepstepTrainer

    log_filters.silence()
    log_filters.silence_prints()
    folder, arms = arguments.folder, list(arguments.arms)
    saves = arguments.rounds * len(arms)
    fields = {
        "model_name_or_path": folder / "model",
        "dtype": "bfloat16" if arguments.dtype == "bf16" else "float32",
        "bf16": arguments.dtype == "bf16",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "max_length": arguments.length,
        "per_device_train_batch_size": arguments.rows,
        "max_steps": (saves + 1) * STEPS_BETWEEN + 1,
        "save_steps": STEPS_BETWEEN,
        "save_total_limit": 1,
        "eval_strategy": "no",
        "keep_ranking": "recency",
        "gradient_checkpointing": False,
        "logging_steps": 10_000,
        "report_to": "none",
        "disable_tqdm": True,
    }
    recipe = parse_recipe([text for n, v in fields.items() for text in (f"--{n}", str(v))])
    inputs, settings, problems = train.gather_inputs(recipe)
    if problems:
        raise ConfigError(problems)
    recipe.training.async_save = "lazy"
    attempt = CurrentAttempt(recipe)

    class Alternating(KeepstepTrainer):
        """Each save by the next arm; times are kept per arm."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.times: dict[str, list[float]] = defaultdict(list)
            self.facts: dict[str, list[dict[str, Any]]] = defaultdict(list)
            self.arm: str | None = None
            self.saves = 0
            self.held = 0.0
            self.step_began = 0.0
            self.steps_since = 0
            self.pending: Any = None
            hold = self.manager.saver.hold

            def timed_hold() -> None:
                began = time.perf_counter()
                hold()
                self.held += time.perf_counter() - began

            self.manager.saver.hold = timed_hold  # type: ignore[method-assign]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            settle()
            now = time.perf_counter()
            if self.steps_since == 1:
                self.times[f"step after {self.arm}"].append(now - self.step_began)
            self.steps_since += 1
            self.step_began = now
            return super().training_step(*args, **kwargs)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.finish_arm()
            # The first save of a run warms caches up and belongs to nobody.
            self.arm = arms[(self.saves - 1) % len(arms)] if self.saves else "lazy"
            counted = 0 < self.saves <= saves
            self.saves += 1
            settle()
            collectives.gather(None)
            self.held, began = 0.0, time.perf_counter()
            getattr(self, f"save_{self.arm}")(model, trial)
            self.stall = time.perf_counter() - began if counted else None
            self.steps_since = 0

        def finish_arm(self) -> None:
            """Everything of the arm before is on the disk."""
            self.hear()
            if self.pending is not None:
                getattr(self.pending, "upload_completion", self.pending).result()
                self.pending = None
            if self.arm is not None and self.stall is not None:
                seconds = max(collectives.gather(self.stall + self.held))
                self.times[self.arm].append(seconds)
                if self.arm in ("off", "snapshot", "lazy", "idle") and self.last_saved:
                    self.facts[self.arm].append(
                        self.last_saved.facts
                        | {"bytes": self.last_saved.checkpoint.manifest.total_bytes}
                    )
            os.sync()

        def ours(self, mode: str, model: Any, trial: Any) -> None:
            self.manager.saver.mode = mode  # type: ignore[assignment]
            super()._save_checkpoint(model, trial)
            arena = self.manager.saver.arena
            if mode == "snapshot" and arena is not None:
                self.times["snapshot bytes"].append(arena.used)

        def save_none(self, model: Any, trial: Any) -> None:
            """The step after it is what a step takes without a save."""

        def save_off(self, model: Any, trial: Any) -> None:
            self.ours("off", model, trial)

        def save_snapshot(self, model: Any, trial: Any) -> None:
            self.ours("snapshot", model, trial)

        def save_lazy(self, model: Any, trial: Any) -> None:
            self.ours("lazy", model, trial)

        def save_idle(self, model: Any, trial: Any) -> None:
            self.ours("snapshot", model, trial)
            self.hear()

        def save_plain(self, model: Any, trial: Any) -> None:
            save_plain(self, folder / "plain")

        def shards(self) -> dict[str, torch.Tensor]:
            from keepstep.sharding.hf_weights import masters

            optimizer = self.contents.optimizer()
            tensors = [t for s in optimizer.state.values() for t in s.values() if t.numel() > 1]
            if self.is_deepspeed_enabled:
                tensors += masters(self.deepspeed)
            return {f"rank{collectives.rank()}.{i}": t.detach() for i, t in enumerate(tensors)}

        def save_dcp(self, model: Any, trial: Any) -> None:
            import torch.distributed.checkpoint as dcp
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            if not hasattr(self, "stager"):
                device = arguments.device == "cuda"
                self.stager = DefaultStager(StagingOptions(device, False, device, device))
                self.group = torch.distributed.new_group(backend="gloo")
            writer = dcp.FileSystemWriter(folder / "dcp")
            self.pending = dcp.async_save(
                self.shards(),
                storage_writer=writer,
                process_group=self.group,
                async_stager=self.stager,
            )

        def save_memcpy(self, model: Any, trial: Any) -> None:
            source = max(self.shards().values(), key=lambda t: t.numel()).reshape(-1)
            source = source[:MEMCPY_ELEMENTS]
            if not hasattr(self, "warm"):
                self.warm = torch.zeros_like(source, device="cpu", pin_memory=source.is_cuda)
            began = time.perf_counter()
            self.warm.copy_(source)
            size = source.numel() * source.element_size()
            self.times["memcpy GB/s"].append(size / (time.perf_counter() - began) / 1e9)

        def save_raw(self, model: Any, trial: Any) -> None:
            from keepstep.run_folder.files import CHUNK

            size = int(self.manager.saver.arena.size) if self.manager.saver.arena else 0
            whole = torch.frombuffer(self.manager.saver.arena._memory, dtype=torch.uint8)
            memory = whole.numpy().data
            path = folder / f"raw-{collectives.rank()}"
            path.unlink(missing_ok=True)
            collectives.gather(None)
            began, position = time.perf_counter(), 0
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
            while position < size:
                position += os.pwrite(descriptor, memory[position : position + CHUNK], position)
            os.fsync(descriptor)
            os.close(descriptor)
            slowest = max(collectives.gather(time.perf_counter() - began))
            self.times["raw GB/s"].append(sum(collectives.gather(size)) / slowest / 1e9)

    train.KeepstepTrainer = Alternating  # type: ignore[misc]
    with attempt:
        attempt.begin()
        attempt.choose(settings)
        trainer = train.build_trainer(attempt, inputs)
        trainer.train()
        trainer.finish_arm()
    peaks = collectives.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    if collectives.is_main():
        tell(arguments, trainer, max(peaks))
    collectives.leave()


def settle() -> None:
    """Wait for the device: what it has left to do of a step is none of what comes after."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def tell(arguments: argparse.Namespace, trainer: Any, peak_gb: float) -> None:
    """Print medians and ranges; the same as one JSON line."""
    arena = trainer.manager.saver.arena
    arena_gb = arena.size / 1e9 if arena else 0.0
    sizes = [getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()]
    processes = f"{arguments.processes} process{'es' if arguments.processes > 1 else ''}"
    print(
        f"{sum(sizes) / 1e6:.1f} M parameters, {arguments.dtype}, "
        f"{'ZeRO-' + str(arguments.zero) if arguments.zero else 'DDP'}, {processes}; "
        f"peak memory of a process {peak_gb:.2f} GB, arena {arena_gb:.2f} GB"
    )
    summary: dict[str, Any] = {
        **{name: getattr(arguments, name) for name in ("parameters", "zero", "dtype", "rounds")},
        "peak_gb": round(peak_gb, 2),
        "arena_gb": round(arena_gb, 3),
    }
    plain = statistics.median(trainer.times.get("plain") or [float("nan")])
    for name, values in trainer.times.items():
        middle = statistics.median(values)
        summary[name] = [round(v, 4) for v in (middle, min(values), max(values))]
        ratio = (
            f"{plain / middle:7.1f} x less than plain"
            if name in ("off", "snapshot", "lazy", "dcp")
            else ""
        )
        print(f"{name:22} {middle:8.3f}  ({min(values):.3f} to {max(values):.3f}) {ratio}")
    for arm, facts in trainer.facts.items():
        medians = {n: round(statistics.median(f[n] for f in facts), 4) for n in facts[0]}
        summary[f"{arm} facts"] = medians
        print(f"{arm}: {medians}")
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
