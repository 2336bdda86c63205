"""The recipes for clouds, by the clouds' own clients: what can be seen without an account."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from huggingface_hub import JobHardware

from keepstep.output.units import parse_duration
from keepstep.ranks.outcome import EXIT_STATUS
from tests.helpers.ranks import ROOT

ASKED = ["--name", "run-1", "--image", "1.dkr.ecr.eu-west-1.amazonaws.com/keepstep:0.2.0"]
ASKED += ["--role", "arn:aws:iam::123456789012:role/training", "--bucket", "my-bucket"]


def request() -> dict[str, Any]:
    command = [sys.executable, "cloud/sagemaker.py", *ASKED, "--dry_run"]
    told: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return told


def faults(asked: dict[str, Any]) -> str:
    """What the AWS client would say of it before it sends it."""
    session = botocore.session.get_session()
    shape = session.get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    return ParamValidator().validate(asked, shape).generate_report() + "".join(_odd(asked, shape))


def _odd(value: Any, shape: Any, where: str = "") -> Any:
    """Patterns and names of the model, which the client leaves to the server."""
    if shape.type_name == "structure":
        for name in value.keys() & shape.members.keys():  # others the client refuses
            inner = value[name]
            yield from _odd(inner, shape.members[name], f"{where}.{name}")
    elif shape.type_name == "list":
        for inner in value:
            yield from _odd(inner, shape.member, where)
    elif shape.type_name == "string":
        pattern, names = shape.metadata.get("pattern"), shape.metadata.get("enum")
        if (pattern and not re.fullmatch(pattern, value)) or (names and value not in names):
            yield f"{where}: {value}\n"


def test_sagemaker() -> None:
    asked = request()
    assert faults(asked) == ""
    for wrong in ({"NoSuch": 1}, {"StoppingCondition": {"MaxRuntimeInSeconds": "x"}}):
        assert faults(asked | wrong) != ""
    limits, words = asked["StoppingCondition"], asked["AlgorithmSpecification"]
    given = words["ContainerArguments"]
    seconds = parse_duration(given[given.index("--time_limit") + 1])
    assert 600 <= limits["MaxRuntimeInSeconds"] - seconds <= 1800
    assert limits["MaxWaitTimeInSeconds"] >= limits["MaxRuntimeInSeconds"]
    entry = re.search(r"^ENTRYPOINT (.+)$", (ROOT / "kubernetes/Dockerfile").read_text(), re.M)
    assert entry
    assert words["ContainerEntrypoint"] == json.loads(entry[1])


def test_hugging_face_jobs() -> None:
    """By the client's own dry run."""
    environment = os.environ | {"HF_JOBS_ARGS": "--dry-run", "HF_TOKEN": "hf_made_up", "HOURS": "6"}
    done = subprocess.run(
        ["cloud/hf_jobs.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = dict(re.findall(r"^  (\w+) +(.+)$", done.stdout, re.M))
    assert told["timeout"] == "6h"
    assert int(told["attempts"]) > 1
    assert "hf_made_up" not in done.stdout
    limit = re.search(r"--time_limit (\w+)", told["command"])
    assert limit
    assert 300 <= 6 * 3600 - parse_duration(limit[1]) <= 1800
    assert told["flavor"] in {flavor.value for flavor in JobHardware}
    wrong = environment | {"ATTEMPTS": "0"}
    refused = subprocess.run(["cloud/hf_jobs.sh"], cwd=ROOT, env=wrong, capture_output=True)
    assert refused.returncode == 2


def test_skypilot_comes_back_as_the_exit_statuses_say() -> None:
    task = yaml.safe_load((ROOT / "cloud/skypilot.yaml").read_text())
    codes = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert codes == [EXIT_STATUS["failed"], EXIT_STATUS["preempted"], 137]
    for script in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.long  # it installs SkyPilot, a hundred packages, into an environment of its own
def test_skypilot(tmp_path: Path) -> None:
    venv.create(tmp_path / "sky", with_pip=True)
    python = tmp_path / "sky/bin/python"
    pip = ["-m", "pip", "install", "--quiet", "skypilot==0.14.1"]
    subprocess.run([python, *pip], check=True, timeout=900)
    text = (ROOT / "cloud/skypilot.yaml").read_text()
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "right.yaml").write_text(text)
    (tmp_path / "status.yaml").write_text(text.replace("137]", "300]"))
    program = "import sky, sys; print(list(sky.Task.from_yaml(sys.argv[1]).resources)[0])"
    environment = os.environ | {"HOME": str(tmp_path)}
    for name, is_right in (("right", True), ("status", False)):
        command = [str(python), "-c", program, f"{name}.yaml"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode == 0) is is_right, done.stderr
        assert not is_right or "[Spot]" in done.stdout
