"""`keepstep init | config | launch | submit`: all that a launch needs beside the package itself.

These files are the repository's own (accelerate_configs/, launch/, slurm/). A wheel carries copies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import keepstep
from keepstep.cli.common import app, console, errors_apart, examples, fail
from keepstep.output.printable import quoted

# All behind the recipe is for the script: nothing is taken apart here.
PASS_ALL_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
}
CALLED_AS = "KEEPSTEP_CALLED_AS"
SITE, UNIT = "site.env", "keepstep@.service"


class Template(StrEnum):
    """Recipes to begin with, in launch/recipes."""

    LORA = "lora"
    FULL = "full"
    DEMO = "demo"
    FULL_1B = "qwen3-1.7b-full"
    LORA_8B = "qwen3-8b-lora"
    QLORA_8B = "qwen3-8b-qlora"
    FULL_8B = "qwen3-8b-full"
    LONG_8B = "qwen3-8b-long"
    VISION_3B = "qwen2.5-vl-3b-lora"
    FULL_32B = "qwen3-32b-full"
    FULL_70B = "llama-70b-full"


def packaged(name: str = "") -> Path:
    """A file or folder that comes with keepstep: of the wheel, else of the checkout."""
    package = Path(keepstep.__file__).parent
    installed = package / "files"
    found = (installed if installed.is_dir() else package.parents[1]) / name
    if not found.exists():
        fail(f"this installation of keepstep lacks {found}", "    Hint: install it again.")
    return found


@app.command(
    epilog=examples(
        "keepstep init my-run --template full", "cd my-run && keepstep launch recipe.yaml"
    )
)
def init(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder that it is written to.")
    ] = Path("."),
    template: Annotated[
        Template,
        typer.Option(
            "--template",
            help="Which recipe: lora on a small chat model, full fine-tuning of it, a demo that "
            "trains a tiny model in minutes and downloads nothing, or one for larger models: "
            f"{', '.join(list(Template)[3:])}; each says what hardware it is meant for.",
        ),
    ] = Template.LORA,
) -> None:
    """Write a recipe to begin with into a folder, and say how to launch it."""
    recipe = directory / "recipe.yaml"
    if directory.exists() and not directory.is_dir():
        fail(f"{directory} is a file, not a folder", "    Hint: keepstep init DIR")
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with open(recipe, "x", encoding="utf-8") as file:
            file.write(packaged(f"launch/recipes/{template}.yaml").read_text(encoding="utf-8"))
    except FileExistsError:
        fail(
            f"{recipe} is there already, and is left as it is",
            "    Hint: name another folder: keepstep init DIR",
        )
    console.tell(f"{recipe} is written.")
    if template is Template.DEMO:
        _make_demo(directory / ".demo")
    change = "" if directory == Path(".") else f"cd {quoted(directory)} && "
    if template is not Template.DEMO:
        console.tell("Set model_name_or_path, dataset_name and output_dir in it; then look for")
        console.tell(f"mistakes:  {change}keepstep check recipe.yaml")
    console.tell(f"launch it:  {change}keepstep launch recipe.yaml")
    console.tell("Killed at any moment, the same command carries on.")


def _make_demo(folder: Path) -> None:
    if folder.exists():
        console.tell(f"{folder} is there already, and is left as it is.")
        return
    with console.waiting("making a tiny model and its data …"):
        script = packaged("launch/examples/make_demo.py")
        made = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    if made.returncode:
        fail("the demo's model and data could not be made:", *made.stderr.splitlines())
    console.tell(f"{folder} holds a tiny model and its data.")


@app.command(
    epilog=examples(
        'accelerate launch --config_file "$(keepstep config zero3)" -m keepstep.train '
        "--config recipe.yaml",
        'cp "$(keepstep config site.env)" ~/.config/keepstep/site.env',
    )
)
def config(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Without it all names are listed.")
    ] = None,
) -> None:
    """Print the path of an accelerate config, a Slurm site's example settings or a systemd unit."""
    with errors_apart():
        configs = packaged("accelerate_configs").glob("*.yaml")
    known = {path.stem: path for path in sorted(configs)}
    known[SITE] = packaged("slurm/site.env.example")
    known[UNIT] = packaged(f"launch/{UNIT}")
    if name is None:
        for known_name in known:
            console.tell(known_name)
    elif name in known:
        console.tell(str(known[name]))
    else:
        with errors_apart():
            fail(f"there is no configuration {name!r}", f"    Hint: one of {', '.join(known)}")


@app.command(
    context_settings=PASS_ALL_ON,
    epilog=examples(
        "keepstep launch recipe.yaml",
        "KEEPSTEP_CONFIG=zero2 KEEPSTEP_PROCESSES=4 keepstep launch recipe.yaml --learning_rate "
        "1e-4",
        "keepstep launch recipe.yaml --retries 5",
        "keepstep launch recipe.yaml --nnodes 1:3 --retries 5",
    ),
)
def launch(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE [--field value ...]",
            help="A recipe, and fields of it with other values. KEEPSTEP_PROCESSES: how many "
            "processes (else one for each GPU, or 2 on CPU); KEEPSTEP_CONFIG: an accelerate "
            "config, by its name or path. --retries N: launch again what has failed or was killed, "
            "until N times in a row nothing was saved. --nnodes MIN:MAX: the same command on each "
            "of several machines that see the run folder; one may leave and come back.",
        ),
    ],
) -> None:
    """Train on this machine under supervision; the same command carries on after any end."""
    become("launch/train.sh", "keepstep launch", recipe, *context.args)


@app.command(
    context_settings=PASS_ALL_ON,
    epilog=examples(
        "keepstep submit recipe.yaml --nodes 2 --gpus-per-node 8 --time 1-00:00:00 --dry_run",
        "keepstep submit recipe.yaml --nodes 2-4 --gpus-per-node 8 --time 1-00:00:00",
        "keepstep submit recipe.yaml --gpus-per-node 8 --runs runs.txt --at_most 2",
    ),
)
def submit(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE [options] [--field value ...]",
            help="A recipe; --nodes N or MIN-MAX, --gpus-per-node [TYPE:]G and --time T as sbatch "
            "takes them, --runs FILE for a run for each of its lines, --at_most N of them at once, "
            "--dry_run to print the job only; and fields of the recipe with other "
            "values. A cluster's own settings stand in ~/.config/keepstep/site.env, or in the "
            "file that KEEPSTEP_SITE names (`keepstep config site.env` is an example).",
        ),
    ],
) -> None:
    """Submit the training as a Slurm job that comes back by itself until the run is finished."""
    become("slurm/submit.sh", "keepstep submit", recipe, *context.args)


def become(script: str, called_as: str, *arguments: str, **variables: str) -> NoReturn:
    """Go on as that script: signals reach it, and its exit status is the command's."""
    environment = {**os.environ, CALLED_AS: called_as, **variables}
    own = Path(sys.executable).parent
    if (own / "accelerate-launch").exists():  # also where the environment is not activated
        environment["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    sys.stdout.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and bash would inherit that
    try:
        os.execvpe("bash", ["bash", str(packaged(script)), *arguments], environment)
    except FileNotFoundError:
        fail("there is no bash, which launches and supervises the training")
