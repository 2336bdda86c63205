"""What grows with the number of ranks: a save, a resume and the watchdog of 64 to 4,096 of them.

    python benchmarks/many_ranks.py 64 512 4096

The ranks are threads of this one process, and run the real code one at a time; only the wire is a
stand-in, which counts (tests/helpers/world.py). Requests to the disk are counted where Python asks
the system (tests/helpers/counted.py). Every rank stores what it does under ZeRO-3 (its optimizer
shard, its part of the module, its random numbers, its slice of the weights file), with a few
numbers in the place of its tensors: what grows with bytes is not what is looked for.

Printed for each number of ranks: of the last of so many saves, each of which prunes the one before,
and of a resume: seconds of the main process's own code and of the last rank's, bytes that the wire
brings them, their requests; and the main process's steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist
from tests.helpers.counted import Requests
from tests.helpers.many import begin, save
from tests.helpers.world import World

from keepstep.policy.manifest import MANIFEST_NAME, Manifest, folder_name
from keepstep.policy.standstill import Standstills
from keepstep.ranks import listener, watchdog
from keepstep.run_folder.keeping import Keeper
from keepstep.run_folder.listed import only_listed
from keepstep.run_folder.writer import RunWriter
from keepstep.save import saver
from keepstep.save.in_flight import Flight
from keepstep.save.rank_part import Part

SAVES = 3
ELEMENTS = 64  # of a rank's slice of the weights
STEPS: dict[str, tuple[Any, str]] = {  # what the main process does alone
    "stage": (RunWriter, "stage"),
    "gather the reports": (Flight, "_gather"),
    "read the weights back": (saver, "digest_of_joint"),
    "take in what nobody claimed": (Part, "adopt_unclaimed"),
    "manifest and its checks": (RunWriter, "_seal"),
    "rename": (RunWriter, "_put"),
    "links": (Keeper, "point"),
    "retention and removal": (Keeper, "prune"),
    "choose (sizes, digests)": (RunWriter, "select"),
    "claim the run, sweep": (RunWriter, "start"),
}


@dataclass
class Result:
    """What was measured of so many ranks.

    Attributes:
        ranks: how many.
        phases: save or resume → name of a figure → the figure, of the main process and of the last
            rank, or of all ranks together.
        steps: the main process's → seconds, and the processor's among them.
        watchdog: the listener's and the store's figures.
    """

    ranks: int
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, tuple[float, float]] = field(default_factory=dict)
    watchdog: dict[str, float] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ranks", type=int, nargs="*", default=[64, 512, 4096])
    parser.add_argument("--rounds", type=int, default=SAVES, help="saves; the last is told")
    parser.add_argument("--folder", type=Path, help="where the run folder is made, and removed")
    parser.add_argument("--json", type=Path, help="file that the results are added to")
    arguments = parser.parse_args()
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as run:
            result = measure(ranks, Path(run), arguments.rounds)
        tell(result)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.write(json.dumps(vars(result)) + "\n")


def measure(ranks: int, run: Path, saves: int) -> Result:
    """Save so often, resume once, listen for a while."""
    result = Result(ranks)
    world = World(ranks, watched=(0, ranks - 1))
    # What belongs to no rank is a thread of the main process's, which removes files.
    requests = Requests(lambda: world.rank or 0)
    managers = begin(world, run)
    gc.freeze()  # else the collector goes through what thousands of ranks hold, in one's time
    for step in range(1, saves + 1):
        with told(result, f"save {step}", world, requests):
            world.run(lambda rank, step=step: save(managers[rank], step))  # type: ignore[misc]
    result.phases = {"save": result.phases[f"save {saves}"]}
    folder = run / folder_name(saves)
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    result.phases["save"] |= {
        "files": len(manifest.files),
        "bytes on disk": manifest.total_bytes,
        "bytes of the manifest": (folder / MANIFEST_NAME).stat().st_size,
    }
    with told(result, "resume", world, requests):
        managers = begin(world, run)
    chosen = managers[-1].chosen
    assert chosen is not None
    started = time.perf_counter()
    with only_listed(chosen):
        result.phases["resume"]["seconds for the loaders' view"] = time.perf_counter() - started
    result.watchdog = listen(ranks)
    return result


@contextmanager
def told(result: Result, phase: str, world: World, requests: Requests) -> Iterator[None]:
    """Measure what is done within, as a phase of the result."""
    world.seconds.clear()
    world.received.clear()
    requests.forget()
    steps: dict[str, tuple[float, float]] = {}
    with ExitStack() as measured:
        for name, (owner, attribute) in STEPS.items():
            real = getattr(owner, attribute)
            measured.enter_context(
                mock.patch.object(owner, attribute, timed(real, name, steps, world))
            )
        measured.enter_context(requests.counted())
        yield
    last = world.size - 1
    result.steps |= {f"{phase.split()[0]}: {name}": taken for name, taken in steps.items()}
    result.phases[phase] = {
        "seconds": [world.seconds[0], world.seconds[last]],
        "wire bytes": [world.received[0], world.received[last]],
        "requests": [dict(requests.of(0)), dict(requests.of(last))],
        "all requests": sum(requests.counts.values()),
        "all wire bytes": sum(world.received.values()),
    }


def timed(
    real: Callable[..., Any], name: str, steps: dict[str, tuple[float, float]], world: World
) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        started, busy = time.perf_counter(), time.thread_time()
        try:
            return real(*args, **options)
        finally:
            if world.rank == 0:
                seconds, processor = steps.get(name, (0.0, 0.0))
                seconds += time.perf_counter() - started
                steps[name] = seconds, processor + time.thread_time() - busy

    return call


def listen(ranks: int) -> dict[str, float]:
    """A round of the watchdog: what the main process asks the store, and makes of it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ear = listener.Listener(list(range(ranks)), 25.0, Standstills(600.0, 600.0))
    keys = [f"{watchdog.KEY}rank/{rank}" for rank in range(ranks)]
    heard: list[float] = []
    asked: list[float] = []
    for beat in range(1, 12):
        for key in keys:
            store.set(key, f"{beat} {beat * 3} {beat * 40}")
        started = time.perf_counter()
        said = [text.decode() for text in store.multi_get(keys)]
        middle = time.perf_counter()
        assert ear.hear(said, beat * listener.PERIOD_SECONDS) is None
        asked.append(middle - started)
        heard.append(time.perf_counter() - middle)
    now = 12 * listener.PERIOD_SECONDS
    verdict, worst = None, 0.0
    while verdict is None:  # nobody gets on from here
        said = [f"{now} {33 - (rank == 3)} 440" for rank in range(ranks)]
        started = time.perf_counter()
        verdict = ear.hear(said, now)
        worst, now = time.perf_counter() - started, now + listener.PERIOD_SECONDS
    return {
        "ask the store": sorted(asked)[len(asked) // 2],
        "hear": sorted(heard)[len(heard) // 2],
        "pronounce": worst,
        "bytes": sum(map(len, keys)) + sum(map(len, said)),
        "messages a second": 3 * ranks / listener.PERIOD_SECONDS,
    }


def tell(result: Result) -> None:
    print(f"\n{result.ranks} ranks")
    for phase, figures in result.phases.items():
        for name, value in figures.items():
            if name == "requests":
                for who, counts in zip(("main process", "last rank"), value, strict=True):
                    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
                    print(f"  {phase}: requests of the {who}: {sum(counts.values())} ({kinds})")
            elif isinstance(value, list):
                print(f"  {phase}: {name}: main process {shown(value[0])}, last {shown(value[1])}")
            else:
                print(f"  {phase}: {name}: {shown(value)}")
    for name, (seconds, processor) in result.steps.items():
        print(f"  main process alone: {name}: {seconds:.4f} s, of the processor {processor:.4f}")
    for name, value in result.watchdog.items():
        print(f"  watchdog: {name}: {shown(value)}")


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


if __name__ == "__main__":
    main()
