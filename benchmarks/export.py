"""Exporting a checkpoint's weights: time, and memory, against loading the model and saving it.

    python benchmarks/export.py --parameters 134 --rounds 3

A Llama's ZeRO-3 state of two ranks is saved (random weights and moments), with a weights file in
bf16 as a run has it. Then, in processes of their own, in turn:
`file`: `keepstep export` from the weights file; `shards`: from the fp32 masters in the shards,
without one; `stock`: DeepSpeed's `get_fp32_state_dict_from_zero_checkpoint`, then `save_file`.
Memory: the growth of anonymous memory above what the imports took, at its height (mapped files are
page cache, and given back when others want it). Medians and their range.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.gpu.inputs import SHAPES
from benchmarks.reshard import Watch, build_engine, save_two_steps, spawn, warm

ARMS = ("file", "shards", "stock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, choices=SHAPES, default=134, help="millions")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=3, help="stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("export.tmp"), help="is deleted")
    parser.add_argument("--worker", choices=("save", *ARMS))
    arguments = parser.parse_args()
    if arguments.worker == "save":
        return save(arguments)
    if arguments.worker:
        return work(arguments)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    try:
        spawn("save", 2, arguments, script=__file__)
        rounds: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(arguments.rounds):
            for arm in ARMS:
                rounds[arm].append(one(arm))
        for arm, reports in rounds.items():
            for name in ("seconds", "gb"):
                values = sorted(report[name] for report in reports)
                middle = statistics.median(values)
                print(f"{arm:7} {name:8} {middle:8.3f}  ({values[0]:.3f} to {values[-1]:.3f})")
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


def one(arm: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", arm]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return report


def save(arguments: argparse.Namespace) -> None:
    """A rank's part of a checkpoint as a run would commit it."""
    import deepspeed
    import torch
    from deepspeed import comm
    from safetensors.torch import save_file

    from keepstep.policy.manifest import FileEntry, Manifest
    from keepstep.run_folder.contents import digest_of, sizes_under
    from keepstep.save.safetensors_format import Entry, layout_of
    from keepstep.sharding.sources import LAYOUT_FILE

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    engine = build_engine(arguments)
    folder = arguments.folder / "checkpoint-2"
    save_two_steps(engine, folder)
    if comm.get_rank() != 0:
        print("{}", flush=True)
        os._exit(0)
    shapes = {
        n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()
    }
    entries = {name: Entry(torch.bfloat16, shape) for name, shape in shapes.items()}
    save_file(
        {n: torch.zeros(e.shape, dtype=e.dtype) for n, e in entries.items()},
        folder / "model.safetensors",
    )
    (folder / LAYOUT_FILE).write_bytes(layout_of(entries, {name: name for name in entries}))
    files = {
        name: FileEntry(0, size, digest_of(folder / name))
        for name, size in sizes_under(folder).items()
    }
    facts: dict[str, Any] = {"run_id": "benchmark", "attempt": 1, "parent": None, "global_step": 2}
    facts |= {"epoch": 0.0, "samples": 0, "metrics": {}, "world_size": 1, "zero_stage": 3}
    facts |= {"dtype": "bfloat16", "adapter": False, "planned_steps": 2, "settings": {}}
    facts |= {"health": {}, "versions": {}, "saved_at": "", "save_seconds": 0.0, "files": files}
    (folder / "manifest.json").write_text(Manifest(**facts).to_json())
    print("{}", flush=True)
    os._exit(0)  # without DeepSpeed's farewells


def work(arguments: argparse.Namespace) -> None:
    """One arm; prints its report as the last line."""
    from dataclasses import replace

    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import save_file

    from keepstep.convert.export import export
    from keepstep.run_folder.reader import read_checkpoint

    torch.set_num_threads(1)
    folder, target = arguments.folder / "checkpoint-2", arguments.folder / "exported"
    shutil.rmtree(target, ignore_errors=True)
    warm(folder)
    checkpoint = read_checkpoint(folder)
    with Watch() as watch:
        if arguments.worker == "stock":
            target.mkdir()
            state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
            halves = {name: tensor.bfloat16() for name, tensor in state.items()}
            save_file(halves, target / "model.safetensors")
        else:
            files = checkpoint.manifest.files
            if arguments.worker == "shards":
                files = {n: e for n, e in files.items() if not n.endswith(".safetensors")}
            bare = replace(checkpoint, manifest=replace(checkpoint.manifest, files=files))
            export(bare, target, dtype="bf16", max_shard_size="50GB")
    print(json.dumps({"seconds": watch.seconds, "gb": watch.gb}), flush=True)


if __name__ == "__main__":
    main()
