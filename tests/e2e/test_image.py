"""The container image for CPU, built as kubernetes/Dockerfile has it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import versions
from tests.helpers.ranks import ROOT

DOCKERFILE = "kubernetes/Dockerfile"
TRACKED = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
# For a machine behind mirrors: --volume, --network, --isolation …
OPTIONS = shlex.split(os.environ.get("KEEPSTEP_BUILDAH_ARGS", ""))


def buildah(*words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(["buildah", *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows, with things beside it that belong in no image."""
    if shutil.which("buildah") is None:
        pytest.skip("no image on this machine: buildah is not installed")
    (base,) = re.findall(r"^ARG BASE=(.+)$", (ROOT / DOCKERFILE).read_text(), re.M)
    pulled = subprocess.run(["buildah", "pull", "--policy", "missing", base], capture_output=True)
    if pulled.returncode:
        pytest.skip(f"no image on this machine: {base} cannot be had")
    made = tmp_path_factory.mktemp("context")
    for name in subprocess.check_output(TRACKED, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).exists():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, made / name)
    for name in ("slurm/site.env", ".venv/x", "runs/x", "src/keepstep/__pycache__/x.pyc"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("none of the image's")
    return made


@contextlib.contextmanager
def built(context: Path, name: str) -> Iterator[list[str]]:
    """The image for CPU by that name; its layers' digests, lowest first."""
    options = ["--layers", *OPTIONS, "--build-arg", "VARIANT=cpu", "-t", name]
    buildah("build", "-f", DOCKERFILE, *options, ".", cwd=context)
    try:
        image = json.loads(buildah("inspect", "--type", "image", name))
        yield image["OCIv1"]["rootfs"]["diff_ids"]
    finally:
        buildah("rmi", name)


@pytest.fixture(scope="module")
def layers(context: Path) -> Iterator[list[str]]:
    with built(context, "keepstep-test") as found:
        yield found


@pytest.fixture(scope="module")
def container(layers: list[str]) -> Iterator[str]:
    name = buildah("from", "keepstep-test")
    try:
        yield name
    finally:
        buildah("rm", name)


def within(container: str, *words: str) -> str:
    return buildah("run", "--isolation", "chroot", container, "--", *words)


@pytest.mark.long
def test_the_image_holds_the_tested_versions(container: str) -> None:
    """All of them, and none of the day it is built."""
    found = versions.pins(within(container, "pip", "freeze"))
    pins = {_normal(n): v for n, v in versions.pins((ROOT / "constraints.txt").read_text()).items()}
    assert len(found) > 50
    held = {_normal(name): version for name, version in found.items()}
    assert {n: str(v.public) for n, v in held.items()} == {n: str(pins[n]) for n in held}


@pytest.mark.long
def test_the_image_is_nobodys_but_keepsteps(container: str) -> None:
    assert within(container, "id", "-u") == "1000"
    assert "Launch fine-tuning runs" in within(container, "keepstep", "--help")
    assert "tini version" in within(container, "tini", "--version")
    junk = ["-name", "site.env", "-o", "-path", "*/keepstep/__pycache__/x.pyc"]
    assert within(container, "find", "/opt", "/home", "-xdev", *junk) == ""
    assert within(container, "find", "/opt/keepstep", "-writable", "-not", "-type", "l") == ""


@pytest.mark.long
def test_another_version_is_one_layer(context: Path, layers: list[str]) -> None:
    """PyTorch and the libraries are not made again, nor sent again."""
    source = context / "src/keepstep/__init__.py"
    source.write_text(source.read_text() + "\n# another version\n")
    with built(context, "keepstep-test-changed") as changed:
        assert changed[:-1] == layers[:-1]
        assert changed[-1] != layers[-1]


def _normal(name: str) -> str:
    """A distribution's name as PyPI compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
