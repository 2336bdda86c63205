"""`keepstep completion`: what a shell runs to complete keepstep's commands."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from keepstep.cli.common import app, console, examples

VARIABLE = "_KEEPSTEP_COMPLETE"  # typer makes it of the program's name
# typer's own (0.29) splits names at blanks, and takes [lr=1e-4] for a pattern.
BASH = """_keepstep_completion() {
    mapfile -t COMPREPLY < <(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \\
        _KEEPSTEP_COMPLETE=complete_bash "$1" 2>/dev/null)
    if ((COMP_CWORD > 1)); then compopt -o filenames 2>/dev/null; fi
}
complete -o default -F _keepstep_completion keepstep"""


class Shell(StrEnum):
    """Shells whose completion is tried."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command(
    epilog=examples(
        "keepstep completion bash >> ~/.bash_completion",
        "keepstep completion zsh > ~/.zfunc/_keepstep",
        "keepstep completion fish > ~/.config/fish/completions/keepstep.fish",
    )
)
def completion(
    shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="The shell it is for.")],
) -> None:
    """Print what a shell reads to complete commands, options, run folders and steps."""
    from typer._completion_shared import get_completion_script

    if shell is Shell.BASH:
        script = BASH
    else:
        script = get_completion_script(
            prog_name="keepstep", complete_var=VARIABLE, shell=shell.value
        )
    console.tell_whole(script)


def prepare_if_asked() -> None:
    """A shell asks in the environment; typer knows the shells when it has been told to."""
    if VARIABLE in os.environ:
        from typer._completion_classes import completion_init

        completion_init()
