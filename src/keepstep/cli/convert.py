"""`keepstep export | push | reshard | adopt`: what takes a checkpoint somewhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keepstep.cli import INTERRUPTED, completers, on_mirror
from keepstep.cli.common import (
    RunArgument,
    app,
    console,
    ended_by_signals,
    examples,
    fail,
    folder_at,
    lines_apart,
    one_checkpoint,
    used_run,
    verify_with_bar,
    without_links,
)
from keepstep.cli.drop_run import export_and_drop
from keepstep.cli.export_from_mirror import export_from_mirror, tell_exported
from keepstep.output import log_filters
from keepstep.output.loading import loading
from keepstep.output.terminal import progress_bar
from keepstep.output.units import counted, human_bytes
from keepstep.policy.strict import TextError, parse
from keepstep.run_folder.reader import RunFolder

LONGEST_PUSH = 1e7  # seconds
TRY_LATER = 75  # EX_TEMPFAIL
CARD_HINT = """    Hint: as in --card '{"license": "apache-2.0"}'"""


@app.command(
    epilog=examples(
        "keepstep export runs/mine/best --to out/model",
        "keepstep export runs/mine/checkpoint-500 --to out/merged --merge_adapter --dtype bf16",
        "keepstep export s3://my-bucket/runs/mine/best --to out/model",
        "keepstep export runs/mine/best --to out/model --drop_run",
    )
)
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|URL",
            help="A checkpoint-N of a run, RUN/best or RUN/latest; or one of these on a mirror, "
            "of which what is needed is fetched.",
            autocompletion=completers.checkpoints,
        ),
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="A folder that does not exist yet.")
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="The precision: bf16, fp16 or fp32; without it the weights keep theirs."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max_shard_size", help="The largest size of one file of weights.")
    ] = "5GB",
    merge_adapter: Annotated[
        bool,
        typer.Option(
            "--merge_adapter", help="Write the base model with the adapter merged into it."
        ),
    ] = False,
    drop_run: Annotated[
        bool,
        typer.Option(
            "--drop_run",
            help="Of a finished run: read the export back and compare it, then remove the run's "
            "checkpoints; pinned ones stay. Killed on the way, the same command goes on.",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="With --drop_run: print what went, as docs/json.md says.",
            callback=lines_apart,
        ),
    ] = False,
) -> None:
    """Write the weights of a checkpoint for inference, as `from_pretrained` reads them."""
    if drop_run and on_mirror.is_address(checkpoint):
        fail("--drop_run removes nothing from a mirror: name a run folder")
    if as_json and not drop_run:
        fail("--json goes with --drop_run")
    of_folder = not (drop_run or on_mirror.is_address(checkpoint))
    source = one_checkpoint(Path(checkpoint)) if of_folder else None
    with loading(console):
        from keepstep.convert.api import export_intact  # torch: seconds to import
        from keepstep.convert.export import ExportError, check_request

    if merge_adapter:
        log_filters.silence()
    options: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size}
    options["merge_adapter"] = merge_adapter
    try:
        if drop_run:
            export_and_drop(Path(checkpoint), to, options, as_json)
            return
        if source is None:
            export_from_mirror(checkpoint, to, **options)
            return
        check_request(to, dtype, max_shard_size)
        with ended_by_signals():
            verify_with_bar(source, deep=None)
            with progress_bar(console, f"exporting {source.path.name}") as progress:
                made = export_intact(source, to, **options, progress=progress)
    except ExportError as error:
        fail(*str(error).split("\n"))
    tell_exported(to, made)


@app.command(
    epilog=examples(
        "keepstep push runs/mine --repo_id owner/name --dry_run",
        "keepstep push runs/mine --repo_id owner/name --private",
    )
)
def push(
    run: RunArgument,
    repo_id: Annotated[
        str | None,
        typer.Option(
            "--repo_id", help="The repository, as owner/name; without it the recipe's hub_model_id."
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who may see a new repository; without it what the recipe says.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Publish also over a model that cannot be compared, or is somebody else's.",
        ),
    ] = False,
    card: Annotated[
        str | None,
        typer.Option(
            "--card", help="Metadata of the model card, as JSON; they go over those of the recipe."
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="The seconds after which it is given up.")
    ] = 3600.0,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Only list what would be sent.")
    ] = False,
) -> None:
    """Publish the best checkpoint of a run on the Hub, unless it, or a better one, is there."""
    from keepstep.publish.by_hand import PushFailedError, push_best

    if not 0 < timeout < LONGEST_PUSH:
        fail(f"--timeout {timeout:g} is not between 0 and {LONGEST_PUSH:.0f} seconds")
    folder, asked = used_run(run), _card(card)
    try:
        answer = push_best(
            folder,
            repo_id,
            private=private,
            force=force,
            timeout=timeout,
            dry_run=dry_run,
            card=asked,
            progress=lambda text: progress_bar(console, text),
            waiting=console.waiting,
        )
    except PushFailedError as error:
        fail(str(error), status=TRY_LATER if error.may_pass else 2)
    except (OSError, KeyError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(
            "interrupted: one commit is sent, which is there whole or not at all",
            status=INTERRUPTED,
        )
    for line in answer:
        console.tell(line)


def _card(text: str | None) -> dict[str, Any]:
    """The metadata of `--card`."""
    try:
        values = parse(text or "{}")
    except TextError as error:
        fail(f"--card is no JSON: {error}", CARD_HINT)
    if not isinstance(values, dict):
        fail(f"--card is no JSON object: {text}", CARD_HINT)
    return values


@app.command(
    epilog=examples("keepstep reshard runs/mine/checkpoint-500 --to runs/eight --num_processes 8")
)
def reshard(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint-N of a run.",
            autocompletion=completers.checkpoints,
        ),
    ],
    into: Annotated[
        Path,
        typer.Option(
            "--to", metavar="DIR", help="The run folder that it is written to; another one."
        ),
    ],
    num_processes: Annotated[
        int,
        typer.Option(
            "--num_processes", min=1, help="The number of processes that the shards are for."
        ),
    ],
) -> None:
    """Write the shards of a checkpoint for another number of processes, as a resume does too."""
    source = one_checkpoint(checkpoint)
    log_filters.silence()
    from keepstep.policy.batch import BatchError

    with loading(console):
        from keepstep.sharding.rewrite import reshard as write_for  # torch: seconds to import
        from keepstep.sharding.sources import ReshardError

    verify_with_bar(source, deep=None)
    try:
        with progress_bar(console, f"resharding {source.path.name}") as progress:
            run = without_links(RunFolder(into))
            made = write_for(source, run, num_processes, progress=progress)
    except (BatchError, ReshardError) as error:
        fail(str(error))
    console.tell(
        f"{into / made.path.name}: {human_bytes(made.manifest.total_bytes)}, for "
        f"{counted(num_processes, 'process')} (it was written by {source.manifest.world_size})",
    )


@app.command(epilog=examples("keepstep adopt outputs/checkpoint-500 --into runs/new"))
def adopt(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A checkpoint-N of the stock Trainer, or a universal checkpoint."
        ),
    ],
    into: Annotated[
        Path, typer.Option("--into", metavar="RUN", help="The run folder that it is copied into.")
    ],
) -> None:
    """Copy a checkpoint that keepstep did not write into a run, verify it, and commit it."""
    log_filters.silence()
    with loading(console):
        from keepstep.convert.adopt import AdoptError
        from keepstep.convert.adopt import adopt as take_in  # torch: seconds to import

    folder_at(path)
    try:
        with progress_bar(console, f"copying {path.name}") as progress:
            adopted = take_in(path, without_links(RunFolder(into)), progress=progress)
    except AdoptError as error:
        fail(str(error))
    manifest = adopted.checkpoint.manifest
    console.tell(
        f"{into / adopted.checkpoint.path.name}: {manifest.origin}, "
        f"{counted(len(manifest.files), 'file')}, {human_bytes(manifest.total_bytes)}, "
        "committed.\nNot checked:",
    )
    for sentence in adopted.unchecked:
        console.tell(f"  - {sentence}")
