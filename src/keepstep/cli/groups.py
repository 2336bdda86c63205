"""Under which headings `keepstep --help` lists the commands."""

from __future__ import annotations

import typer

GROUPS = {
    "Begin": ("init", "check", "preview", "estimate", "config", "launch", "submit"),
    "Look at a run": (
        *("status", "ls", "show", "log", "goodput", "report", "samples", "which", "verify"),
    ),
    "While it is at work": ("save-now", "stop"),
    "What it keeps": ("pin", "unpin", "prune", "rm", "adopt", "reshard"),
    "Measure and publish": ("evaluate", "export", "push"),
    "A mirror": ("sync", "fetch"),
    "The shell": ("completion",),
}


def group(app: typer.Typer) -> None:
    """Put each command under its heading; one that is under none stands first."""
    headings = {name: title for title, names in GROUPS.items() for name in names}
    for command in app.registered_commands:
        name = str(command.name or getattr(command.callback, "__name__", ""))
        command.rich_help_panel = headings.get(name.replace("_", "-"), command.rich_help_panel)
