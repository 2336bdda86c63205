"""A process that has imported everything, and forks ranks on request: imports are paid once.

It reads one JSON request a line on stdin and answers with one on stdout. `Ranks` in ranks.py is
its other half. Each rank is a real process with the environment that `accelerate launch` gives it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from typing import Any

CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000
IMPORTED_LATER = (
    # Every ZeRO engine imports this optimizer, and with it half of torch's compiler.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)


def environment(strategy: str, processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file strategy` sets, by Accelerate's own functions."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = ["--config_file", strategy, "--num_processes", str(processes)]
    parsed = launch_command_parser().parse_args(
        [*arguments, "--num_machines", "1", "--main_process_port", "0", "-m", "keepstep.train"]
    )
    parsed, defaults, _ = _validate_launch_command(parsed)
    if not parsed.use_deepspeed:
        return dict(prepare_multi_gpu_env(parsed))
    parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return dict(prepare_deepspeed_cmd_env(parsed)[1])


def start(request: dict[str, Any]) -> list[int]:
    """Fork one process per rank; returns their ids in rank order."""
    processes = request["processes"]
    shared = environment(request["strategy"], processes) if request["strategy"] else {}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])} | request["env"]
    pids, of_node = [], processes // request["nodes"]
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            node, local = divmod(rank, of_node)
            numbers = {"RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node}
            sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": of_node}
            os.environ.update(shared)
            os.environ.update({name: str(n) for name, n in (numbers | sizes).items()})
            if request["disks"]:
                own_disk(f"{request['disks']}/{node}", f"{request['disks']}/here")
            _become_rank(request["log"], request["script"], request["argv"])
        pids.append(pid)
    return pids


def own_disk(folder: str, here: str) -> None:
    """Mount `folder` on `here`, for this process alone: a disk that other machines do not see."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags: list[tuple[bytes | None, bytes, int]] = [
        (None, b"/", MS_REC | MS_PRIVATE),
        (folder.encode(), here.encode(), MS_BIND),
    ]
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for source, target, how in flags:
        if libc.mount(source, target, None, how, None):
            raise OSError(ctypes.get_errno(), f"mount {target!r}")


def _become_rank(log: str, script: str | None, argv: list[str]) -> None:
    """Run the main job, or a test's own script, in this fresh fork; never returns."""
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.enable()
        from keepstep import train
        from keepstep.output import log_filters
        from keepstep.ranks import signals
        from tests.helpers import launchers

        launchers.hear_signals()
        signals.install_handlers()
        log_filters.silence()
        if script:
            sys.argv = [script, *argv]
            runpy.run_path(script, run_name="__main__")
            code = 0
        else:
            code = train.main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def poll(pids: list[int]) -> dict[str, int | None]:
    """Exit status of each (negative: a signal), None while it runs."""
    result: dict[str, int | None] = {}
    for pid in pids:
        done, status = os.waitpid(pid, os.WNOHANG)
        result[str(pid)] = os.waitstatus_to_exitcode(status) if done else None
    return result


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries write to stdout must not be taken for an answer

    # The imports are what this process is for: these, and what models and engines import later.
    gc.disable()
    for module in ("keepstep.train", *IMPORTED_LATER):
        importlib.import_module(module)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles the patterns of every architecture

    gc.freeze()  # else every rank's collections go through all of that again
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request) if request["do"] == "start" else poll(request["pids"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
