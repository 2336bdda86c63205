"""What a decision of all ranks costs, over the control group, as their number grows.

    python benchmarks/control_plane.py 8 32 64 --rounds 5

Forks so many ranks on this machine, which share its cores: real gloo, real messages, no network.
Prints, as the main process sees it, the median (min to max) of: making the group, its first
decision (which connects the ranks), one decision after that (five flags), a gather of what each
rank has to tell (100 bytes), and what the main process tells all. `--eager` connects every rank to
every other when the group is made, as torch does by itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from keepstep.ranks import collectives, control_group

TELLS = "x" * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranks", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=5, help="groups that are made")
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    for count in arguments.ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = count, port, arguments.rounds, arguments.eager
        fork = multiprocessing.get_context("fork")  # torch is imported once
        ranks = [fork.Process(target=measure, args=(rank, *given)) for rank in range(count)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"{count} ranks: exit statuses {[p.exitcode for p in ranks]}")


def measure(rank: int, count: int, port: int, rounds: int, eager: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ[control_group.LAZILY] = "1"  # of the default group, too: it is not measured
    dist.init_process_group("gloo", rank=rank, world_size=count)
    os.environ.pop(control_group.LAZILY)
    if eager:
        control_group.LAZILY = "NOT_READ_BY_TORCH"
    calls: dict[str, Callable[[], object]] = {
        "made": control_group.group,
        "first decision": decision,
        "decision": decision,
        "gather": lambda: collectives.gather(TELLS),
        "told by the main process": lambda: collectives.on_main("telling", lambda: TELLS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        control_group.forget()
        for name, call in calls.items():
            dist.barrier()
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    if rank == 0:
        for name, values in seconds.items():
            low, middle, high = (1e3 * f(values) for f in (min, statistics.median, max))
            print(f"{count:4} ranks  {name:25} {middle:8.1f} ms ({low:.1f} to {high:.1f})")
    dist.barrier()
    collectives.leave()


def decision() -> list[bool]:
    return collectives.any_of(False, False, False, False, False)


if __name__ == "__main__":
    main()
