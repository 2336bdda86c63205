"""A program: posts one message. stdin has JSON: `url`, `body`, `seconds`; stdout gets a
JSON text: why it did not arrive, or null. Nothing is told of the address: it is a secret.

In a process of its own: a name that does not resolve, or a server that does not answer, may hold a
thread for minutes, and a fork of the training (a DataLoader's worker) must find no lock held.
The standard library alone: it starts at once.
"""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A message that was led elsewhere has not arrived: its body would be dropped."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def main() -> int:
    """Exit status 0: it has arrived."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C of the terminal is the training's
    job = json.load(sys.stdin)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])  # whatever it waits for
    fault = _fault_of(job["url"], job["body"], job["seconds"])
    print(json.dumps(fault))
    return 0 if fault is None else 1


def _fault_of(url: str, body: Any, seconds: float) -> str | None:
    try:
        bare, user = _without_user(url)
        request = urllib.request.Request(
            bare,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "keepstep", **user},
            method="POST",
        )
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        led = 300 <= error.code < 400
        elsewhere = ": it leads elsewhere, and is not followed; set the address that it leads to"
        return f"HTTP status {error.code}" + (elsewhere if led else "")
    except urllib.error.URLError as error:
        return _words_for(error.reason)
    except Exception as error:
        return _words_for(error)


def _words_for(error: Any) -> str:
    """Its type alone, in words: its text may hold the address."""
    for kind, words in _WORDS.items():
        if isinstance(error, kind):
            return f"{words} ({type(error).__name__})"
    return type(error).__name__


def _without_user(url: str) -> tuple[str, dict[str, str]]:
    """The address without `user:password@`, which urllib takes for a part of the host's name; and
    the header that tells it."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    told = base64.b64encode(unquote(user).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {told}"}


_WORDS = {
    socket.gaierror: "its host's name is not known here",
    ssl.SSLCertVerificationError: "its host's certificate is not trusted here",
    ssl.SSLError: "no TLS with its host",
    ConnectionRefusedError: "its host refuses the connection",
    ConnectionError: "its host broke the connection off",
    http.client.HTTPException: "its host does not answer as HTTP does",
    TimeoutError: "no answer in time",
}


if __name__ == "__main__":
    sys.exit(main())
