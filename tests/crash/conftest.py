from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def tell(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> Callable[[str], None]:
    """Show a line though the test passes: how many moments it has tried."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{request.node.name}: {text}")

    return show
