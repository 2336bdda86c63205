from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.helpers import launchers
from tests.helpers.ranks import ROOT, Ranks

if TYPE_CHECKING:
    from tests.mirror.server import S3Server

# In CI the same examples each time: what it refuses is then the change's doing. Elsewhere new ones:
# what they find is mended, and becomes an `@example`.
hypothesis.settings.register_profile(
    "keepstep", deadline=None, derandomize=bool(os.environ.get("KEEPSTEP_CI"))
)
hypothesis.settings.load_profile("keepstep")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Shared between environments, DeepSpeed would compile its extension anew at every launch.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
# The commands of this environment first. (Its ninja: another version would compile anew as well.)
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ["HF_HUB_OFFLINE"] = "1"  # the tests contact no hub


# In CI what can be installed is: a test that is skipped there has failed, but for a GPU's, and for
# those of trackers that every process would import with transformers once they are installed, or
# that bring other versions of what is tested.
MAY_BE_SKIPPED = "tests/gpu/"
MAY_BE_LACKING = [f"{name} is not installed" for name in ("mlflow", "swanlab", "comet_ml")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    may = item.nodeid.startswith(MAY_BE_SKIPPED)
    may |= any(reason in str(report.longrepr) for reason in MAY_BE_LACKING)
    if report.skipped and not may and os.environ.get("KEEPSTEP_CI"):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr[-1]}"
    return report


def pytest_collection_finish() -> None:
    gc.freeze()  # imported libraries, a million objects: no collection finds anything among them


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def ranks(workspace: Path) -> Iterator[Ranks]:
    started = Ranks(workspace)
    yield started
    started.close()


@pytest.fixture
def s3() -> Iterator[S3Server]:
    """An S3 server with one empty bucket."""
    from tests.mirror.server import S3Server  # it takes a second to import

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _no_launcher_stays() -> Iterator[None]:
    yield
    launchers.clear()


@pytest.fixture(scope="session")
def demo(workspace: Path) -> Path:
    """The demo's model, two layers of it (with dropout, so that the RNG matters), and data."""
    return make(workspace / "demo", dropout=0.1)


@pytest.fixture(scope="session")
def still_demo(workspace: Path) -> Path:
    """The same without dropout: nothing depends on the RNG."""
    return make(workspace / "still-demo", dropout=0.0)


def make(folder: Path, dropout: float, layers: int = 2) -> Path:
    """The demo's model, smaller: a step of ZeRO-3 costs by the module."""
    sys.path.insert(0, str(ROOT / "launch/examples"))
    import make_demo

    make_demo.make(folder, dropout=dropout, layers=layers)
    return folder
