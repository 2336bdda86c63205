"""Which three of six checkpoints are left? The textbook scenario, played without a model.

    python launch/examples/retention_story.py runs/story

10,000 steps are planned; every 500 the run evaluates and saves; `save_total_limit: 3`. After step
3000 it crashes. The files are small, the commits, the pruning and the answers are the real ones.
"""

import shutil
import sys
from pathlib import Path

from typer.testing import CliRunner

from keepstep.cli.main import app
from keepstep.policy.manifest import FileEntry, Manifest
from keepstep.policy.retention import Policy
from keepstep.run_folder.keeping import now
from keepstep.run_folder.reader import RunFolder
from keepstep.run_folder.storage import Storage
from keepstep.run_folder.writer import RunWriter

LOSSES = {500: 1.90, 1000: 1.20, 1500: 1.10, 2000: 1.35, 2500: 1.40, 3000: 1.45}


def play(run: Path, losses: dict[int, float]) -> None:
    """Save at every step with its evaluation loss, as one attempt of a run."""
    policy = Policy(limit=3, ranking="metric", metric="eval_loss")
    writer = RunWriter(RunFolder(run), policy, Storage())
    writer.start()
    for step, loss in losses.items():
        staged = writer.stage(step)
        file = writer.storage.write(staged / "model.safetensors", b"weights" * 1000)
        writer.commit(
            Manifest(
                run_id=writer.run_id,
                attempt=writer.attempt,
                parent=None,
                global_step=step,
                epoch=step / 2500,
                samples=step * 16,
                metrics={"eval_loss": loss},
                world_size=1,
                zero_stage=0,
                dtype="float32",
                adapter=False,
                planned_steps=10_000,
                settings={},
                health={"finite": True},
                versions={},
                saved_at=now(),
                save_seconds=0.0,
                files={"model.safetensors": FileEntry(0, file.bytes, file.xxh3_128)},
            )
        )
        writer.point()
        writer.prune()
        writer.point()


def ask(*words: str) -> None:
    """Run a keepstep command, and show it with its answer."""
    print(f"$ keepstep {' '.join(words)}")
    print(CliRunner().invoke(app, list(words)).stdout)


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/story")
    shutil.rmtree(run, ignore_errors=True)
    play(run, LOSSES)
    ask("ls", str(run))
    ask("which", str(run))


if __name__ == "__main__":
    main()
