"""What Tab offers, by the real shells; headings of the help; Ctrl-C ahead of everything."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepstep.cli.groups import GROUPS
from keepstep.cli.main import app
from tests.cli.test_help import COMMANDS
from tests.helpers.folders import commit, identify
from tests.helpers.waiting import PATIENCE

runner = CliRunner()
HERE = {"bash", *(shell for shell in ("zsh", "fish") if shutil.which(shell))}


def script(shell: str) -> str:
    done = runner.invoke(app, ["completion", shell])
    assert done.exit_code == 0
    return done.stdout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two runs, one with a name that shells take apart, and the command in PATH."""
    for name in ("a run", "other"):
        run = identify(tmp_path / "runs" / name, limit=3, ranking="metric", metric="eval_loss")
        for step in (10, 200):
            commit(run, step, metrics={"eval_loss": 1 / step})
        (run / "best").symlink_to("checkpoint-200")
    (tmp_path / "src").mkdir()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/keepstep"
    command.write_text(
        f"#!{sys.executable}\nimport keepstep.cli as c\nc.command()\n", encoding="utf-8"
    )
    command.chmod(0o755)
    for shell in HERE:
        (tmp_path / f"script.{shell}").write_text(script(shell))
    return tmp_path


def asked(place: Path, shell: str, program: str) -> list[str]:
    environment = {**os.environ, "PATH": f"{place}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        [shell, *(["-f"] if shell == "zsh" else []), "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        cwd=place,
        env=environment,
        timeout=PATIENCE,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def in_bash(place: Path, *words: str) -> list[str]:
    """What bash would offer for the last word."""
    line = " ".join(map(shlex.quote, words[:-1])) + f" {words[-1]}"
    quoted = " ".join(shlex.quote(word) for word in words)
    return asked(
        place,
        "bash",
        f"""
        compopt() {{ :; }}  # there is no line that is edited
        source script.bash
        complete -p keepstep >/dev/null || exit 1
        COMP_LINE={shlex.quote(line)} COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        _keepstep_completion keepstep
        printf '%s\\n' "${{COMPREPLY[@]}}"
        """,
    )


def test_bash(place: Path) -> None:
    assert set(in_bash(place, "keepstep", "")) == set(COMMANDS)
    assert in_bash(place, "keepstep", "verify", "--de") == ["--deep"]
    assert in_bash(place, "keepstep", "ls", "") == ["runs"]
    assert in_bash(place, "keepstep", "ls", "runs/") == ["runs/a run", "runs/other"]
    assert in_bash(place, "keepstep", "pin", "runs/other", "2") == ["200"]
    of_run = [f"runs/other/{name}" for name in ("checkpoint-10", "checkpoint-200", "best")]
    assert in_bash(place, "keepstep", "export", "runs/other/") == of_run
    assert "never" in in_bash(place, "keepstep", "which", "runs/other", "")
    assert in_bash(place, "keepstep", "status", "--field", "outc") == ["outcome"]
    assert in_bash(place, "keepstep", "ls", "nowhere/") == [""]


@pytest.mark.skipif("zsh" not in HERE, reason="there is no zsh")
def test_zsh(place: Path) -> None:
    told = asked(
        place,
        "zsh",
        """
        compdef() { :; }
        _arguments() { print -r -- "$@"; }
        source ./script.zsh
        words=(keepstep pin runs/other 2) CURRENT=4
        _keepstep_completion
        """,
    )
    assert told == ['*: :(("200"))']


@pytest.mark.skipif("fish" not in HERE, reason="there is no fish")
def test_fish(place: Path) -> None:
    told = asked(place, "fish", "source script.fish; complete -C 'keepstep pin runs/other 2'")
    assert told == ["200"]


def test_every_command_has_a_heading() -> None:
    """A new one: src/keepstep/cli/groups.py."""
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(set(named))
    assert set(COMMANDS) <= set(named)
    told = runner.invoke(app, ["--help"]).stdout
    assert all(f"─ {title} ─" in told for title in GROUPS)


def test_ctrl_c_while_it_is_imported(tmp_path: Path) -> None:
    program = """if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job behind & ignores it
        class Slow:
            def find_spec(self, name, *more):
                if name == "keepstep.cli.main":
                    os.kill(os.getpid(), signal.SIGINT)
        import keepstep.cli as cli
        sys.meta_path.insert(0, Slow())
        cli.command()
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_wrong_places_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    run = identify(tmp_path / "run", limit=3, ranking="metric", metric="eval_loss")
    commit(run, 10, metrics={"eval_loss": 1.0})
    for command in ("ls", "status", "which", "verify", "goodput", "show", "log", "samples"):
        told = runner.invoke(app, [command, "file"])
        assert (told.exit_code, told.stdout.splitlines()[0]) == (
            2,
            "keepstep: file is a file, not a folder",
        )
        told = runner.invoke(app, [command, "nowhere"])
        assert told.exit_code == 2
        assert f"the path is relative to {tmp_path}" in told.stdout
    told = runner.invoke(app, ["reshard", "run", "--to", "x", "--num_processes", "1"])
    assert told.stdout.splitlines()[-2:] == [  # DeepSpeed may say that it has found no GPU
        "keepstep: run is a run: name a checkpoint of it",
        "    Hint: it has checkpoint-10",
    ]
    told = runner.invoke(app, ["init", "file"])
    assert told.stdout.startswith("keepstep: file is a file, not a folder\n")
