"""The batch script and job.py against fakes of srun and scontrol: decisions, on any machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import IO

from tests.helpers.ranks import ROOT
from tests.slurm.helpers.cluster import SLURM_VARIABLE
from tests.slurm.helpers.processes import wait_for

# Every attempt is the bash script FAKE/attempt, called with its number, on the batch host.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
  case $1 in -w) nodes=$2; shift 2 ;; *) shift ;; esac
done
declare -p SLURM_EXPORT_ENV SRUN_CPUS_PER_TASK SLURM_CPUS_PER_TASK >>"$FAKE/inherited" 2>/dev/null
for node in ${nodes//,/ }; do
  [[ ! -e $FAKE/dead-$node ]] || exit 233
  [[ ! -e $FAKE/slow-$node ]] || sleep 0.5
done
case "$1 $3" in
  "printenv "*) printf 'n1\\nn2\\n' ;;
  "bash prepare") echo "prepare $nodes" >>"$FAKE/calls" ;;
  "bash launch")
    echo "launch $nodes ${*:4}" >>"$FAKE/calls"
    number=$(grep -c ^launch "$FAKE/calls")
    echo $$ >"$FAKE/step"
    exec bash "$FAKE/attempt" "$number" "$4" ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$FAKE/calls"
case "$1 $2" in
  "show hostnames") tr , '\\n' <<<"$3" ;;
  "show node") echo "NodeName=$4 NodeAddr=address-of-$4 Port=1" ;;
  "show job") cat "$FAKE/job" ;;
  requeue*) bash "$FAKE/requeue" ;;
esac
"""
SQUEUE = """#!/usr/bin/env bash
echo "7.5 attempt-$(grep -c ^launch "$FAKE/calls")"
"""
SCANCEL = """#!/usr/bin/env bash
echo "scancel $*" >>"$FAKE/calls"
kill -KILL $(cat "$FAKE/step")
"""
ATTEMPT = """
run={run}
commit() {{
  mkdir -p $run/checkpoint-$1 && touch $run/checkpoint-$1/manifest.json
  echo '{{"attempt": 1, "event": "commit", "step": '$1'}}' >>$run/.keepstep/events.jsonl
}}
status() {{
  printf '{{\\n "outcome": "%s",\\n "reason": "%s",\\n "exit": %s,\\n "owner": "%s"\\n}}\\n' \\
    "$1" "$2" "${{exit:-0}}" "$token" >$run/.keepstep/status.json
}}
beat() {{ echo "$token $RANDOM" >$run/.keepstep/heartbeat; }}
number=$1 token=$2
trap 'signalled=1' USR1
: >"$FAKE/listens-$number"
{body}
"""


class Fakes:
    """A job of two nodes, `n1` and `n2`, whose attempts are scripts.

    Attributes:
        calls: what the batch script has called, a line each.
        path: where commands are looked for.
    """

    def __init__(
        self, folder: Path, attempt: str, site: str = "", ranged: bool = False, nodes: int = 2
    ) -> None:
        self.nodes = ",".join(f"n{i + 1}" for i in range(nodes))
        self.folder, self.run = folder / "fake", folder / "run"
        self.private, self.job = self.run / ".keepstep", self.run / ".keepstep/job"
        self.bin = self.folder / "bin"
        for place in (self.bin, self.job, self.private / "logs"):
            place.mkdir(parents=True)
        for path in (ROOT / "slurm/settings.sh", ROOT / "slurm/node.sh", *ROOT.glob("slurm/*.py")):
            shutil.copy(path, self.job)
        shutil.copy(ROOT / "src/keepstep/policy/next_step.py", self.job)
        settings: dict[str, object] = {"run": self.run, "logs": self.private / "logs"}
        settings |= {"min_nodes": 1 if ranged else 2, "ranged": int(ranged)}
        settings |= {"processes_per_node": 4, "config": "cpu_zero3", "overrides": "()"}
        settings |= {"submitted_as": "'slurm/submit.sh recipe.yaml'", "hang_timeout": 1800}
        settings |= {"environment": "/nowhere", "gpus": 0, "warning_seconds": 300}
        (self.job / "job.env").write_text("".join(f"{k}={v}\n" for k, v in settings.items()))
        (self.job / "site.env").write_text(f"POLL_SECONDS=0.1\nRETRY_SECONDS=1\n{site}\n")
        fakes = {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "scancel": SCANCEL}
        for name, text in fakes.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        (self.folder / "attempt").write_text(ATTEMPT.format(run=self.run, body=attempt))
        self.says_of_job("Restarts=0")
        self.requeue_is("kill -TERM $(cat $FAKE/pid)")  # as Slurm does
        for name in ("calls", "inherited"):
            (self.folder / name).touch()
        self.path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        self._process: subprocess.Popen[str] | None = None

    def without_scontrol(self) -> None:
        """As in a container; the machine's own, if it has one, is not found either."""
        (self.bin / "scontrol").unlink()
        everything = self.folder / "all"
        everything.mkdir()
        for place in os.environ["PATH"].split(os.pathsep):
            for program in Path(place).iterdir() if Path(place).is_dir() else []:
                link = everything / program.name
                if program.name != "scontrol" and not os.path.lexists(link):
                    link.symlink_to(program)
        self.path = f"{self.bin}{os.pathsep}{everything}"

    def says_of_job(self, facts: str) -> None:
        (self.folder / "job").write_text(f"JobId=7 {facts} NodeList={self.nodes} BatchHost=n1\n")

    def requeue_is(self, script: str) -> None:
        (self.folder / "requeue").write_text(script + "\n")

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def launches(self) -> list[str]:
        return [call for call in self.calls if call.startswith("launch")]

    def requeues(self) -> int:
        return self.calls.count("scontrol requeue 7")

    def owner(self) -> str:
        file = self.private / "owner"
        return file.read_text().strip() if file.exists() else ""

    def start(
        self,
        restarts: int = 0,
        env: dict[str, str] | None = None,
        output: IO[bytes] | int = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        if restarts:
            self.says_of_job(f"Restarts={restarts}")
        kept = {k: v for k, v in os.environ.items() if not SLURM_VARIABLE.match(k)}
        job = {"ID": "7", "NODELIST": self.nodes, "NUM_NODES": str(self.nodes.count("n"))}
        self._process = subprocess.Popen(
            ["bash", str(ROOT / "slurm/train.sbatch"), str(self.job)],
            env={
                **kept,
                **{f"SLURM_JOB_{name}": value for name, value in job.items()},
                "SLURM_RESTART_COUNT": str(restarts),
                "FAKE": str(self.folder),
                "PATH": self.path,
                **(env or {}),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        (self.folder / "pid").write_text(str(self._process.pid))
        return self._process

    def end(self, timeout: float = 300) -> tuple[int, str]:
        """Exit status and output."""
        assert self._process is not None
        try:
            output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            output, _ = self._process.communicate()
            raise AssertionError(f"no end after {timeout} s:\n{output}") from None
        return self._process.returncode, output

    def runs(self, restarts: int = 0) -> tuple[int, str]:
        self.start(restarts)
        return self.end()

    def signalled(self, number: int) -> tuple[int, str]:
        """The same, of a job that is sent a signal during its first attempt."""
        process = self.start()
        self.wait_for_launch()
        process.send_signal(number)
        return self.end()

    def wait_for_launch(self, number: int = 1) -> None:
        """Until that attempt hears signals."""
        listens = self.folder / f"listens-{number}"
        wait_for(f"launch {number}", listens.exists, 300, 0.02)
