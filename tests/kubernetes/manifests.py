"""The manifests, and what the servers' own schemas say of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from kubeflow_trainer_api import models

from tests.helpers.ranks import ROOT

FOLDER = ROOT / "kubernetes"
# kubeflow-trainer-api: generated from the OpenAPI of Kubernetes, JobSet and Trainer.
KINDS = {
    ("v1", "PersistentVolumeClaim"): models.IoK8sApiCoreV1PersistentVolumeClaim,
    ("v1", "Service"): models.IoK8sApiCoreV1Service,
    ("batch/v1", "Job"): models.IoK8sApiBatchV1Job,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): models.JobsetV1alpha2JobSet,
    (
        "trainer.kubeflow.org/v1alpha1",
        "ClusterTrainingRuntime",
    ): models.TrainerV1alpha1ClusterTrainingRuntime,
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): models.TrainerV1alpha1TrainJob,
}
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def objects(name: str) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all((FOLDER / name).read_text()) if one]


def check(one: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the schema of its kind does not fit, or does not know a field.
    """
    kind = KINDS[one["apiVersion"], one["kind"]]
    lost = list(_lost(one, kind.from_dict(one).to_dict(), one["kind"]))
    if lost:
        raise ValueError(f"no fields of the schema: {', '.join(lost)}")


def _lost(given: Any, taken: Any, where: str) -> Iterator[str]:
    """What a schema has dropped: it does not know that."""
    if isinstance(given, dict) and isinstance(taken, dict):
        for name, value in given.items():
            if name not in taken:
                yield f"{where}.{name}"
            else:
                yield from _lost(value, taken[name], f"{where}.{name}")
    elif isinstance(given, list) and isinstance(taken, list) and len(given) == len(taken):
        for number, (value, other) in enumerate(zip(given, taken, strict=True)):
            yield from _lost(value, other, f"{where}[{number}]")
    elif given != taken:
        yield where


def job_spec(name: str) -> dict[str, Any]:
    """Of the one Job that a file leads to."""
    (spec,) = (s for one in objects(name) if (s := _job_spec(one)) is not None)
    return spec


def _job_spec(one: dict[str, Any]) -> dict[str, Any] | None:
    spec: dict[str, Any] = one["spec"]
    if one["kind"] == "Job":
        return spec
    if one["kind"] == "ClusterTrainingRuntime":
        spec = spec["template"]["spec"]
    elif one["kind"] != "JobSet":
        return None
    (replicated,) = spec["replicatedJobs"]
    found: dict[str, Any] = replicated["template"]["spec"]
    return found


def container(name: str) -> dict[str, Any]:
    (one,) = job_spec(name)["template"]["spec"]["containers"]
    assert isinstance(one, dict)
    return one
