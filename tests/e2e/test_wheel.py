"""Somebody installs the wheel, and has no checkout: a recipe, a launch, a kill, the same again."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import launchers
from tests.helpers.launchers import end, wait_until
from tests.helpers.ranks import ROOT

# What of the launchers' folders is for the checkout alone: the demo's script, other examples.
NOT_PACKAGED: tuple[str, ...] = ("launch/demo.sh", "launch/examples/checkpoint_demo.py")
NOT_PACKAGED += ("launch/examples/retention_story.py", "launch/smollm2.sh")
NOT_PACKAGED += ("launch/examples/smollm2.py", "launch/examples/smollm2.txt")
EXTENSIONS = os.environ["TORCH_EXTENSIONS_DIR"]  # tests/conftest.py sets it
ACCELERATE = """#!{python}
from accelerate.commands.launch import main
main()
"""


def tracked(*folders: str) -> set[str]:
    """The repository's own files in these folders, also those that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.check_output(command, cwd=ROOT, text=True)
    return set(listed.splitlines())


@pytest.fixture(scope="module")
def built(workspace: Path) -> Path:
    """A folder with the wheel, and with the source archive that it may be built from as well."""
    python, out = sys.executable, workspace / "built"
    if importlib.util.find_spec("hatchling") is None:
        venv.create(workspace / "builder", with_pip=True)
        python = str(workspace / "builder/bin/python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "hatchling"], check=True)
    command = [python, "-m", "hatchling", "build", "-d", str(out), "-t"]
    for target in ("wheel", "sdist"):
        subprocess.run([*command, target], cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, workspace: Path) -> Path:
    """A fresh environment's folder of commands: the wheel, and the libraries of this one."""
    folder = workspace / "installed"
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    python = folder / "bin/python"
    (wheel,) = built.glob("*.whl")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([python, *pip, wheel], check=True, env=bare())
    # What pip makes of its entry point; the one beside the libraries has another Python.
    (folder / "bin/accelerate-launch").write_text(ACCELERATE.format(python=python))
    (folder / "bin/accelerate-launch").chmod(0o755)
    # What DeepSpeed has compiled for these libraries, in minutes: with the same ninja, and at the
    # same times, it stands.
    ninja, compiled = Path(sys.executable).with_name("ninja"), Path(EXTENSIONS)
    if ninja.exists():
        (folder / "bin/ninja").symlink_to(ninja)
    if compiled.is_dir():
        passing = shutil.ignore_patterns("lock")
        shutil.copytree(compiled, folder / "torch_extensions", ignore=passing)
    return folder / "bin"


def bare(**more: str) -> dict[str, str]:
    """An environment in which neither the checkout nor its own environment is found."""
    theirs = ("PYTHONPATH", "VIRTUAL_ENV", "TORCH_EXTENSIONS_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in theirs}
    kept["PATH"] = "/usr/local/bin:/usr/bin:/bin"
    return {**kept, "CUDA_VISIBLE_DEVICES": "", **more}


def keepstep(commands: Path, folder: Path, *argv: str) -> str:
    """What a command prints, in a folder that is outside of the checkout."""
    return subprocess.run(
        [commands / "keepstep", *argv],
        cwd=folder,
        env=bare(),
        capture_output=True,
        text=True,
        check=True,
        timeout=launchers.TIMEOUT,
    ).stdout


def test_what_the_wheel_holds(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        modes = {i.filename: i.external_attr >> 16 for i in archive.infolist()}
        entry = next(n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = archive.read(entry).decode()
    packaged = {name.removeprefix("keepstep/files/") for name in names if "/files/" in name}
    assert packaged == tracked("accelerate_configs", "launch", "slurm") - {*NOT_PACKAGED}
    own = {name.removeprefix("keepstep/") for name in names if "/files/" not in name}
    assert own == {name.removeprefix("src/keepstep/") for name in tracked("src/keepstep")}
    for script in ("launch/train.sh", "slurm/submit.sh", "slurm/node.sh"):
        assert modes[f"keepstep/files/{script}"] & 0o111, script
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_what_the_source_archive_holds(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert tracked() - names == set()
    assert names - tracked() == {"PKG-INFO"}


def test_the_wheel_carries_on(installed: Path, tmp_path: Path) -> None:
    """A recipe, a launch that is killed, the same command again, and how it stands."""
    told = keepstep(installed, tmp_path, "init", "work", "--template", "demo")
    assert "cd work && keepstep launch recipe.yaml" in told
    work = tmp_path / "work"
    config = keepstep(installed, work, "config", "zero2").strip()
    assert Path(config).is_file()
    assert str(ROOT) not in config
    log, run = tmp_path / "log", work / "runs/demo"
    fields: dict[str, Any] = {"max_steps": 40, "save_steps": 10, "eval_steps": 10}
    fields |= {"logging_steps": 1, "max_length": 64, "report_to": "none", "warmup_steps": 2}
    flags = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    command = [str(installed / "keepstep"), "launch", "recipe.yaml", *flags]

    def launch(**more: str) -> subprocess.Popen[bytes]:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=work,
                env=bare(KEEPSTEP_CONFIG="cpu_zero2", KEEPSTEP_PROCESSES="1", **more),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=launchers.hear_signals,
            )
        launchers.watch(process.pid)
        return process

    # Where checkpoint-20 was begun, checkpoint-10 has been saved.
    process = launch(**launchers.faults(tmp_path / "faults", hold=35))
    wait_until(log, "saved checkpoint-10", process)
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # helpers of the script come and go
            if "-m keepstep.train" in " ".join(one.cmdline()[:4]):
                one.kill()
    code, output = end(process, log)
    assert code == 70, output
    standing = json.loads(
        subprocess.run(
            [installed / "keepstep", "status", run, "--json"], env=bare(), stdout=subprocess.PIPE
        ).stdout
    )
    assert (standing["state"], standing["outcome"]) == ("killed", None)
    assert standing["newest"] in (10, 20, 30)

    code, output = end(launch(), log)
    assert code == 0, output
    assert re.search(r"^\+ accelerate-launch --config_file \S+/files/accelerate_configs", output)
    assert f"carrying on from checkpoint-{standing['newest']}" in output
    assert str(ROOT) not in output
    assert keepstep(installed, work, "status", str(run), "--field", "outcome") == "finished\n"
    assert keepstep(installed, work, "status", str(run), "--field", "step") == "40\n"
    assert "every byte compared" in keepstep(installed, work, "verify", "--deep", str(run))


@pytest.mark.long
def test_the_wheel_submits(installed: Path, tmp_path: Path) -> None:
    """All files of the job are found: a fake sbatch takes it."""
    keepstep(installed, tmp_path, "init", "--template", "demo")
    site = tmp_path / "config/keepstep/site.env"
    site.parent.mkdir(parents=True)
    example = keepstep(installed, tmp_path, "config", "site.env").strip()
    site.write_text(Path(example).read_text() + "SITE_SBATCH=(--partition=mine)\n")
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$ARGV"\nenv >>"$ARGV"\necho 12\n')
    sbatch.chmod(0o755)
    env = bare(XDG_CONFIG_HOME=str(tmp_path / "config"), ARGV=str(tmp_path / "argv"))
    env["PATH"] = f"{sbatch.parent}:{env['PATH']}"
    done = subprocess.run(
        [installed / "keepstep", "submit", "recipe.yaml", "--nodes", "2"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Job 12 trains" in done.stdout
    job = tmp_path / "runs/demo/.keepstep/job"
    given = (tmp_path / "argv").read_text().splitlines()
    assert "--partition=mine" in given
    assert not [line for line in given if line.startswith("KEEPSTEP_CALLED_AS")]
    scripts = {"train.sbatch", "settings.sh", "node.sh", "next_step.py"}
    scripts |= {path.name for path in ROOT.glob("slurm/*.py")}
    scripts |= {"train.sh", "preflight.sh", "accelerate.yaml", "recipe.yaml", "job.env", "site.env"}
    assert scripts <= {path.name for path in job.iterdir()}
    assert os.access(job / "train.sh", os.X_OK)
    known = re.sub(r"['\\\\]", "", (job / "job.env").read_text())
    assert "keepstep submit recipe.yaml --nodes 2" in known
    assert (job / "git.txt").read_text().startswith("no git: keepstep 0.")


@pytest.mark.long
def test_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    """Nothing but what the wheel asks for, of the tested versions; torch and all."""
    venv.create(tmp_path / "fresh", with_pip=True)
    commands = tmp_path / "fresh/bin"
    (wheel,) = built.glob("*.whl")
    pip = ["-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([commands / "python", *pip, wheel], check=True, env=bare(), timeout=1800)
    keepstep(commands, tmp_path, "init", "--template", "demo")
    flags = ["--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--report_to", "none"]
    subprocess.run(
        [commands / "keepstep", "launch", "recipe.yaml", *flags],
        cwd=tmp_path,
        env=bare(KEEPSTEP_CONFIG="cpu_zero3"),  # a part of DeepSpeed is compiled
        check=True,
        timeout=900,
    )
    assert keepstep(commands, tmp_path, "status", "runs/demo", "--field", "outcome") == "finished\n"
