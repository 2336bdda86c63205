"""`keepstep init | config | launch | submit` from a checkout; e2e/test_wheel.py has a wheel."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from keepstep.cli.main import app
from tests.helpers.ranks import ROOT
from tests.helpers.waiting import PATIENCE

runner = CliRunner()


def keepstep(
    *argv: str, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: it becomes another program."""
    command = [sys.executable, "-c", "from keepstep.cli.main import main; main()", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **(env or {})}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize("template", ["lora", "full", "qwen3-8b-long", "llama-70b-full"])
def test_init_writes_a_recipe_and_says_the_next_command(tmp_path: Path, template: str) -> None:
    folder = tmp_path / "my run"
    done = runner.invoke(app, ["init", str(folder), "--template", template])
    assert done.exit_code == 0, done.output
    text = (folder / "recipe.yaml").read_text()
    assert text == (ROOT / f"launch/recipes/{template}.yaml").read_text()
    assert f"cd {shlex.quote(str(folder))} && keepstep launch recipe.yaml" in done.stdout
    again = runner.invoke(app, ["init", str(folder), "--template", "demo"])
    assert again.exit_code == 2
    assert f"{folder}/recipe.yaml is there already, and is left as it is" in again.stdout
    assert (folder / "recipe.yaml").read_text() == text
    assert not (folder / ".demo").exists()


def test_init_goes_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").symlink_to(tmp_path / "elsewhere")
    assert runner.invoke(app, ["init", str(tmp_path)]).exit_code == 2
    assert not (tmp_path / "elsewhere").exists()


def test_init_where_a_file_is() -> None:
    done = runner.invoke(app, ["init", str(ROOT / "LICENSE")])
    assert done.exit_code in (1, 2)
    assert done.stdout.startswith("keepstep: ")


def test_config() -> None:
    names = runner.invoke(app, ["config"]).stdout.split()
    assert names == [
        *sorted(p.stem for p in ROOT.glob("accelerate_configs/*.yaml")),
        "site.env",
        "keepstep@.service",
    ]
    for name in names[:-2]:
        path = Path(runner.invoke(app, ["config", name]).stdout.strip())
        assert path == ROOT / f"accelerate_configs/{name}.yaml"
        assert yaml.safe_load(path.read_text())["compute_environment"] == "LOCAL_MACHINE"
    done = runner.invoke(app, ["config", "zero9"])
    assert done.exit_code == 2
    assert "zero2, zero3, zero3_offload, zero3_sp8, site.env" in done.stdout + done.stderr


def test_nothing_of_a_path_is_printed_where_there_is_none() -> None:
    """`--config_file "$(keepstep config zero9)"`: the launcher would take the words for a file."""
    assert runner.invoke(app, ["config", "zero9"]).stdout == ""


BASH = """#!/bin/sh
printf '%s\\n' "$@" "${DS_ACCELERATOR-unset}" "$KEEPSTEP_CALLED_AS"
grep SigIgn /proc/self/status
exit 75
"""


@pytest.mark.parametrize(
    ("command", "script"), [("launch", "launch/train.sh"), ("submit", "slurm/submit.sh")]
)
def test_it_becomes_the_script(tmp_path: Path, command: str, script: str) -> None:
    """Every argument as it is, the environment, the signals, the exit status."""
    (tmp_path / "bash").write_text(BASH)
    (tmp_path / "bash").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"DS_ACCELERATOR": "cuda"}
    argv = ["recipe.yaml", "--seed", "-1", "--learning-rate=1", "-v", "a b", "--", "--help"]
    # This environment's own commands come first in PATH, and there is no bash among them.
    done = keepstep(command, *argv, env=env)
    assert done.returncode == 75, done.stderr
    *told, accelerator, called_as, ignored = done.stdout.splitlines()
    assert told == [str(ROOT / script), *argv]
    assert (accelerator, called_as) == ("cuda", f"keepstep {command}")
    assert not int(ignored.split()[1], 16) & 1 << 12, "SIGPIPE"


def test_what_is_launched_chooses_its_own_accelerator(tmp_path: Path) -> None:
    """The commands that look set one for themselves."""
    (tmp_path / "bash").write_text(BASH)
    (tmp_path / "bash").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = [sys.executable, "-c", "from keepstep.cli.main import main; main()"]
    done = subprocess.run(
        [*command, "launch", "r.yaml"],
        env={**environment, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert "unset" in done.stdout.splitlines()


def test_a_recipe_that_is_not_there() -> None:
    done = keepstep("launch", "nowhere.yaml")
    assert done.returncode == 2
    assert "there is no recipe nowhere.yaml" in done.stderr
    assert "keepstep init writes one" in done.stderr
    done = keepstep("submit", "nowhere.yaml", env={"XDG_CONFIG_HOME": "/nowhere"})
    assert done.returncode == 2
    assert "there is no recipe nowhere.yaml" in done.stderr


@pytest.mark.parametrize("at", ["KEEPSTEP_SITE", "XDG_CONFIG_HOME", "HOME"])
def test_a_site_that_calls_exit(tmp_path: Path, at: str) -> None:
    """It is told, wherever the site's settings lie; nothing was said before."""
    place = {"KEEPSTEP_SITE": "site.env", "HOME": ".config/keepstep/site.env"}
    site = tmp_path / place.get(at, "keepstep/site.env")
    site.parent.mkdir(parents=True, exist_ok=True)
    site.write_text("here=/x\nexit 0\n")
    kept = {k: v for k, v in os.environ.items() if k not in ("XDG_CONFIG_HOME", "KEEPSTEP_SITE")}
    done = subprocess.run(
        [ROOT / "slurm/submit.sh", "recipe.yaml"],
        env={**kept, at: str(site if at == "KEEPSTEP_SITE" else tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"keepstep: {site} has called exit" in done.stderr
