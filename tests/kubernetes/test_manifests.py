"""The manifests fit the schemas, and say what keepstep's exit statuses and signals mean."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keepstep.policy.probes import ENDING_SECONDS
from keepstep.ranks.outcome import CONFIG_EXIT_STATUS, EXIT_STATUS
from tests.helpers.ranks import ROOT
from tests.kubernetes.manifests import FILES, FOLDER, check, container, job_spec, objects

MANY = [name for name in FILES if not name.startswith("one-pod")]


@pytest.mark.parametrize("name", FILES)
def test_schema(name: str) -> None:
    for one in objects(name):
        check(one)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every object inside of an object."""
    found = [path] if isinstance(value, dict) else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, (dict, list)):
            found += places(inner, (*path, key))
    return found


FREE = {"labels", "selector", "annotations", "limits", "requests"}  # any name is a key


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_field_is_refused_wherever_it_stands(name: str) -> None:
    for one in objects(name):
        for path in places(one):
            if path and path[-1] in FREE:
                continue
            wrong = inner = copy.deepcopy(one)
            for key in path:
                inner = inner[key]
            inner["nosuch"] = "x"
            with pytest.raises(ValueError, match="nosuch"):
                check(wrong)


def test_a_wrong_type_is_refused() -> None:
    (job,) = (one for one in objects("one-pod.yaml") if one["kind"] == "Job")
    job["spec"]["backoffLimit"] = "many"
    with pytest.raises(ValueError, match="backoffLimit"):
        check(job)


@pytest.mark.parametrize("name", FILES)
def test_exit_statuses(name: str) -> None:
    """2 and 76 fail the job, 75 and a disruption do not count, all others do."""
    spec, (fail, *ignore) = job_spec(name), job_spec(name)["podFailurePolicy"]["rules"]
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["values"] == [CONFIG_EXIT_STATUS, EXIT_STATUS["no_progress"]]
    assert [rule["action"] for rule in ignore] == ["Ignore", "Ignore"]
    assert ignore[0]["onExitCodes"]["values"] == [EXIT_STATUS["preempted"]]
    assert ignore[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    named = {rule["onExitCodes"]["containerName"] for rule in (fail, ignore[0])}
    assert named == {container(name)["name"]}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def environment(name: str) -> dict[str, str]:
    return {e["name"]: e.get("value", "") for e in container(name)["env"]}


@pytest.mark.parametrize("name", FILES)
def test_a_stop_has_time(name: str) -> None:
    """The launcher kills its ranks a little before the kubelet would kill all."""
    grace = job_spec(name)["template"]["spec"]["terminationGracePeriodSeconds"]
    after = int(environment(name)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert grace - after == ENDING_SECONDS


@pytest.mark.parametrize("name", FILES)
def test_the_probe_asks_of_the_run_that_is_launched(name: str) -> None:
    probe = container(name)["livenessProbe"]["exec"]["command"]
    args = container(name).get("args") or objects(name)[-1]["spec"]["trainer"]["args"]
    folder = args[args.index("--output_dir") + 1]
    assert probe == ["keepstep", "status", folder, "--healthy"]
    mounts = [mount["mountPath"] for mount in container(name)["volumeMounts"]]
    assert any(Path(folder).is_relative_to(mount) for mount in mounts)
    assert any(Path(args[0]).is_relative_to(mount) for mount in mounts)


@pytest.mark.parametrize("name", MANY)
def test_many_pods_are_one_launch(name: str) -> None:
    """As many machines as pods, each with its own rank, all with the first one's address."""
    told = environment(name)
    words = told["KEEPSTEP_LAUNCH_ARGS"].split()
    arguments = dict(zip(words[::2], words[1::2], strict=True))
    spec = job_spec(name)
    runtime = objects(name)[-1]["spec"]
    pods = spec.get("completions") or runtime["trainer"]["numNodes"]
    assert int(arguments["--num_machines"]) == pods
    assert spec["completionMode"] == "Indexed"
    assert spec.get("parallelism", pods) == pods
    gpus = int(container(name)["resources"]["limits"]["nvidia.com/gpu"])
    assert int(told["KEEPSTEP_PROCESSES"]) == pods * gpus
    names = [e["name"] for e in container(name)["env"]]
    for used in re.findall(r"\$\((\w+)\)", told["KEEPSTEP_LAUNCH_ARGS"]):
        assert names.index(used) < names.index("KEEPSTEP_LAUNCH_ARGS"), "else it is not filled in"
    claim = next(one for one in objects(name) if one["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", FILES)
def test_a_pod_may_do_what_it_needs_to(name: str) -> None:
    """What the standard "restricted" of Kubernetes asks for, and a read-only root beside it."""
    pod = job_spec(name)["template"]["spec"]["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == pod["fsGroup"] == 1000
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_has_a_volume(name: str) -> None:
    """Temporary files, what is compiled and what is downloaded; and all volumes are mounted."""
    volumes = {one["name"]: one for one in job_spec(name)["template"]["spec"]["volumes"]}
    mounts = {one["mountPath"]: one for one in container(name)["volumeMounts"]}
    assert {one["name"] for one in mounts.values()} == volumes.keys()
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    writable = [path for path, one in mounts.items() if not one.get("readOnly")]
    for variable in ("HOME", "HF_HOME"):
        path = Path(environment(name)[variable])
        assert any(path.is_relative_to(mount) for mount in writable), variable


def test_the_image() -> None:
    """Linted; pinned, not root, and TERM reaches the launcher."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "pip install -c constraints.txt -e '.[dev]'"
    path = FOLDER / "Dockerfile"
    done = subprocess.run([hadolint, "--no-color", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert re.search(r"^ARG BASE=python:3\.\d+\.\d+-slim-\w+$", text, re.M)
    assert set(re.findall(r"^FROM (\S+)", text, re.M)) == {"${BASE}", "libraries"}
    assert re.findall(r"^USER (.+)$", text, re.M) == ["1000:1000"]
    assert '\nENTRYPOINT ["tini", "--", "keepstep", "launch"]\n' in text
    assert all("-c constraints.txt" in line for line in re.findall(r"pip install .*", text))


def stages() -> list[list[str]]:
    """The Dockerfile's instructions, stage by stage."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    starts = [number for number, line in enumerate(lines) if line.startswith("FROM ")]
    return [lines[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]


def test_another_version_of_keepstep_is_a_small_layer() -> None:
    """The libraries' layers know nothing of its code; what is put upon them is keepstep alone."""
    libraries, keepstep, image = stages()
    assert libraries[0] == "FROM ${BASE} AS libraries"
    copied = [line for line in libraries if line.startswith(("COPY", "ADD"))]
    assert copied == ["COPY constraints.txt ./", "COPY pyproject.toml ./"]
    assert keepstep[0] == "FROM libraries AS keepstep"
    assert [line for line in keepstep if line.startswith("RUN")] == [
        "RUN pip install --no-cache-dir --no-deps -c constraints.txt --prefix /own ."
    ]
    made = [line for line in image if line.startswith(("FROM", "COPY", "ADD", "RUN"))]
    assert made == ["FROM libraries", "COPY --from=keepstep /own /opt/keepstep"]


def test_the_constraints_hold_for_build_backends() -> None:
    """In the image and in CI, with a pip of before 25.3 and of later."""
    names = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")
    for stage in stages()[:2]:
        assert [f"ARG {name}=/src/constraints.txt" in stage for name in names] == [True, True]
    made = ["make", "--dry-run", "--always-make", "install", "VENV=.venv-none"]
    (told,) = re.findall(r".* -e '\.\[dev\]'", subprocess.check_output(made, cwd=ROOT, text=True))
    assert all(f"{name}=constraints.txt " in told for name in names)


def test_the_image_holds_what_a_wheel_is_built_of() -> None:
    """And of the checkout nothing else."""
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.M)
    sources = {word for line in copied for word in line.split()}
    allowed = {
        line[1:]
        for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert sources == allowed
    assert all((ROOT / name).exists() for name in sources)
    project = (ROOT / "pyproject.toml").read_text()
    included = re.search(r"force-include\]\n(.*?)\n\n", project, re.S)
    assert included
    tops = {line.split('"')[1].split("/")[0] for line in included[1].splitlines()}
    assert tops <= sources
