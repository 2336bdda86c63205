"""What submit.sh submits, and what the batch script decides. No Slurm is needed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT
from tests.helpers.warm import Warm
from tests.slurm.helpers.cluster import SLURM_VARIABLE
from tests.slurm.helpers.fakes import Fakes
from tests.slurm.helpers.processes import wait_for

SCRIPTS = [ROOT / "slurm/train.sbatch", *sorted(ROOT.glob("slurm/*.sh"))]
SCRIPTS += sorted(ROOT.glob("launch/*.sh"))
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", script], check=True, cwd=ROOT)


# --- submit.sh


def submit(folder: Path, *flags: str, site: str = "", **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not SLURM_VARIABLE.match(k)}
    (folder / "site.env").write_text(site)
    return subprocess.run(
        [ROOT / "slurm/submit.sh", *flags],
        cwd=folder,
        env={**kept, "KEEPSTEP_SITE": str(folder / "site.env"), **env},
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture
def recipe(tmp_path: Path, demo: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {demo}/model\ndataset_name: {demo}/data/train.jsonl\n"
        f"output_dir: {tmp_path}/run\nmax_steps: 40\nsave_steps: 10\n"
    )
    return path


@pytest.mark.parametrize(
    ("name", "flags", "site"),
    [
        ("two-nodes", ["--nodes", "2"], ""),
        (
            "a-range-with-gpus",
            ["--nodes", "2-4", "--gpus-per-node", "8", "--time", "1-00:00:00"],
            "SITE_SBATCH=(--partition=gpu --account=mine)",
        ),
    ],
)
def test_dry_run(
    warm: Warm, tmp_path: Path, recipe: Path, name: str, flags: list[str], site: str
) -> None:
    """What stands above the script; `KEEPSTEP_GOLDEN=write` writes what is expected anew."""
    done = submit(
        tmp_path,
        str(recipe),
        *flags,
        "--dry-run",
        "--learning_rate",
        "1e-3",
        "--seed",
        "3",
        site=site,
        PATH=warm.path(),
    )
    assert done.returncode == 0, done.stderr
    places = {
        str(tmp_path): "/shared",
        str(Path(sys.executable).parent): "/env/bin",  # first: it may lie in the next one
        str(ROOT): "/keepstep",
    }
    text = done.stdout
    for place, told in places.items():
        text = text.replace(place, told)
    directives, _, body = text.partition("#\n# One run")
    assert (ROOT / "slurm/train.sbatch").read_text().endswith(body)
    file, text = GOLDEN / f"{name}.txt", directives
    if os.environ.get("KEEPSTEP_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()
    assert not (tmp_path / "run").exists(), "a dry run leaves nothing"
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "0"], "--nodes: 0 is neither N nor MIN-MAX"),
        (["--nodes", "3-2"], "--nodes: 3-2 is no range"),
        (["--nodes"], "--nodes needs a value"),
        (["--gpus-per-node", "x"], "--gpus-per-node: x is no number"),
        (["--time", "soon"], "--time: soon is no time limit of sbatch"),
        (["another.yaml"], "another.yaml: there is a recipe already"),
        (["--hub_token", "hf_secret"], "--hub_token would stand in files"),
        (["--max_step", "3"], "unknown flag --max_step"),
        (["--save_total_limit", "1"], "save_total_limit: 1 keeps the newest checkpoint only"),
    ],
)
def test_what_is_wrong_is_said(
    warm: Warm, tmp_path: Path, recipe: Path, flags: list[str], message: str
) -> None:
    done = submit(tmp_path, str(recipe), *flags, PATH=warm.path())
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


KEEPSTEP = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE/checked"
exec python -c 'import json, os, sys
words = [part for word in sys.argv for part in word.split("=")]
run = words[words.index("--output_dir") + 1] if "--output_dir" in words else ""
found = {"report": "", "output_dir": run or os.environ["RUN"], "hang_timeout": 9}
own = "NODE_LOCAL" in os.environ
print(json.dumps({**found, "node_local": own, "mirror": "s3://b/runs/x" if own else None}))' "$@"
"""
SBATCH = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$FAKE/argv"
printf '%s\\n' "$*" >>"$FAKE/submitted"
env -0 >"$FAKE/env"
[[ ! -e $FAKE/refuses ]] || { echo 'sbatch: error: invalid account' >&2; exit 1; }
echo '12;cluster'
"""


class Submission:
    """submit.sh against fakes of `keepstep check` and sbatch: what it hands on, in milliseconds."""

    def __init__(self, folder: Path, name: str = "run") -> None:
        self.folder, self.run = folder, folder / name
        for program, text in {
            "keepstep": KEEPSTEP,
            "sbatch": SBATCH,
            "squeue": "#!/bin/sh",
        }.items():
            path = folder / "bin" / program
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        (folder / "recipe.yaml").touch()

    def submit(self, *flags: str, site: str = "", **env: str) -> subprocess.CompletedProcess:
        env |= {"FAKE": str(self.folder), "RUN": str(self.run)}
        env["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return submit(self.folder, "recipe.yaml", *flags, site=site, **env)

    @property
    def argv(self) -> list[str]:
        return (self.folder / "argv").read_text().split("\0")[:-1]

    @property
    def checked(self) -> str:
        return (self.folder / "checked").read_text()

    def says(self, name: str) -> str:
        """What the job would know by that name."""
        script = f'source "$1/.keepstep/job/job.env" && printf %s "${{{name}}}"'
        return subprocess.check_output(["bash", "-c", script, "-", self.run], text=True)


@pytest.mark.parametrize(
    ("flags", "site", "gpus", "processes", "asked"),
    [
        (["--gpus-per-node=a100:8"], "", "8", "8", ["--gpus-per-node=a100:8"]),
        ([], "SITE_SBATCH=(--gres=gpu:2)", "2", "2", []),
        ([], "SITE_SBATCH=(--gres gpu:a100:4,lscratch:100)", "4", "4", []),
        ([], "SITE_SBATCH=(--gres=lscratch:100)", "0", "1", []),
        ([], "SITE_SBATCH=(--gres=gpu)", "1", "1", []),
        (["--gpus-per-node", "2"], "SITE_SBATCH=(--gres=gpu:2)", "2", "2", []),
        (["--nodes=2"], "SITE_SBATCH=(--gpus=16)", "8", "8", []),
        (["--nodes=2"], "SITE_SBATCH=(-G16)", "8", "8", []),
        ([], "SITE_SBATCH=(--gpus-per-node=h100:8)\nPROCESSES_PER_NODE=4", "8", "4", []),
    ],
)
def test_gpus_that_the_site_asks_for(
    tmp_path: Path, flags: list[str], site: str, gpus: str, processes: str, asked: list[str]
) -> None:
    """Held and trained on, whichever flag of Slurm's they are asked for by."""
    job = Submission(tmp_path)
    done = job.submit(*flags, site=site)
    assert done.returncode == 0, done.stderr
    assert (job.says("gpus"), job.says("processes_per_node")) == (gpus, processes)
    assert [flag for flag in job.argv if flag.startswith("--gpus-per-node=a")] == asked
    assert ("/cpu_zero" in job.checked) == (gpus == "0")


@pytest.mark.parametrize(
    ("flags", "site", "message"),
    [
        (["--gpus-per-node=4"], "SITE_SBATCH=(--gres=gpu:2)", "ask for 2: leave one of them out"),
        (["--nodes=2-4"], "SITE_SBATCH=(--gpus=8)", "does not tell how many each of 2-4 has"),
        (["--nodes=3"], "SITE_SBATCH=(--gpus=8)", "does not tell how many each of 3 has"),
        ([], "PROCESSES_PER_NODE=all", "PROCESSES_PER_NODE: all is no number"),
        ([], "SITE_SBATCH=(--gres=gpu:2", "site.env is not bash:"),
        ([], "MAX_ATTEMPTS=many", "MAX_ATTEMPTS: many is no whole number"),
        ([], "RETRY_SECONDS=0.5", "RETRY_SECONDS: 0.5 is no whole number"),
        (["--nodes="], "", "--nodes:  is neither N nor MIN-MAX"),
        (["--nodes=2"], "SITE_SBATCH=(--nodes=3)", "submit.sh --nodes"),
        ([], "SITE_SBATCH=(-N 3)", "submit.sh --nodes"),
        ([], "SITE_SBATCH=(--array=0-3)", "asks for an array"),
        ([], "SITE_SBATCH=(-a 0-3)", "asks for an array"),
        ([], "SITE_SBATCH=(--signal=B:TERM@60)", "queues itself again at USR1 or USR2 alone"),
        ([], "SITE_SBATCH='-p gpu -A me'", "one word: SITE_SBATCH=(-p gpu -A me)"),
        ([], "SITE_CONTAINER='apptainer exec x.sif'", "SITE_CONTAINER=(apptainer exec x.sif)"),
    ],
)
def test_a_site_that_contradicts(tmp_path: Path, flags: list[str], site: str, message: str) -> None:
    done = Submission(tmp_path).submit(*flags, site=site)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "argv").exists()


@pytest.mark.parametrize(
    ("flags", "site", "asked"),
    [
        (["--gpus-per-node", "8"], "", ["--cpus-per-task=32"]),
        (["--gpus-per-node", "8"], "CPUS_PER_PROCESS=12", ["--cpus-per-task=96"]),
        ([], "", ["--cpus-per-task=1"]),
        (["--gpus-per-node", "8"], "SITE_SBATCH=(-c 16)", []),
        (["--gpus-per-node", "8"], "SITE_SBATCH=(--cpus-per-gpu=4)", []),
        (["--gpus-per-node", "8"], "SITE_SBATCH=(--mem=0 --exclusive)", []),
    ],
)
def test_cores(tmp_path: Path, flags: list[str], site: str, asked: list[str]) -> None:
    """Slurm's own default is one of a node, however many processes are to share it."""
    job = Submission(tmp_path)
    assert job.submit(*flags, site=site).returncode == 0
    assert [flag for flag in job.argv if flag.startswith("--cpus-per-task")] == asked


def test_an_array_by_the_environment(tmp_path: Path) -> None:
    done = Submission(tmp_path).submit(SBATCH_ARRAY_INX="0-3")
    assert (done.returncode, "asks for an array" in done.stderr) == (2, True)


@pytest.mark.parametrize("words", [[], ["/no/such/folder"]])
def test_the_batch_script_submitted_by_hand(words: list[str]) -> None:
    """It says what submits it, and nothing is begun."""
    script = ["bash", str(ROOT / "slurm/train.sbatch"), *words]
    environment = os.environ | {"SLURM_JOB_ID": "7"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "slurm/submit.sh RECIPE prepares and submits" in done.stderr


OURS = """here=/x root=/x nodes=7 recipe=/x time=1 dry_run=1 overrides=(--seed 9) run=/x job=/x
gpus=3 config=/x processes=9 environment=prod min_nodes=9 ranged=1 submitted_as=x token=x"""


def test_a_site_may_call_its_variables_as_it_likes(tmp_path: Path) -> None:
    """Also as the scripts call theirs."""
    job = Submission(tmp_path)
    done = job.submit("--nodes=2", site=OURS)
    assert done.returncode == 0, done.stderr
    assert "--nodes=2" in job.argv
    assert (job.says("run"), job.says("min_nodes"), job.says("gpus")) == (str(job.run), "2", "0")
    fakes = Fakes(tmp_path / "job", "commit 4; status finished null", OURS)
    code, output = fakes.runs()
    assert code == 0, output
    assert fakes.launches() == ["launch n1,n2 7.0.1 2 address-of-n1 10218"]
    prepare = ["bash", str(fakes.job / "node.sh"), "prepare", "7.0.1"]
    assert subprocess.run(prepare, cwd="/").returncode == 0


@pytest.mark.parametrize("time", ["1-00:00:00", "0", "UNLIMITED"])
def test_a_time_that_is_asked_for_goes_above_the_sites(tmp_path: Path, time: str) -> None:
    """sbatch takes the last one; 0 is no limit."""
    job = Submission(tmp_path)
    done = job.submit(f"--time={time}", site="SITE_SBATCH=(--time=1:00:00 -p gpu)")
    assert done.returncode == 0, done.stderr
    assert [flag for flag in job.argv if flag.startswith("--time")][-1] == f"--time={time}"
    assert ("--walltime" in job.checked) == (time == "1-00:00:00")


@pytest.mark.parametrize(
    ("flags", "site", "signal", "seconds"),
    [
        (["--time=1-0"], "", None, "300"),
        (["--time=4"], "", "B:USR1@60", "60"),
        (["--time=0"], "", None, "300"),
        (["--time=4"], "SITE_SBATCH=(--signal=B:USR1@90)", "B:USR1@90", "90"),
        ([], "SITE_SBATCH=(-p gpu --signal USR2@600)", None, "600"),
        ([], "SITE_SBATCH=(--signal=B:10)", "B:10", "60"),
    ],
)
def test_a_job_has_time_to_save(
    tmp_path: Path, flags: list[str], site: str, signal: str | None, seconds: str
) -> None:
    """However short it is: a signal 300 s ahead of a limit of 240 would come when it begins."""
    job = Submission(tmp_path)
    done = job.submit(*flags, site=site)
    assert done.returncode == 0, done.stderr
    told = [flag for flag in job.argv if flag.startswith("--signal=")]
    assert told[-1:] == ([f"--signal={signal}"] if signal else [])
    assert job.says("warning_seconds") == seconds


NAMES = ["two\nlines; touch $FAKE/injected", "'\"# %j $(touch $FAKE/injected) *", "-x="]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_have_any_name(tmp_path: Path, name: str) -> None:
    """It stands in no line that Slurm or a shell takes apart."""
    job = Submission(tmp_path, name)
    done = job.submit("--seed", name, site="SITE_SBATCH=(--comment='my own' --partition gpu)")
    assert done.returncode == 0, done.stderr
    flags = job.argv
    own = f"{job.run}/.keepstep/job"
    assert flags[-2:] == [f"{own}/train.sbatch", own]
    assert f"--output={job.run}/.keepstep/logs/%j.log".replace(" %j $", " %%j $") in flags
    assert flags[-5:-2] == ["--comment=my own", "--partition", "gpu"]
    assert Path(own, "train.sbatch").read_text() == (ROOT / "slurm/train.sbatch").read_text()
    assert (job.says("run"), job.says("overrides[1]")) == (str(job.run), name)
    assert Path(own, "id").read_text() == "12\n"
    assert not (tmp_path / "injected").exists()


@pytest.mark.parametrize("told", [True, False])
def test_a_run_folder_that_only_its_node_sees(tmp_path: Path, told: bool) -> None:
    """What the job needs lies elsewhere, a folder for each run, and nothing in the run folder."""
    job, jobs = Submission(tmp_path), tmp_path / "home/.keepstep/jobs"
    site = f"JOB_FOLDERS={tmp_path}/shared" if told else ""
    env = {"NODE_LOCAL": "1", "HOME": str(tmp_path / "home"), "JOB_FOLDERS": "/nowhere"}
    done = job.submit(site=site, **env)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "shared" if told else jobs).iterdir()
    assert folder.name.startswith("run-")
    assert (folder / "id").read_text() == "12\n"
    assert f"--output={folder}/logs/%j.log" in job.argv
    assert not job.run.exists()
    assert "keepstep ls s3://b/runs/x" in done.stdout
    assert "keepstep stop" not in done.stdout


def test_a_name_that_slurm_cannot_be_given(tmp_path: Path) -> None:
    done = Submission(tmp_path, "runs\\x").submit()
    assert done.returncode == 2
    assert "runs\\x has a backslash in it" in done.stderr


def test_a_job_is_no_part_of_the_job_that_it_is_submitted_from(tmp_path: Path) -> None:
    job = Submission(tmp_path)
    left = {"SLURM_RESTART_COUNT": "3", "SLURM_GPUS": "8", "SLURM_MEM_PER_CPU": "1"}
    left |= {"SRUN_CPUS_PER_TASK": "4", "SLURMD_NODENAME": "n7", "SLURM_EXPORT_ENV": "NONE"}
    own = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine"}
    assert job.submit(**left, **own).returncode == 0
    known = {line.partition("=")[0] for line in (tmp_path / "env").read_text().split("\0")}
    assert not known & left.keys()
    assert own.keys() <= known


def test_sbatch_refuses(tmp_path: Path) -> None:
    job = Submission(tmp_path)
    (tmp_path / "refuses").touch()
    done = job.submit()
    assert done.returncode == 2
    assert "sbatch: error: invalid account\nkeepstep: sbatch has refused the job" in done.stderr
    assert not (job.run / ".keepstep/job/id").exists()


def test_a_site_may_use_what_is_not_set(tmp_path: Path) -> None:
    """And do what fails: it is no script of ours."""
    site = "PATH=$PATH:$NOWHERE/bin\nfalse\n[[ -n $NOTHING ]]"
    assert Submission(tmp_path).submit(site=site).returncode == 0
    fakes = Fakes(tmp_path / "job", "commit 4; status finished null", f"{site}\nset -e")
    code, output = fakes.runs()
    assert code == 0, output


@pytest.mark.parametrize("place", ["/dev/shm", "/tmp"])
def test_a_run_folder_that_no_other_node_sees(tmp_path: Path, place: str) -> None:
    job = Submission(tmp_path, f"{place}/keepstep-not-there-yet/runs/x")
    assert "looks like this machine's own disk or memory" in job.submit("--dry-run").stderr


RUNS = """# the learning rate
--output_dir {0}/a --learning_rate 1e-4

--output_dir={0}/b --learning_rate 2e-4 --run_name 'two words; $(touch {0}/ran)'
--learning_rate 3e-4 --output_dir {0}/c"""


@pytest.mark.parametrize("at_most", [None, 2])
def test_many_runs(tmp_path: Path, at_most: int | None) -> None:
    """A job for each line, with its flags above those that all have; so many at once."""
    (tmp_path / "runs.txt").write_text(RUNS.format(tmp_path))
    bound = [] if at_most is None else ["--at_most", str(at_most)]
    job = Submission(tmp_path)
    done = job.submit("--runs", "runs.txt", *bound, "--time=60", "--learning_rate", "1e-5")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"Job 12 trains (\S+)", done.stdout) == [f"{tmp_path}/{n}" for n in "abc"]
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert all("--time=60" in line for line in submitted)
    names = re.findall(r"--job-name=(\S+) --dependency=singleton", "".join(submitted))
    assert [name[-1] for name in names] == ([] if at_most is None else ["0", "1", "0"])
    env = subprocess.run(
        ["bash", "-c", f'. {tmp_path}/b/.keepstep/job/job.env; printf "%s\\n" "${{overrides[@]}}"'],
        capture_output=True,
        text=True,
    )
    assert env.stdout.splitlines() == [
        *("--learning_rate", "1e-5", f"--output_dir={tmp_path}/b", "--learning_rate", "2e-4"),
        *("--run_name", f"two words; $(touch {tmp_path}/ran)"),
    ]
    assert not (tmp_path / "ran").exists()


def test_many_runs_once_more(tmp_path: Path) -> None:
    """Those that are at work are left alone; one that cannot be submitted stops no other."""
    (tmp_path / "runs.txt").write_text(RUNS.format(tmp_path))
    job = Submission(tmp_path)
    queue = tmp_path / "bin/squeue"
    (tmp_path / "a/.keepstep/job").mkdir(parents=True)
    (tmp_path / "a/.keepstep/job/id").write_text("7")
    (tmp_path / "b").touch()
    queue.write_text("#!/bin/sh\necho RUNNING")
    done = job.submit("--runs", "runs.txt")
    assert done.returncode == 2
    assert f"Job 7 of {tmp_path}/a is RUNNING already: it is left alone." in done.stdout
    assert f"Job 12 trains {tmp_path}/c " in done.stdout
    assert "not submitted: line 4 of runs.txt" in done.stderr


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("--learning_rate 1", [], "line 1 of runs.txt has no --output_dir"),
        ("#\n--output_dir a\n--output_dir a/", [], "line 3 of runs.txt: another line has"),
        ("\n# none\n", [], "runs.txt has no runs in it"),
        ("--output_dir a", ["--at_most", "0"], "--at_most: 0 is no number of runs"),
    ],
)
def test_many_runs_that_are_none(tmp_path: Path, text: str, flags: list[str], message: str) -> None:
    (tmp_path / "runs.txt").write_text(text)
    done = Submission(tmp_path).submit("--runs", "runs.txt", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "submitted").exists(), "nothing is submitted"


def test_an_array_by_hand(tmp_path: Path) -> None:
    job = Submission(tmp_path)
    done = job.submit("--this_job", SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 2
    assert "an array of jobs on one run" in done.stderr
    assert "this is no job of Slurm's" in job.submit("--this_job").stderr


def test_at_most_without_runs(tmp_path: Path) -> None:
    assert "--at_most goes with --runs" in Submission(tmp_path).submit("--at_most", "2").stderr
    assert "there is no file x" in Submission(tmp_path).submit("--runs", "x").stderr


def test_the_script_is_submitted_by_hand(tmp_path: Path) -> None:
    for arguments in ([], [str(tmp_path)]):
        done = subprocess.run(
            ["bash", ROOT / "slurm/train.sbatch", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "slurm/submit.sh RECIPE prepares and submits" in done.stderr


def test_a_save_interval_too_long_for_the_job(warm: Warm, tmp_path: Path, recipe: Path) -> None:
    flags = ["--save_interval_seconds", "3600", "--time", "1:30:00", "--dry-run"]
    done = submit(tmp_path, str(recipe), *flags, PATH=warm.path())
    assert done.returncode == 0
    assert "a save every 3600 s in jobs of 5400 s" in done.stderr


# --- the batch script


def test_finished(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "echo hello; commit 40; status finished null")
    code, output = fakes.runs()
    assert code == 0, output
    assert fakes.launches() == ["launch n1,n2 7.0.1 2 address-of-n1 10218"]
    assert "from checkpoint 0" in output
    assert "hello" in output
    assert "hello" in (fakes.private / "logs/7.0.1.log").read_text()
    *_, event = map(json.loads, (fakes.private / "events.jsonl").read_text().splitlines())
    assert (event["owner"], event["nodes"], event["step"]) == ("7.0.1", "n1,n2", 40)
    assert fakes.owner() == "7.0.1"
    assert not [call for call in fakes.calls if "requeue" in call]


@pytest.mark.parametrize("told", ["exit 2", "echo 2 >$run/.keepstep/logs/$token.0.exit; exit 143"])
def test_a_wrong_recipe_is_not_tried_twice(tmp_path: Path, told: str) -> None:
    """Also when srun names the end of a node that it has ended itself."""
    fakes = Fakes(tmp_path, f"echo 'the recipe has a problem'; {told}")
    (fakes.private / "status.json").write_text('{\n "outcome": "finished",\n "exit": 0\n}\n')
    code, output = fakes.runs()
    assert code == 2, output
    assert len(fakes.launches()) == 1
    status = json.loads((fakes.private / "status.json").read_text())
    assert (status["outcome"], status["exit"], status["owner"]) == ("failed", 2, "7.0.1")


@pytest.mark.parametrize("other", ["", "echo 70 >$run/.keepstep/logs/$token.1.exit; "])
def test_a_node_that_fails_has_others_ended(tmp_path: Path, other: str) -> None:
    """By srun, with TERM: what they say of it is nobody's wish."""
    stopped = "echo 75 >$run/.keepstep/logs/$token.0.exit; exit 75"
    body = f"((number > 1)) || {{ {other}{stopped}; }}; commit 4; status finished null"
    fakes = Fakes(tmp_path, body)
    code, output = fakes.runs()
    assert code == 0, output
    assert len(fakes.launches()) == 2


@pytest.mark.parametrize(
    ("body", "outcome", "expected"),
    [
        ("exit 75", "preempted", 75),
        ("((number == 1)) && exit 137; cp $run/.keepstep/status.json $FAKE; exit 2", "failed", 2),
    ],
)
def test_status_json_tells_of_no_earlier_attempt(
    tmp_path: Path, body: str, outcome: str, expected: int
) -> None:
    """Of one that ended before it began, the job does."""
    fakes = Fakes(tmp_path, body)
    (fakes.private / "status.json").write_text('{\n "outcome": "finished",\n "exit": 0\n}\n')
    code, output = fakes.runs()
    assert code == expected, output
    status = json.loads((fakes.private / "status.json").read_text())
    assert (status["outcome"], status["exit"]) == (outcome, expected)
    if (fakes.folder / "status.json").exists():
        earlier = json.loads((fakes.folder / "status.json").read_text())
        assert (earlier["owner"], earlier["exit"]) == ("7.0.1", 137)


@pytest.mark.parametrize(
    ("life", "when"), [("", "before the run began"), ("beat; ", "without a word of its end")]
)
def test_an_attempt_that_is_killed(tmp_path: Path, life: str, when: str) -> None:
    """It tells nothing; that it was at work is known from its signs of life."""
    fakes = Fakes(tmp_path, f"{life}exit 137", "MAX_ATTEMPTS=1")
    code, output = fakes.runs()
    assert code == 76, output
    told = re.findall(r"failed \((.*)\), checkpoint 0", output)
    assert told == [f"exit status 137, {when}"]


def test_steps_inherit_what_they_are_to_have(tmp_path: Path) -> None:
    """All of a node, as many cores as it has; and the shell's environment, whatever sbatch's."""
    fakes = Fakes(tmp_path, "commit 4; status finished null")
    fakes.start(
        env={"SLURM_EXPORT_ENV": "NONE", "SLURM_CPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "4"}
    )
    assert fakes.end()[0] == 0
    assert (fakes.folder / "inherited").read_text() == ""


def test_submitted_from_a_shell_that_is_set_up_otherwise(tmp_path: Path) -> None:
    """A session within another job, say, which Slurm has queued again; or for an own srun."""
    theirs = {"SLURM_RESTART_COUNT": "3", "SLURM_EXCLUSIVE": "1", "SLURM_STDOUTMODE": "/nowhere"}
    theirs |= {"SLURM_MEM_PER_NODE": "1000", "SLURM_MEM_PER_CPU": "100"}
    fakes = Fakes(tmp_path, "env >$FAKE/env; commit 4; status finished null")
    fakes.start(env=theirs)
    code, output = fakes.end()
    assert code == 0, output
    assert fakes.owner() == "7.0.1"
    left = (fakes.folder / "env").read_text()
    assert [name for name in list(theirs)[1:] if name in left] == []


ODD = {
    "a link": "ln -s $FAKE/theirs {0}",
    "a pipe": "mkfifo {0}",
    "a folder": "mkdir -p {0}/theirs",
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["stop", "events.jsonl", "status.json", "heartbeat", "owner"])
def test_whatever_lies_in_a_files_place(tmp_path: Path, name: str, kind: str) -> None:
    """It is neither waited for nor written through; what can be told another way still is."""
    body = "trap 'signalled=1' USR1; while [[ -z ${signalled:-} ]]; do sleep 0.05; done\n"
    fakes = Fakes(tmp_path, f"{body} exit 75")
    (fakes.folder / "theirs").write_text("theirs\n")
    lay = ODD[kind].format(f'"{fakes.private}/{name}"')
    process = fakes.start()
    fakes.wait_for_launch()
    subprocess.run(
        ["bash", "-c", f'rm -f "{fakes.private}/{name}"; {lay}'],
        env={**os.environ, "FAKE": str(fakes.folder)},
        check=True,
    )
    process.send_signal(signal.SIGUSR1)
    code, output = fakes.end()
    assert code == 143, output
    assert (fakes.folder / "theirs").read_text() == "theirs\n"


def test_preparing_ends_nothing_of_a_run_whose_name_is_a_part_of_this_ones(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "")
    with (fakes.job / "job.env").open("a") as file:
        file.write(f"run=$'{fakes.run}\\nsecond line'\n")
    env = {**os.environ, "KEEPSTEP_OWNER": "7.0.3", "KEEPSTEP_RUN": str(fakes.run)}
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=env)
    try:
        subprocess.run(["bash", fakes.job / "node.sh", "prepare", "7.1.1"], check=True, timeout=20)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_node_that_does_not_have_the_users_environment(tmp_path: Path) -> None:
    """`--export=NONE`: the environment that the job was submitted in is found by its path."""
    fakes = Fakes(tmp_path, "")
    (fakes.bin / "accelerate").write_text("")
    (fakes.bin / "accelerate").chmod(0o755)
    with (fakes.job / "job.env").open("a") as file:
        file.write(f"environment={fakes.bin}\n")
    (fakes.job / "train.sh").write_text("#!/bin/bash\ncommand -v accelerate\n")
    (fakes.job / "train.sh").chmod(0o755)
    launch = ["bash", str(fakes.job / "node.sh"), "launch", "7.0.1", "1", "n1", "10218"]
    bare = {"PATH": "/usr/bin:/bin", "SLURM_PROCID": "0"}
    assert subprocess.check_output(launch, env=bare, text=True) == f"{fakes.bin}/accelerate\n"


def test_a_node_whose_disk_is_full(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "")
    (fakes.job / "train.sh").write_text("#!/bin/bash\necho $TMPDIR\n")
    (fakes.job / "train.sh").chmod(0o755)
    launch = ["bash", str(fakes.job / "node.sh"), "launch", "7.0.1", "1", "n1", "10218"]
    env = {**os.environ, "SLURM_PROCID": "0", "SLURMD_NODENAME": "n2", "TMPDIR": "/proc"}
    done = subprocess.run(launch, env=env, capture_output=True, text=True)
    assert done.stdout in ("/tmp\n", "/var/tmp\n", "/dev/shm\n"), done.stderr
    assert "keepstep: nothing can be written in /proc on n2: temporary files go to" in done.stderr
    done = subprocess.run(
        launch, env={**env, "TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{tmp_path}\n", "")


def test_a_site_whose_setup_fails(tmp_path: Path) -> None:
    """Each attempt fails by it, maybe on one node alone: it is named."""
    fakes = Fakes(tmp_path, "", "site_setup() { false; }")
    launch = ["bash", str(fakes.job / "node.sh"), "launch", "7.0.1", "1", "n1", "10218"]
    env = {**os.environ, "SLURM_PROCID": "0", "SLURMD_NODENAME": "n2"}
    done = subprocess.run(launch, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "keepstep: site_setup of site.env has failed on n2" in done.stderr


def test_the_budget_counts_attempts_without_progress(tmp_path: Path) -> None:
    """The third attempt commits, and the count begins anew."""
    fakes = Fakes(tmp_path, "((number != 2)) || commit 10; exit 1", "MAX_ATTEMPTS=2")
    code, output = fakes.runs()
    assert code == 76, output
    assert len(fakes.launches()) == 4
    ports = [launch.split()[-1] for launch in fakes.launches()]
    assert len(set(ports)) == 4, "no straggler of an earlier attempt joins a later one"
    status = json.loads((fakes.private / "status.json").read_text())
    assert status["outcome"] == "no_progress"
    assert "2 attempts in a row without a new checkpoint" in output
    assert not [call for call in fakes.calls if "requeue" in call]


def test_what_the_run_says_counts_not_the_exit_status(tmp_path: Path) -> None:
    """srun tells of whichever process has ended first; an old status tells nothing."""
    body = "((number == 1)) && { token=7.0.0 status finished null; exit 1; }\n"
    fakes = Fakes(tmp_path, body + "commit 1; status finished null; exit 143")
    code, output = fakes.runs()
    assert code == 0, output
    assert len(fakes.launches()) == 2


def test_a_run_that_goes_back_is_launched_again_at_once(tmp_path: Path) -> None:
    body = """if ((number == 1)); then exit=75 status rewound "the loss is not finite"; exit 75; fi
commit 1; status finished null; exit 0"""
    fakes = Fakes(tmp_path, body)
    code, output = fakes.runs()
    assert code == 0, output
    assert len(fakes.launches()) == 2
    assert "going back: the loss is not finite" in output
    assert not [call for call in fakes.calls if "requeue" in call]


def test_the_time_limit(tmp_path: Path) -> None:
    body = "while [[ -z ${signalled:-} ]]; do beat; sleep 0.1; done\n"
    body += 'cp $run/.keepstep/stop "$FAKE/asked"; commit 5; status preempted "SIGUSR1 to rank 0"'
    fakes = Fakes(tmp_path, body)
    code, output = fakes.signalled(signal.SIGUSR1)
    assert code == 143, output
    assert "queue again: the time is over, at checkpoint 5" in output
    assert (fakes.folder / "asked").read_text() == "7.0.1", "for this attempt and no other"
    assert "scontrol requeue 7" in fakes.calls


HEEDS = """while [[ -z ${signalled:-} ]]; do beat; sleep 0.1; done
"""


def test_what_the_job_has_asked_for_does_not_stay(tmp_path: Path) -> None:
    """`keepstep status` would tell of it for as long as the job waits in the queue."""
    fakes = Fakes(tmp_path, HEEDS + "commit 5; status preempted 'SIGUSR1 to rank 0'")
    code, output = fakes.signalled(signal.SIGUSR1)
    assert code == 143, output
    assert not (fakes.private / "stop").exists()


@pytest.mark.parametrize("heeds", ["", 'rm "$run/.keepstep/stop"; '], ids=["late", "in time"])
def test_its_user_stops_it_near_the_time_limit(tmp_path: Path, heeds: str) -> None:
    """It is not queued again; the attempt may have heeded the one or the other."""
    fakes = Fakes(tmp_path, f"{HEEDS}{heeds}commit 5; status preempted 'keepstep stop'; exit 75")
    process = fakes.start()
    fakes.wait_for_launch()
    (fakes.private / "stop").touch()
    process.send_signal(signal.SIGUSR1)
    code, output = fakes.end()
    assert code == 75, output
    assert "] stopped on request" in output
    assert fakes.requeues() == 0
    assert not (fakes.private / "stop").exists()


def test_the_time_limit_when_nothing_can_be_saved(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "trap '' USR1; exec sleep 60", "GRACE_SECONDS=1")
    code, output = fakes.signalled(signal.SIGUSR1)
    assert code == 143, output
    assert "not saved in time: this attempt is ended" in output
    assert "scontrol requeue 7" in fakes.calls


def test_the_deadline_of_the_run_itself(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 5; status preempted 'the deadline'; exit 75")
    code, output = fakes.runs()
    assert code == 143, output
    assert "scontrol requeue 7" in fakes.calls


def test_its_user_stops_it(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 5; status preempted 'keepstep stop'; exit 75")
    code, output = fakes.runs()
    assert code == 75, output
    assert "to go on: slurm/submit.sh recipe.yaml" in output
    assert not [call for call in fakes.calls if "requeue" in call]


TOLD = f"'{', '.join(f'SIGTERM to rank {n}' for n in range(8))}'"


@pytest.mark.parametrize("first", ["exit 75", f"{{ status preempted {TOLD}; exit 75; }}"])
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_signal_that_comes_late(tmp_path: Path, restarts: int, first: str) -> None:
    """Slurm repeats it where a node was away; the steps of a requeued job have the same numbers
    as those before: whoever asked, asked another round. Also of an attempt that has begun."""
    fakes = Fakes(tmp_path, f"((number == 1)) && {first}; commit 4; status finished null")
    fakes.start(restarts)
    code, output = fakes.end()
    assert code == (0 if restarts else 75), output
    assert ("a signal for a step of an earlier round: once more" in output) == bool(restarts)


def test_slurm_ends_it(tmp_path: Path) -> None:
    """scancel: from there on nothing is submitted again."""
    fakes = Fakes(tmp_path, "sleep 1.5; commit 5; status preempted 'SIGTERM to rank 0'; exit 75")
    code, output = fakes.signalled(signal.SIGTERM)
    assert code == 143, output
    assert "ended after" in output
    assert not [call for call in fakes.calls if "requeue" in call]


def test_the_batch_shell_alone_is_told_to_end(tmp_path: Path) -> None:
    """`scancel --batch --signal=TERM`: nobody else passes it on."""
    body = "while [[ -z ${signalled:-} ]]; do beat; sleep 0.1; done\n"
    body += 'cp $run/.keepstep/stop "$FAKE/asked"; commit 5; status preempted "keepstep stop"'
    fakes = Fakes(tmp_path, body)
    code, output = fakes.signalled(signal.SIGTERM)
    assert code == 143, output
    assert (fakes.folder / "asked").read_text() == "7.0.1"
    assert fakes.requeues() == 0


def test_told_to_end_and_nothing_can_be_saved(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "trap '' USR1; exec sleep 60", "GRACE_SECONDS=1")
    code, output = fakes.signalled(signal.SIGTERM)
    assert code == 143, output
    assert "not saved in time: this attempt is ended" in output


def of_ranks(signal: str, *ranks: int) -> str:
    return ", ".join(f"{signal} to rank {rank}" for rank in ranks)


@pytest.mark.parametrize(
    ("reason", "expected", "launches"),
    [
        (of_ranks("SIGTERM", *range(8)), 75, 1),
        (of_ranks("SIGINT", *range(8)) + ", before training began", 75, 1),
        (of_ranks("SIGUSR1", *range(8)), 143, 1),  # queued again
        (of_ranks("SIGTERM", 3), 0, 2),  # the kernel's, say: not Slurm's, and nobody's wish
        (of_ranks("SIGTERM (its launcher is gone)", *range(8)), 0, 2),
    ],
)
def test_a_signal_to_the_steps_alone(
    tmp_path: Path, reason: str, expected: int, launches: int
) -> None:
    """`scancel --signal` reaches all ranks, and not this shell: what it asks for is done."""
    body = "((number == 1)) || { commit 9; status finished null; exit 0; }\ncommit 5\n"
    fakes = Fakes(tmp_path, body + f"exit=75 status preempted '{reason}'; exit 75")
    code, output = fakes.runs()
    assert code == expected, output
    assert len(fakes.launches()) == launches
    assert fakes.requeues() == (expected == 143)


def test_a_signal_that_a_lost_node_has_brought(tmp_path: Path) -> None:
    body = "((number == 1)) || { commit 9; status finished null; exit 0; }\ncommit 5\n"
    body += f"touch $FAKE/dead-n2; exit=75 status preempted '{of_ranks('SIGTERM', *range(8))}'"
    fakes = Fakes(tmp_path, body, ranged=True)
    code, output = fakes.runs()
    assert code == 0, output
    assert [launch.split()[1] for launch in fakes.launches()] == ["n1,n2", "n1"]


def test_preempted(tmp_path: Path) -> None:
    """With a grace time Slurm tells the steps, and the batch shell nothing."""
    fakes = Fakes(tmp_path, "commit 5; status preempted 'SIGTERM to rank 0'; exit 75")
    fakes.says_of_job("Restarts=0 PreemptTime=2026-11-25T10:00:00")
    code, output = fakes.runs()
    assert code == 143, output
    assert "queue again: preempted by another job" in output


def test_requeue_is_refused(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 5; status preempted 'the deadline'; exit 75")
    fakes.requeue_is("echo 'Requested operation is presently disabled' >&2; exit 1")
    code, output = fakes.runs()
    assert code == 75, output
    assert "to go on: slurm/submit.sh recipe.yaml" in output


def test_the_controller_is_away(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 5; status preempted 'the deadline'; exit 75")
    away = "echo 'Unable to contact slurm controller' >&2; exit 1"
    back = "kill -TERM $(cat $FAKE/pid)"
    fakes.requeue_is(f"[[ -e $FAKE/tried ]] && {back} || {{ touch $FAKE/tried; {away}; }}")
    code, output = fakes.runs()
    assert code == 143, output
    assert fakes.calls.count("scontrol requeue 7") == 2


def test_without_scontrol(tmp_path: Path) -> None:
    """As in a container: attempts are made, and the way to go on is told."""
    body = "((number == 1)) && { commit 5; exit 1; }; status preempted 'the deadline'; exit 75"
    fakes = Fakes(tmp_path, body)
    fakes.without_scontrol()
    code, output = fakes.runs()
    assert code == 75, output
    assert [launch.split()[1] for launch in fakes.launches()] == ["n1,n2", "n1,n2"]
    assert "to go on:" in output


def test_a_node_is_dead(tmp_path: Path) -> None:
    """With a range the others go on; without one they wait, and then the job is queued again."""
    body = "commit 9; status finished null"
    fakes = Fakes(tmp_path / "range", body, ranged=True)
    (fakes.folder / "dead-n1").touch()
    code, output = fakes.runs()
    assert code == 0, output
    assert fakes.launches()[0].startswith("launch n2 7.0.1 1 address-of-n2")

    fakes = Fakes(tmp_path / "fixed", body, "NODE_WAIT_SECONDS=2")
    (fakes.folder / "dead-n1").touch()
    code, output = fakes.runs()
    assert code == 143, output
    assert "1 of 2 nodes answer (n2), 2 are needed: waiting" in output
    assert "queue again: nodes are missing" in output
    assert fakes.launches() == []


def test_nodes_keep_their_order(tmp_path: Path) -> None:
    """Slurm numbers the tasks by it, and task 0 must be where the others look for it."""
    fakes = Fakes(tmp_path, "commit 9; status finished null", ranged=True, nodes=4)
    (fakes.folder / "slow-n1").touch()
    (fakes.folder / "dead-n3").touch()
    code, output = fakes.runs()
    assert code == 0, output
    assert fakes.launches()[0].startswith("launch n1,n2,n4 7.0.1 3 address-of-n1")


def test_nodes_that_never_answer_use_up_the_budget(tmp_path: Path) -> None:
    """Over restarts of the job: else it would be queued again for ever."""
    fakes = Fakes(tmp_path, "", "NODE_WAIT_SECONDS=0\nMAX_ATTEMPTS=3")
    (fakes.folder / "dead-n2").touch()
    codes = [fakes.runs(restarts)[0] for restarts in range(3)]
    assert codes == [143, 143, 76]
    assert fakes.requeues() == 2
    assert json.loads((fakes.private / "status.json").read_text())["outcome"] == "no_progress"


@pytest.mark.parametrize("place", ["owner", "job/fruitless"])
def test_a_run_folder_that_takes_no_file(tmp_path: Path, place: str) -> None:
    """A full disk, or a mount that this node has lost: waited for, then queued again, and not for
    ever, also where that cannot be counted but by Slurm."""
    fakes = Fakes(tmp_path, "", "NODE_WAIT_SECONDS=1\nMAX_ATTEMPTS=2")
    for name in ("owner", place):
        (fakes.private / name).mkdir(exist_ok=True)
    ended = [fakes.runs(restarts) for restarts in range(3 if place != "owner" else 2)]
    assert [code for code, _ in ended] == [143] * (len(ended) - 1) + [76]
    words = f"nothing can be written in {fakes.private}"
    assert all(f"{words}: waiting" in output for _, output in ended)
    assert all(f"queue again: {words}" in output for _, output in ended[:-1])
    assert fakes.launches() == []


def test_a_run_folder_that_takes_files_again(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "commit 4; status finished null")
    (fakes.private / "owner").mkdir()
    process = fakes.start()
    assert process.stdout is not None
    assert "nothing can be written" in process.stdout.readline()
    (fakes.private / "owner").rmdir()
    code, output = fakes.end()
    assert code == 0, output
    assert fakes.owner() == "7.0.1"


def test_stopped_between_two_attempts(tmp_path: Path) -> None:
    """`keepstep stop`, while nobody is there to hear of it."""
    fakes = Fakes(tmp_path, 'touch "$run/.keepstep/stop"; exit 1')
    code, output = fakes.runs()
    assert code == 75, output
    assert len(fakes.launches()) == 1
    assert not (fakes.private / "stop").exists()


def test_cancelled_between_two_attempts(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path, "kill -TERM $(cat $FAKE/pid); exit 1")
    code, output = fakes.runs()
    assert code == 143, output
    assert len(fakes.launches()) == 1
    assert fakes.requeues() == 0


def test_an_owner_that_cannot_be_read_is_nobody_elses(tmp_path: Path) -> None:
    """A network filesystem may fail for a moment."""
    body = 'mv "$run/.keepstep/owner" "$FAKE/kept"; sleep 1; mv "$FAKE/kept" "$run/.keepstep/owner"'
    fakes = Fakes(tmp_path, f"{body}; commit 4; status finished null")
    code, output = fakes.runs()
    assert code == 0, output


def test_a_request_to_be_queued_again_is_nobody_elses(tmp_path: Path) -> None:
    """The controller is away, and meanwhile the job has been queued again, and runs elsewhere."""
    fakes = Fakes(tmp_path, "commit 5; status preempted 'the deadline'; exit 75")
    fakes.requeue_is(f"echo '7.1.1' >{fakes.private}/owner; echo 'Job is pending'; exit 1")
    code, output = fakes.runs()
    assert code == 1, output
    assert fakes.requeues() == 1
    assert "the run belongs to 7.1.1 now" in output


def test_a_controller_that_stays_away(tmp_path: Path) -> None:
    """Asked at intervals, at a time limit as well, and not for ever."""
    body = "while [[ -z ${signalled:-} ]]; do beat; sleep 0.1; done; commit 5\n"
    fakes = Fakes(tmp_path, body + "status preempted SIGUSR1", "REQUEUE_SECONDS=3")
    fakes.requeue_is("echo 'Unable to contact slurm controller' >&2; exit 1")
    code, output = fakes.signalled(signal.SIGUSR1)
    assert code == 75, output
    assert 2 <= fakes.requeues() <= 4


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("exit=2 status failed 'settings have changed'; exit 1", 2),
        ("commit 5; exit=70 status finished 'not published'; exit 1", 70),
    ],
)
def test_the_exit_status_that_the_run_names(tmp_path: Path, body: str, expected: int) -> None:
    fakes = Fakes(tmp_path, body)
    code, output = fakes.runs()
    assert code == expected, output
    assert len(fakes.launches()) == 1


def test_no_word_of_status_json_is_run(tmp_path: Path) -> None:
    """Nor counted as a success: bash reckons with what an arithmetic word names."""
    body = "((number == 1)) || { commit 9; status finished null; exit 0; }\n"
    body += "exit='\"a[$(touch $FAKE/injected)]\"' status finished null; exit 1"
    fakes = Fakes(tmp_path, body.replace("$(touch", "\\$(touch").replace("$FAKE", "\\$FAKE"))
    code, output = fakes.runs()
    assert code == 0, output
    assert len(fakes.launches()) == 2
    assert not (fakes.folder / "injected").exists()


def test_a_node_without_python(tmp_path: Path) -> None:
    """What is next cannot be decided, and that is no success."""
    fakes = Fakes(tmp_path, "commit 4; status finished null")
    (fakes.job / "job.py").write_text("print('finished')\n")
    code, output = fakes.runs()
    assert code == 70, output
    assert "what is next cannot be decided: no Python answers here" in output
    assert "then to go on: slurm/submit.sh recipe.yaml" in output
    assert fakes.launches() == []


@pytest.mark.parametrize("first", ["beat", "true"], ids=["stall", "startup"])
def test_a_heart_that_stands_still(tmp_path: Path, first: str) -> None:
    body = f"((number == 1)) && {{ {first}; exec sleep 60; }}; commit 3; status finished null"
    fakes = Fakes(tmp_path, body, "STALL_SECONDS=1\nSTARTUP_SECONDS=2")
    code, output = fakes.runs()
    assert code == 0, output
    assert "no step for" in output
    assert "scancel --signal=KILL 7.5" in fakes.calls
    assert len(fakes.launches()) == 2


# --- logs


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    """Lines are lost while it is full, whoever writes them goes on, and so does the log."""
    log = tmp_path / "7.0.1.log"
    command = [sys.executable, "-BEsS", str(ROOT / "slurm/log.py"), str(log)]
    with open("/dev/full", "wb") as full:
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=full)
    assert writer.stdin is not None
    pipe = writer.stdin.fileno()

    def says(words: bytes) -> None:
        """And it has read them."""
        os.write(pipe, words)
        unread = bytearray(4)
        wait_for(
            words.decode(), lambda: fcntl.ioctl(pipe, termios.FIONREAD, unread) or not any(unread)
        )

    says(b"before\n")
    wait_for("a line", lambda: log.exists() and log.read_bytes() == b"before\n")
    _, hard = resource.prlimit(writer.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (7, hard))  # as if the disk were full
    for words in (b"lost\n", b"between\n"):  # once it has read the second, the first is lost
        says(words)
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (hard, hard))
    says(b"after\n")
    writer.stdin.close()
    assert writer.wait(300) == 0
    assert log.read_bytes().replace(b"between\n", b"") == b"before\nafter\n"


def test_a_job_that_can_tell_nobody(tmp_path: Path) -> None:
    """The disk of its logs is full: it trains, and its exit status is right."""
    fakes = Fakes(tmp_path, "for i in {1..100}; do echo $i; done; commit 40; status finished null")
    (fakes.private / "logs").rmdir()
    with open("/dev/full", "wb") as full:
        assert fakes.start(output=full).wait(300) == 0
    assert fakes.owner() == "7.0.1"


# --- leftovers


@pytest.mark.parametrize("theirs", ["7.2.1", "8.0.1", "0123456789ab host 12 3.0"])
def test_a_leftover_shell_leaves_the_run_alone(tmp_path: Path, theirs: str) -> None:
    """This one was requeued once (round 1); somebody else has the run by now."""
    fakes = Fakes(tmp_path, "commit 40; status finished null")
    (fakes.private / "owner").write_text(theirs + "\n")
    code, output = fakes.runs(restarts=1)
    assert code == 1, output
    assert f"the run belongs to {theirs.split()[0]} now" in output
    assert fakes.owner() == theirs
    assert fakes.launches() == []


@pytest.mark.parametrize("theirs", ["6.3.9", "8.0.1", "0123456789ab host 12 3.0", ""])
def test_a_job_that_begins_takes_the_run(tmp_path: Path, theirs: str) -> None:
    fakes = Fakes(tmp_path, "commit 40; status finished null")
    (fakes.private / "owner").write_text(theirs + "\n")
    assert fakes.runs()[0] == 0
    assert fakes.owner() == "7.0.1"


def test_superseded_in_the_middle(tmp_path: Path) -> None:
    """Its node was cut off; it sees that the run goes on elsewhere, and ends what it has begun."""
    fakes = Fakes(tmp_path, "while :; do beat; sleep 0.1; done")
    fakes.start()
    fakes.wait_for_launch()
    (fakes.private / "owner").write_text("7.1.0\n")
    code, output = fakes.end()
    assert code == 1, output
    assert "the run belongs to 7.1.0 now" in output
    assert not (fakes.private / "events.jsonl").exists(), "not its to write"


def test_left_behind(tmp_path: Path) -> None:
    """Slurm has queued the job again, and nobody has begun yet: no further attempt from here."""
    fakes = Fakes(tmp_path, "commit 5; echo 'x Restarts=1 y' >\"$FAKE/job\"; exit 1")
    code, output = fakes.runs()
    assert code == 1, output
    assert "this shell was left behind" in output
    assert len(fakes.launches()) == 1


def test_a_node_ends_what_was_left_over(tmp_path: Path) -> None:
    """Processes of other attempts of this run; not those of the owner, nor of another run."""
    fakes = Fakes(tmp_path, "")
    (fakes.private / "owner").write_text("7.1.1\n")
    run = str(fakes.run)

    def sleeper(owner: str, run: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "KEEPSTEP_OWNER": owner, "KEEPSTEP_RUN": run}
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=env)

    like = run[:-3] + "r.n"  # no pattern, but a name
    old, current, other = sleeper("7.0.3", run), sleeper("7.1.1", run), sleeper("7.0.3", like)
    try:
        subprocess.run(["bash", fakes.job / "node.sh", "prepare", "7.1.1"], check=True, timeout=20)
        assert old.wait(1) == -signal.SIGKILL
        assert current.poll() is other.poll() is None
    finally:
        for process in (old, current, other):
            process.kill()
            process.wait()
