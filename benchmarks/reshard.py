"""Resuming on another number of processes: keepstep's direct reshard against DeepSpeed's own way.

    python benchmarks/reshard.py --parameters 134 --zero 3 --move 2:1 --rounds 3

saves a Llama's state (random weights and moments) on the first number of ranks, then loads it on
the second, in turn:
`direct`: from the shards as they lie (checkpoint/reshard.py); `universal`: `ds_to_universal`, then
DeepSpeed's load of what it made. Only loading is timed (engines are built before, imports too; the
conversion is timed inside of its own process), from a barrier to a barrier, with the files in the
page cache and the memory in use before. Memory: the largest
growth of a rank's anonymous memory while it loads, and of a conversion process's maximum. Disk:
what lies in the folder afterwards that did not before. Medians and their range.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu.inputs import SHAPES
from tests.helpers.ranks import forget_shared_memory


def main() -> None:
    arguments = parse()
    if arguments.worker:
        return work(arguments)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    before, after = map(int, arguments.move.split(":"))
    try:
        spawn("save", before, arguments)
        rounds: dict[str, list[dict[str, float]]] = {"direct": [], "universal": []}
        for _ in range(arguments.rounds):
            rounds["direct"].append(one("direct", after, arguments))
            converted = one("convert", 1, arguments)
            try:
                loaded = one("universal", after, arguments)
            except Failed as failed:  # for want of memory: then the conversion counts alone
                print(f"{failed}; of that arm the conversion alone is counted")
                loaded = {"seconds": 0.0, "gb": 0.0}
            rounds["universal"].append(
                {
                    "seconds": converted["seconds"] + loaded["seconds"],
                    "convert": converted["seconds"],
                    "gb": max(converted["gb"], loaded["gb"]),
                    "disk_gb": converted["disk_gb"],
                }
            )
            shutil.rmtree(arguments.folder / "universal")
        tell(arguments, rounds)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, choices=SHAPES, default=134, help="millions")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=3, help="stage")
    parser.add_argument("--move", default="2:1", help="from how many ranks to how many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("reshard.tmp"), help="is deleted")
    parser.add_argument("--json", type=Path, help="file that the result is added to")
    parser.add_argument("--worker", choices=("save", "direct", "universal", "convert"))
    return parser.parse_args()


def one(what: str, ranks: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one arm; its slowest rank's seconds, the largest rank's memory, the disk taken."""
    before = folder_bytes(arguments.folder)
    os.sync()  # what an earlier arm wrote must not be on its way to the disk now
    reports = spawn(what, ranks, arguments)
    taken = (folder_bytes(arguments.folder) - before) / 1e9
    worst = {name: max(report[name] for report in reports) for name in ("seconds", "gb")}
    return worst | {"disk_gb": taken}


def spawn(
    what: str, ranks: int, arguments: argparse.Namespace, script: str = __file__
) -> list[dict[str, float]]:
    """Run `script --worker WHAT` on so many ranks; what each of them reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, script, *sys.argv[1:], "--worker", what]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(ranks)}
    shared.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    forget_shared_memory(port)
    if any(process.returncode for process in started):
        raise Failed(f"{what} failed: {[process.returncode for process in started]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def work(arguments: argparse.Namespace) -> None:
    """One rank of one arm; prints its report as the last line."""
    report = convert(arguments) if arguments.worker == "convert" else load_or_save(arguments)
    print(json.dumps(report), flush=True)
    os._exit(0)  # without DeepSpeed's farewells


def convert(arguments: argparse.Namespace) -> dict[str, float]:
    import resource

    from deepspeed.checkpoint import ds_to_universal

    tag = (arguments.folder / "latest").read_text().strip()
    words = ["--input_folder", str(arguments.folder / tag), "--inject_missing_state"]
    words += ["--output_folder", str(arguments.folder / "universal/state")]
    sys.argv = ["ds_to_universal", *words]
    warm(arguments.folder)
    touch(arguments, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    ds_to_universal.main(ds_to_universal.parse_arguments())
    seconds = time.perf_counter() - started
    (arguments.folder / "universal/latest_universal").write_text("state")
    used = [
        resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return {"seconds": seconds, "gb": max(used[0] - before, used[1] - before) * 1024 / 1e9}


def load_or_save(arguments: argparse.Namespace) -> dict[str, float]:
    import deepspeed
    import torch
    from deepspeed import comm

    from keepstep.sharding.reshard import load_shard, shard_for
    from keepstep.sharding.shards import zero_source

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    engine = build_engine(arguments)
    if arguments.worker == "save":
        save_two_steps(engine, arguments.folder)
        return {}
    if comm.get_rank() == 0:  # building the engine may have pushed them out of the page cache
        warm(arguments.folder / ("universal" if arguments.worker == "universal" else ""))
    comm.barrier()
    touch(arguments, comm.get_world_size())
    comm.barrier()
    with Watch() as watch:
        if arguments.worker == "direct":
            source = zero_source(arguments.folder)
            assert source is not None
            load_shard(engine, shard_for(engine, source), source.counters)
        else:
            engine.load_checkpoint(str(arguments.folder / "universal"))
        comm.barrier()
    steps = {int(engine.global_steps)}
    assert steps == {2}, steps
    return {"seconds": watch.seconds, "gb": watch.gb}


def save_two_steps(engine: Any, folder: Path) -> None:
    """As after two steps, without the memory that a backward pass of the largest model takes."""
    import torch

    from keepstep.sharding.flat_buffers import flats

    for flat in flats(engine):
        moments = {"exp_avg": torch.randn_like(flat), "exp_avg_sq": torch.rand_like(flat)}
        engine.optimizer.optimizer.state[flat] = {"step": torch.tensor(2.0), **moments}
    engine.global_steps = 2
    engine.save_checkpoint(str(folder))


def build_engine(arguments: argparse.Namespace) -> Any:
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads = SHAPES[arguments.parameters]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    )
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": arguments.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": arguments.worker == "universal"},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


class Failed(Exception):
    """A rank of an arm did not end well."""


class Watch:
    """Seconds, and the growth of this process's anonymous memory at its height."""

    def __enter__(self) -> Watch:
        self._before, self._peak, self._over = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._over.set()
        self._thread.join()
        self.gb = max(0, max(self._peak, anonymous()) - self._before) / 1e9

    def _sample(self) -> None:
        while not self._over.wait(0.005):
            self._peak = max(self._peak, anonymous())


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def warm(folder: Path) -> None:
    """Read every file once: both arms find what they read in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


def touch(arguments: argparse.Namespace, ranks: int) -> None:
    """Use and free 16 bytes per parameter: a virtual machine hands out memory that it has not used
    for a while at a tenth of the speed, to whichever arm comes first."""
    import torch

    memory = torch.ones(16 * arguments.parameters * 10**6 // ranks, dtype=torch.uint8)
    del memory


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tell(arguments: argparse.Namespace, rounds: dict[str, list[dict[str, float]]]) -> None:
    result: dict[str, Any] = {
        "parameters": arguments.parameters,
        "zero": arguments.zero,
        "move": arguments.move,
        "rounds": arguments.rounds,
    }
    for arm, reports in rounds.items():
        for name in reports[0]:
            values = sorted(report[name] for report in reports)
            result[f"{arm} {name}"] = [
                round(v, 4) for v in (statistics.median(values), values[0], values[-1])
            ]
            print(
                f"{arm:9} {name:8} {statistics.median(values):8.3f}  "
                f"({values[0]:.3f} to {values[-1]:.3f})"
            )
    ratio = result["universal seconds"][0] / result["direct seconds"][0]
    print(f"direct is {ratio:.1f} times as fast")
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.write(json.dumps(result | {"ratio": round(ratio, 2)}) + "\n")


if __name__ == "__main__":
    main()
