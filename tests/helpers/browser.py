"""A real browser without a window: Chromium, spoken to in its own protocol (CDP) over two pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
)


class Page:
    """One open page."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._buffer, self._last = send, receive, b"", 0
        self._session: str | None = None
        self.told: list[dict[str, Any]] = []  # events, in their order
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to it."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            self.told.append(answer)

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Show a file, as on a screen of so many pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.told.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.told):
            self.told.append(self._next())

    def prefer(self, scheme: str, media: str = "screen") -> None:
        """What the person has set: `light` or `dark`; `media` may be `print`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features, media=media)

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, to: Path) -> None:
        """All of the page, as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(taken["data"]))

    def complaints(self) -> list[str]:
        """What the console has been told, and exceptions."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event) for event in self.told if event.get("method") in kinds]

    def loads(self) -> list[str]:
        """Addresses that it has asked for."""
        sent = [e for e in self.told if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = os.read(self._receive, 1 << 16)
            assert more, "the browser is gone"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Skipped where there is none: Debian's package `chromium`.

    Args:
        profile: a folder of its own.
    """
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    to_it, send = os.pipe()
    receive, from_it = os.pipe()
    # The protocol's own numbers: it reads 3 and writes 4.
    command = f'exec "$0" "$@" 3<&{to_it} 4>&{from_it}'
    process = subprocess.Popen(
        ["bash", "-c", command, program, *OPTIONS, f"--user-data-dir={profile}"],
        pass_fds=(to_it, from_it),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_it)
    os.close(from_it)
    try:
        yield Page(send, receive)
    finally:
        os.close(send)
        process.terminate()
        process.wait(300)
        os.close(receive)
