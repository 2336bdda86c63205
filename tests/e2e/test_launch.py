"""The launchers themselves: accelerate launch, launch/train.sh, the demo."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from keepstep.run_folder.reader import RunFolder
from tests.helpers import launchers, unreadable
from tests.helpers.launchers import TIMEOUT, end, hear_signals, start, wait_until
from tests.helpers.ranks import ROOT
from tests.helpers.recipes import argv
from tests.helpers.waiting import wait_for


@pytest.fixture
def recipe(demo: Path, tmp_path: Path) -> Path:
    """The demo's short recipe as a file."""
    flags = argv(demo, tmp_path / "run", save_steps=6, eval_steps=6)
    pairs = zip(flags[::2], flags[1::2], strict=True)
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{name[2:]}: {value}\n" for name, value in pairs))
    return path


@pytest.mark.long  # as test_api does with a script
def test_accelerate_launch(recipe: Path, tmp_path: Path) -> None:
    command = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu_zero3.yaml"]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += ["-m", "keepstep.train", "--config", str(recipe), "--max_steps", "6"]
    code, output = end(start(command, tmp_path / "log"), tmp_path / "log")
    assert code == 0, output
    assert "Finished: 6 steps." in output
    assert [c.step for c in RunFolder(tmp_path / "run").checkpoints()] == [6]


def test_train_sh_stops_on_request_and_carries_on(recipe: Path, tmp_path: Path) -> None:
    log, command = tmp_path / "log", ["launch/train.sh", str(recipe)]
    process = start(command, log, env=launchers.faults(tmp_path / "faults", hold=2))
    wait_until(log, "step  2/12  loss", process)
    process.send_signal(signal.SIGTERM)
    code, output = end(process, log)
    assert code == 75, output
    assert "Stopped on request (SIGTERM to rank 0, SIGTERM to rank 1)" in output
    assert "Traceback" not in output
    assert json.loads((tmp_path / "run/.keepstep/status.json").read_text())["exit"] == 75

    code, output = end(start(command, log), log)
    assert code == 0, output
    assert "+ accelerate-launch --config_file" in output.splitlines()[0]
    assert "carrying on from checkpoint-" in output
    assert "Finished: 12 steps." in output


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """In rank order."""
    found = psutil.Process(process.pid).children(recursive=True)
    ranks = [p for p in found if "-m keepstep.train" in " ".join(p.cmdline()[:4])]
    return sorted((p for p in ranks if "RANK" in p.environ()), key=lambda p: p.environ()["RANK"])


def test_train_sh_when_a_rank_is_killed(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(["launch/train.sh", str(recipe), "--max_steps", "10000"], log)
    wait_until(log, "step     2/10000  loss", process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].kill()
    code, output = end(process, log)
    assert code == 70, output
    assert not psutil.wait_procs(ranks, TIMEOUT)[1], "a rank is left"
    assert json.loads((tmp_path / "run/.keepstep/status.json").read_text())["outcome"] == "failed"
    assert "torch.distributed.elastic.multiprocessing.errors.ChildFailedError" in output
    culprit = (
        f"keepstep: rank 1 (process {ranks[1].pid}) was ended by signal 9, SIGKILL: by hand, or"
    )
    assert output.splitlines()[-1].startswith(culprit)


def test_train_sh_when_its_terminal_is_closed(recipe: Path, tmp_path: Path) -> None:
    """A window that is closed, a lost connection: HUP, and then nothing can be written."""
    pid, terminal = pty.fork()
    if pid == 0:
        launchers.hear_signals()
        os.chdir(ROOT)
        os.execv("launch/train.sh", ["launch/train.sh", str(recipe), "--max_steps", "10000"])
    launchers.watch(pid)
    events, told = tmp_path / "run/.keepstep/events.jsonl", b""
    while not (events.exists() and '"event": "training"' in events.read_text()):
        told += os.read(terminal, 10**6)
    os.close(terminal)
    assert psutil.Process(pid).wait(TIMEOUT) == 75, told
    status = json.loads((tmp_path / "run/.keepstep/status.json").read_text())
    assert (status["outcome"], status["exit"]) == ("preempted", 75)
    assert "SIGTERM to rank 0" in status["reason"]  # train.sh has passed it on
    assert RunFolder(tmp_path / "run").checkpoints()[-1].step == status["global_step"]


@pytest.mark.parametrize("importing", ["the launcher", "the ranks"])
def test_train_sh_interrupted_while_it_imports(
    recipe: Path, tmp_path: Path, importing: str
) -> None:
    """Nothing has begun: there is nothing to save, and nothing has failed."""
    log = tmp_path / "log"
    process = start(["launch/train.sh", str(recipe)], log)
    deadline = time.monotonic() + TIMEOUT
    seen = launcher_of if importing == "the launcher" else ranks_of
    while True:
        assert time.monotonic() < deadline
        with contextlib.suppress(psutil.NoSuchProcess):  # helpers of the script come and go
            if seen(process):
                break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, output = end(process, log)
    assert code == 75, output
    assert "Traceback" not in output
    status = tmp_path / "run/.keepstep/status.json"
    assert not status.exists() or json.loads(status.read_text())["outcome"] == "preempted"
    assert RunFolder(tmp_path / "run").checkpoints() == []


# The script has no processor for a second between the launcher's start and the next command; the
# launcher hears of a stop as ranks do.
SLOW_SCRIPT = """
set -T
trap '[[ $BASH_COMMAND != "launcher=\\$! launched="* ]] || sleep 1' DEBUG
"""
HASTY_LAUNCHER = """#!/bin/sh
trap 'exit 1' TERM
kill -%s "$PPID"
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_train_sh_asked_to_stop_in_the_moment_of_a_launch(tmp_path: Path, name: str) -> None:
    launcher = tmp_path / "accelerate-launch"
    launcher.write_text(HASTY_LAUNCHER % name)
    launcher.chmod(0o755)
    (tmp_path / "slow").write_text(SLOW_SCRIPT)
    ended = subprocess.run(
        ["launch/train.sh", RECIPE],
        cwd=ROOT,
        env=os.environ
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BASH_ENV": str(tmp_path / "slow")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        preexec_fn=launchers.hear_signals,
    )
    assert ended.returncode == 75, ended.stderr
    assert "stopped before the run began; run the same command again" in ended.stderr


def launcher_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children()
    return [p for p in found if "accelerate" in " ".join(p.cmdline()[:2])]


def test_train_sh_interrupted_twice(recipe: Path, tmp_path: Path) -> None:
    """Once is a stop, which waits for a rank that has stopped answering; twice is now."""
    log = tmp_path / "log"
    process = start(["launch/train.sh", str(recipe), "--max_steps", "10000"], log)
    wait_until(log, "step     2/10000  loss", process)
    ranks = ranks_of(process)
    ranks[1].suspend()
    process.send_signal(signal.SIGINT)
    wait_until(log, "Ctrl-C again ends at once", process)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, output = end(process, log)
    assert code == 70, output
    assert not psutil.wait_procs(ranks, TIMEOUT)[1], "a rank is left"
    assert output.endswith("keepstep: ended at once; the same command goes on from the last save\n")
    assert "Traceback" not in output


def test_train_sh_with_a_bad_recipe(recipe: Path, tmp_path: Path) -> None:
    command = ["launch/train.sh", str(recipe), "--dataset_name", "nowhere.jsonl", "--max_step", "1"]
    code, output = end(start(command, tmp_path / "log"), tmp_path / "log")
    assert code == 2, output
    assert output.splitlines()[1:] == [
        "keepstep: the recipe has 2 problems:",
        "  - unknown flag --max_step [field]",
        "    Hint: did you mean `max_steps`?",
        "  - dataset_name: there is no nowhere.jsonl [data]",
    ]


def refused(*argv: str, **env: str | None) -> str:
    """What launch/train.sh says before anything is imported, with exit status 2."""
    with tempfile.TemporaryDirectory() as made:
        trap, told = Path(made, "torch.py"), Path(made, "imported")
        trap.write_text(f"open({str(told)!r}, 'w').close()")
        environment = {**os.environ, "PYTHONPATH": made, **env}
        ended = subprocess.run(
            ["launch/train.sh", *argv],
            cwd=ROOT,
            env={n: v for n, v in environment.items() if v is not None},
            capture_output=True,
            text=True,
        )
        assert not told.exists(), "an import of torch"
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    return ended.stderr


RECIPE = "launch/recipes/demo.yaml"


@pytest.mark.parametrize(
    ("argv", "env", "told"),
    [
        (["no.yaml"], {}, "there is no recipe no.yaml\n    Hint: launch/recipes has some"),
        (["launch"], {}, "there is no recipe launch\n"),
        ([RECIPE, "--hub_token", "x"], {}, "--hub_token would stand in the process list"),
        ([RECIPE], {"KEEPSTEP_CONFIG": "zero4"}, "KEEPSTEP_CONFIG: zero4 is neither a file nor"),
        ([RECIPE], {"KEEPSTEP_CONFIG": "zero4"}, "Hint: cpu_zero2 cpu_zero3 ddp zero1 zero2"),
        ([RECIPE], {"KEEPSTEP_PROCESSES": "two"}, "KEEPSTEP_PROCESSES: two is no number"),
        ([RECIPE], {"KEEPSTEP_PROCESSES": "0"}, "KEEPSTEP_PROCESSES: 0 is no number"),
        ([RECIPE], {"PATH": "/usr/bin:/bin"}, "keepstep's environment is not activated\n    Hint:"),
    ],
)
def test_train_sh_refuses_at_once(argv: list[str], env: dict[str, str], told: str) -> None:
    assert told in refused(*argv, **env)


def test_train_sh_in_another_environment(tmp_path: Path) -> None:
    """Its accelerate is found, and keepstep is not installed there."""
    for name in ("accelerate-launch", "python"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    told = refused(RECIPE, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (
        f"{tmp_path}/accelerate-launch is of an environment without keepstep\n    Hint: source"
        in told
    )


def test_train_sh_before_deepspeed_has_been_compiled(tmp_path: Path) -> None:
    """What that takes is looked for; what is there already needs none of it."""
    nowhere = str(tmp_path / "extensions")
    missing = {
        "TORCH_EXTENSIONS_DIR": nowhere,
        "CUDA_VISIBLE_DEVICES": "",
        "CXX": "no-such-g++ -O2",
    }
    told = refused(RECIPE, **missing)
    assert "no compiler, and DeepSpeed compiles a part of itself on CPU: no-such-g++ (g++)" in told
    assert "Hint: apt-get install g++; or without DeepSpeed: KEEPSTEP_CONFIG=ddp" in told
    told = refused(RECIPE, **(missing | {"TORCH_EXTENSIONS_DIR": "/proc/nowhere"}))
    assert "nothing can be written in TORCH_EXTENSIONS_DIR, /proc/nowhere" in told
    command = ["launch/train.sh", RECIPE]
    for built, says in ((False, True), (True, False)):
        environment = {**os.environ, **missing, "KEEPSTEP_LAUNCH_ARGS": "--no_such_flag"}
        environment["CXX"] = "no-such-g++" if built else "c++"
        if built:
            (tmp_path / "extensions/deepspeed_shm_comm").mkdir()
            (tmp_path / "extensions/deepspeed_shm_comm/x.so").touch()
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ended.returncode == 70, ended.stderr
        assert ("compiling a part of DeepSpeed, once" in ended.stdout) == says


@pytest.mark.parametrize("more", [[], ["--retries", "1"]])
def test_train_sh_where_no_temporary_file_can_be_written(more: list[str]) -> None:
    """As in a container whose root file system is read-only."""
    told = refused(RECIPE, *more, TMPDIR="/proc")
    assert "nothing can be written in TMPDIR, /proc, the folder for temporary files" in told
    assert "Hint: export TMPDIR=FOLDER; in a pod: mount an emptyDir at /tmp" in told


def test_train_sh_where_a_node_of_a_job_has_a_full_disk(tmp_path: Path) -> None:
    """No fault of the recipe: the job tries again, maybe on others."""
    environment = {**os.environ, "TMPDIR": "/proc", "KEEPSTEP_EXIT_FILE": str(tmp_path / "exit")}
    command = ["launch/train.sh", RECIPE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 70, done.stderr
    assert (tmp_path / "exit").read_text() == "70\n"


PREFLIGHT = """
set -eu
root=/nowhere prefix=$1 headers=/nowhere config=accelerate_configs/ddp.yaml
unset TORCH_EXTENSIONS_DIR
source launch/preflight.sh
check_extensions
echo "$TORCH_EXTENSIONS_DIR"
"""


def test_an_environment_that_is_somebody_elses(tmp_path: Path) -> None:
    """What is compiled lies in one's own cache then, apart for each environment."""
    command = ["bash", "-c", PREFLIGHT, "-"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    theirs = [
        subprocess.check_output([*command, prefix], cwd=ROOT, env=environment, text=True).strip()
        for prefix in ("/proc", "/sys", str(tmp_path))  # where root cannot write, either
    ]
    assert theirs[0].startswith(f"{tmp_path}/keepstep/torch_extensions-")
    assert theirs[0] != theirs[1]
    assert theirs[2] == f"{tmp_path}/torch_extensions"


OLD_PYTHON = """#!/bin/sh
case "$1 $2" in
  "--version "*) echo "Python 3.10.12" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *) exit 1 ;;
esac
"""


def test_make_install_says_what_it_needs(tmp_path: Path) -> None:
    """And keeps no environment that another Python has made, or that has no pip."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.10"
    old.write_text(OLD_PYTHON)
    old.chmod(0o755)
    subprocess.run([old, "-m", "venv", ".venv"], cwd=tmp_path, check=True)
    command = ["make", "install", f"PYTHON={old}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert f"keepstep needs Python 3.11 or newer, and {old} is Python 3.10.12" in ended.stderr
    assert "make install PYTHON=python3.11" in ended.stderr
    assert not (tmp_path / ".venv").exists()


def test_train_sh_shows_the_launchers_error_when_the_run_says_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["launch/train.sh", RECIPE],
        cwd=ROOT,
        env={**os.environ, "KEEPSTEP_LAUNCH_ARGS": "--no_such_flag"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 70
    assert "--no_such_flag" in output.splitlines()[-1]


LAUNCHER = """#!/bin/sh
cat > "$KEEPSTEP_STATUS_FILE" <<'EOF'
{"outcome": "failed", "reason": %s, "exit": 70}
EOF
echo 'W1126 17:00:00.000 7 torch/distributed/elastic/multiprocessing/api.py:1010] closing' >&2
echo '  rank      : 1 (local_rank: 1)' >&2
echo '  exitcode  : %s (pid: 77)' >&2
echo '====' >&2
exit 1
"""


@pytest.mark.parametrize(
    ("reason", "exitcode", "last"),
    [
        (
            "checkpoint-4 was not saved: no\n\x1b[2Jroom",
            70,
            "checkpoint-4 was not saved: no [2Jroom",
        ),
        ("é\ud800" + "x" * 5000, 70, "é " + "x" * 100),
        ("rank 0 on n2 stood still", -9, "rank 0 on n2 stood still"),
        ("rank 1 on n1 gave no sign of life", -9, "rank 1 (process 77) was ended by signal 9"),
        (None, 70, None),
    ],
)
def test_the_runs_own_word_comes_after_the_launchers(
    tmp_path: Path, reason: str | None, exitcode: int, last: str | None
) -> None:
    """A launcher that reports as torch's does; what it started has left this status."""
    launcher = tmp_path / "accelerate-launch"
    launcher.write_text(LAUNCHER % (json.dumps(reason), exitcode))
    launcher.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["launch/train.sh", RECIPE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert ended.returncode == 70
    told = ended.stderr.splitlines()[-1]
    assert told.startswith("====" if last is None else f"keepstep: {last}"), ended.stderr
    assert len(told) < 330


def test_a_lock_that_a_killed_run_has_left(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch waits for it for ever. (Two ranks, no launch script, as of whoever has a script.)"""
    compiled = tmp_path / "extensions"
    passing = shutil.ignore_patterns("lock")  # of a run beside this one
    shutil.copytree(os.environ["TORCH_EXTENSIONS_DIR"], compiled, ignore=passing)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled))
    (left,) = compiled.glob("deepspeed_shm_comm")
    (left / "lock").touch()
    log = tmp_path / "log"
    command = ["accelerate-launch", "--config_file", "accelerate_configs/cpu_zero2.yaml"]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += ["-m", "keepstep.train", "--config", str(recipe), "--max_steps", "1"]
    code, said = end(start(command, log), log)
    assert code == 0, said
    assert not (left / "lock").exists()


def test_a_launcher_goes_with_its_script(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL to launch/train.sh: the launcher hears of it, and the ranks save."""
    log = tmp_path / "log"
    process = start(["launch/train.sh", str(recipe), "--max_steps", "10000"], log)
    wait_until(log, "step     2/10000  loss", process)
    ranks = ranks_of(process)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT)
    assert not alive
    status = json.loads((tmp_path / "run/.keepstep/status.json").read_text())
    assert status["outcome"] == "preempted"
    assert RunFolder(tmp_path / "run").checkpoints()[-1].step == status["global_step"]


def test_ranks_go_with_their_launcher(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL to `accelerate launch`: the ranks save, and end."""
    log = tmp_path / "log"
    process = start(["launch/train.sh", str(recipe), "--max_steps", "10000"], log)
    wait_until(log, "step     2/10000  loss", process)
    ranks = ranks_of(process)
    ranks[0].parent().kill()
    _, alive = psutil.wait_procs(ranks, timeout=TIMEOUT)
    assert not alive
    # (The kernel sends it when the launcher's first thread ends: others may still be there then.)
    assert re.search(r"SIGTERM( \(its launcher is gone\))? to rank 0", log.read_text())
    status = json.loads((tmp_path / "run/.keepstep/status.json").read_text())
    assert status["outcome"] == "preempted"
    end(process, log)


@pytest.mark.long  # of what it shows, each part has a test of its own
def test_the_demo(tmp_path: Path) -> None:
    """What `make demo` runs: a finished run whose best is not its last, a killed one carried on."""
    for folder in ("launch", "accelerate_configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    log = tmp_path / "log"
    code, output = end(start(["launch/demo.sh"], log, cwd=tmp_path), log, timeout=420)
    assert code == 0, output
    assert re.search(
        r"keepstep: the launcher \(process \d+\) was ended by signal 9, SIGKILL", output
    )
    assert "train.sh: line" not in output, "bash's own word about a job that was killed"
    kept = RunFolder(tmp_path / "runs/demo").checkpoints()
    assert len(kept) == 3
    assert kept[-1].step == 160
    best = min(kept, key=lambda c: c.manifest.metrics["eval_loss"])
    assert best.step != 160
    assert os.readlink(tmp_path / "runs/demo/best") == best.path.name
    assert "carrying on from checkpoint-" in output
    interrupted = RunFolder(tmp_path / "runs/demo-interrupted").checkpoints()
    assert (interrupted[-1].step, interrupted[-1].manifest.attempt) == (60, 2)


@pytest.fixture
def poisoned(recipe: Path, demo: Path, tmp_path: Path) -> Path:
    """The same recipe, with a model that cannot read one row."""
    fields = dict(line.split(": ", 1) for line in recipe.read_text().splitlines())
    fields |= {name: str(value) for name, value in unreadable.make(demo, tmp_path).items()}
    fields |= {"on_nonfinite": "rewind"}
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    return recipe


def test_train_sh_goes_back_by_itself(poisoned: Path, tmp_path: Path) -> None:
    code, output = end(
        start(["launch/train.sh", str(poisoned)], tmp_path / "log"), tmp_path / "log"
    )
    assert code == 0, output
    assert output.count("keepstep: going back: the same command again") == 1
    assert "of the training set: left out from here on" in output.split("Going back: ")[1]
    assert "Run the same command again" not in output
    assert "Finished: 12 steps." in output
    run = RunFolder(tmp_path / "run")
    assert [attempt.outcome for attempt in run.attempts()] == ["rewound", "finished"]
    assert unreadable.ROW in run.checkpoints()[-1].manifest.dealt["skipped"]


@pytest.mark.long
@pytest.mark.parametrize("at", ["Going back: the loss", "keepstep: going back: the same command"])
def test_train_sh_stopped_when_it_goes_back(poisoned: Path, tmp_path: Path, at: str) -> None:
    """While the attempt ends, or when the next one begins: it is not launched, or stops at once."""
    log = tmp_path / "log"
    process = start(["launch/train.sh", str(poisoned)], log)
    wait_until(log, at, process)
    process.send_signal(signal.SIGTERM)
    code, output = end(process, log)
    assert code == 75, output
    assert "Traceback" not in output
    assert "Finished" not in output
    code, output = end(start(["launch/train.sh", str(poisoned)], log), log)
    assert code == 0, output
    assert "Finished: 12 steps." in output


def test_who_was_killed_is_why_it_is_not_launched_again(tmp_path: Path) -> None:
    """Also the main process, which tells nothing any more."""
    launcher = tmp_path / "accelerate-launch"
    launcher.write_text("\n".join(LAUNCHER.splitlines()[:1] + LAUNCHER.splitlines()[4:]) % -9)
    launcher.chmod(0o755)
    ended = subprocess.run(
        ["launch/train.sh", RECIPE, "--retries", "0", "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert ended.returncode == 76, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("keepstep: not launched again: "), ended.stderr
    assert "rank 1 (process 77) was ended by signal 9, SIGKILL" in last


@pytest.mark.parametrize("flags", [[], ["--retries", "3"], ["--nnodes", "1"]])
def test_a_stop_before_the_run_has_begun_is_told_once(tmp_path: Path, flags: list[str]) -> None:
    launcher = tmp_path / "accelerate-launch"
    launcher.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nexec sleep 300\n")
    launcher.chmod(0o755)
    process = subprocess.Popen(
        ["launch/train.sh", RECIPE, *flags, "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    wait_for((tmp_path / "begun").exists, process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, told
    assert told.count("stopped before the run began") == 1, told
