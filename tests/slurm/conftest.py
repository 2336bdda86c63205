from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.switch import obstacle
from tests.helpers.warm import Warm
from tests.slurm.helpers.cluster import PROGRAMS, Cluster
from tests.slurm.helpers.job import Job
from tests.slurm.helpers.processes import wait_for


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """The commands, without the seconds of their imports."""
    made = Warm(tmp_path_factory.mktemp("warm"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of three nodes."""
    reason = obstacle(PROGRAMS)
    if reason:
        pytest.skip(f"no Slurm cluster on this machine: {reason}")
    made = Cluster(tmp_path_factory.mktemp("slurm"), bound=True)
    made.up(3)
    yield made
    made.down()


@pytest.fixture
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of two nodes, whose names and first interfaces lead nowhere."""
    reason = obstacle(PROGRAMS)
    if reason:
        pytest.skip(f"no Slurm cluster on this machine: {reason}")
    made = Cluster(tmp_path_factory.mktemp("awkward"), bound=True)
    made.up(2, awkward=True)
    yield made
    made.down()


@pytest.fixture
def cluster(slurm: Cluster) -> Cluster:
    """All nodes up and idle, whatever the test before has done to them."""
    states = slurm.states()
    for node, state in states.items():
        slurm.heal(node)
        if state != "idle":
            slurm.boot(node)
    wait_for("idle nodes", lambda: set(slurm.states().values()) == {"idle"})
    return slurm


@pytest.fixture
def job(
    cluster: Cluster,
    warm: Warm,
    tmp_path: Path,
    demo: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Job]:
    made = Job(cluster, warm, tmp_path, demo)
    yield made
    made.end()
    with capsys.disabled():
        print(f"\n{request.node.name}\n{made.tell()}")
